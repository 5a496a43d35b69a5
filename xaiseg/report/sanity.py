"""The picture of a comparison of explainers: a panel a measure, a line an explainer, a dot a lesion."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xaiseg.report.canvas import FONT, add_panel, count, finish, new_page, points, style_panels, write

_INK, _DIM, _RULE, _DOT, _CONTROL = "#17181b", "#5b5f66", "#c4c7cc", "#0072b2", "#8a5a00"
_WIDTH, _TOP, _GAP, _LINE, _COLUMNS = 1720, 160, 46, 46, 3
# What each measure is called, and which way is better: 1 right, -1 left.
_PANELS: dict[str, tuple[str, int]] = {
    "deletion_blur": ("Deletion by blur, gain", 1),
    "deletion_road": ("Deletion by imputation, gain", 1),
    "insertion_blur": ("Insertion into blur, gain", 1),
    "insertion_road": ("Insertion into imputation, gain", 1),
    "infidelity": ("Infidelity", -1),
    "faithfulness_correlation": ("Faithfulness correlation, r", 1),
    "faithfulness_correlation_times_difference": ("The same, × (image − baseline)", 1),
    "randomisation_signed": ("Random network, signed ρ", -1),
    "randomisation_spearman": ("Random network, ρ of sizes", -1),
    "randomisation_entropy": ("Random network, rise of entropy", 1),
    "smooth_randomisation_signed": ("Random network, smoothed, ρ", -1),
    "random_instance": ("Nearest other lesion, signed ρ", -1),
    "leakage": ("Leakage into other lesions", -1),
    "localisation_mass_absolute": ("Localisation, share of |map|", 1),
    "localisation_rank": ("Localisation, rank accuracy", 1),
    "localisation_pointing": ("Localisation, pointing game", 1),
    "max_sensitivity": ("Max-sensitivity", -1),
}


def sanity_figure(
    rows: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str] | None,
    *,
    controls: Sequence[str] = (),
) -> Figure | None:
    """A PNG with a panel for each measure: a small dot for each lesion, a diamond for the mean and a bar for its 95 % interval over
    patients, on a line for each explainer. Areas are drawn as gains over random orders.

    Controls are hollow and in brackets. A dashed line is the limit of the summary, an arrow tells which way is better.

    Args:
        rows, summary: see `analysis.sanity`. controls: names of explainers that are known to be bad.
        path: PNG to write, through a temporary name; None returns the figure.
    """
    by_measure: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary:
        by_measure.setdefault(row["measure"], []).append(row)
    known = {measure: panel for measure, panel in _PANELS.items() if measure in by_measure}
    # replacements of other names have panels of their own
    for measure, (first, *_) in by_measure.items():
        if "gain" in first and measure not in known and not measure.endswith("_drop"):
            known[measure] = (f"{measure.replace('_', ' ').capitalize()}, gain", 1)
    names = list(dict.fromkeys(row["explainer"] for row in summary))
    columns = min(_COLUMNS, len(known))
    left = min(400, 70 + 11 * max(len(name) + 2 * (name in controls) for name in names))
    high, step = _LINE * len(names), _LINE * len(names) + 112
    width = (_WIDTH - left - 40 - _GAP * (_COLUMNS - 1)) // _COLUMNS
    fig = new_page(_WIDTH, _TOP + step * -(-len(known) // columns), "white")
    write(fig, 40, 56, "Can the explanations be trusted?", 30, _INK, weight="bold")
    lesions, patients = ({(row["case"], row["lesion"]) for row in rows}, {row["patient"] for row in rows})
    facts = f"{count(len(lesions), 'lesion')} of {count(len(patients), 'patient')} · dot: a lesion · diamond: mean"
    facts += " · bar: 95 %, patients resampled" if len(patients) > 1 else " · one patient, so no interval"
    facts += " · hollow, in brackets: a control that knows nothing · dashed: where passing begins"
    write(fig, 40, 92, facts, 18, _DIM, fit=_WIDTH - 80)
    for n, (measure, (title, way)) in enumerate(known.items()):
        line, column = divmod(n, columns)
        x, y = left + column * (width + _GAP), _TOP + line * step
        ax = add_panel(fig, x, y, (width, high), measure)
        _draw(ax, [r for r in rows if r["measure"] == measure], by_measure[measure], names, controls)
        arrow = "better \u2192" if way > 0 else "\u2190 better"
        write(fig, x, y - 16, title, 18, _INK, weight="bold", fit=width - 100)
        write(fig, x + width, y - 16, arrow, 16, _DIM, ha="right")
        if column == 0:
            for place, name in enumerate(names):
                shown = f"({name})" if name in controls else name
                write(fig, left - 16, y + _LINE * (place + 0.5), shown, 17, _CONTROL if name in controls else _INK,
                      ha="right", va="center", fit=left - 40)  # fmt: skip
    style_panels(fig, _RULE)
    for ax in fig.axes:
        ax.grid(visible=False, axis="y")
        ax.grid(axis="x", color="#eceef1", linewidth=0.8)
    return finish(fig, path)


def _draw(
    ax: Axes,
    rows: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    controls: Sequence[str],
) -> None:
    column = "gain" if "gain" in summary[0] else "value"
    mean = "gain" if column == "gain" else "mean"
    limit = summary[0]["limit"]
    if limit is not None:
        ax.axvline(limit, color=_INK, linewidth=points(1.6), linestyle=(0, (5, 3)), zorder=1)
    for place, name in enumerate(names):
        colour = _CONTROL if name in controls else _DOT
        values = np.array([row[column] for row in rows if row["explainer"] == name and row[column] is not None], float)
        row = next(row for row in summary if row["explainer"] == name)
        if not len(values):
            ax.text(0.02, place, "not defined", transform=ax.get_yaxis_transform(), va="center", color=_DIM, family=FONT,
                    fontsize=points(15))  # fmt: skip
            continue
        # golden-ratio steps keep equal values apart, and no random numbers are drawn
        apart = (np.arange(len(values)) * 0.6180339887 + 0.5) % 1 - 0.5
        face, alpha = ("none", 0.75) if name in controls else (colour, 0.45)
        ax.scatter(values, place + 0.5 * apart, s=26, facecolors=face, edgecolors=colour, alpha=alpha, linewidths=points(1.4),
                   zorder=2)  # fmt: skip
        if row[f"{mean}_low"] is not None:
            ax.plot([row[f"{mean}_low"], row[f"{mean}_high"]], [place] * 2, color=_INK, linewidth=points(3), zorder=3)
        ax.plot(row[mean], place, "D", markersize=points(12), markeredgecolor=_INK, markeredgewidth=points(1.8), zorder=4,
                markerfacecolor="white" if name in controls else colour)  # fmt: skip
    ax.set(ylim=(len(names) - 0.5, -0.5), yticks=[])
    ax.margins(x=0.06)
    ax.xaxis.set_major_locator(MaxNLocator(5))
