"""Pictures of two experiments: how much of its surroundings a lesion needs, and how much contrast."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xaiseg.analysis.context import DETECTED, ContextCurve
from xaiseg.report.canvas import FONT, add_panel, count, finish, new_page, number, points, style_panels, write

# Hues and lightnesses that stay apart without colour vision, dashes that do without any colour.
_STYLES: tuple[tuple[str, Any], ...] = (
    ("#0072b2", "-"),
    ("#d55e00", (0, (4, 1.6))),
    ("#009e73", (0, (1, 1.4))),
    ("#aa4499", (0, (5, 1.6, 1, 1.6))),
)
_INK, _DIM, _RULE, _FAINT = "#17181b", "#5b5f66", "#c4c7cc", "#9aa0a8"
_WIDE, _HIGH, _LEFT, _TOP, _GAP = 620, 420, 120, 170, 150
_BELOW = _HIGH + 150  # from a row of panels to the next
_TICKS = 10  # contrasts that are named on the axis, or else round numbers
_FAINT_LINES = 300  # of single lesions; more would be a grey surface


def context_figure(
    curves: Sequence[ContextCurve],
    summary: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str] | None,
) -> Figure | None:
    """A PNG with two panels: mean lesion probability, and the share of lesions detected, against the distance that is kept.

    Grey: single lesions, evenly spaced ones where there are more than 300. Blue: all, with 95 % intervals over patients. Dots at
    the right: the untouched image. Triangles on the axis: from where on 50 and 90 % of lesions are detected, or the probability is
    95 % of that in the untouched image.

    Args:
        curves: of the lesions, and `summary`: of `context_summary`, of these.
        path: PNG to write, through a temporary name; None returns the figure.
    """
    by_measure: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary:
        by_measure.setdefault(row["measure"], []).append(row)
    counted = summary[0]
    fig = new_page(1560, _TOP + _HIGH + 110, "white")
    write(fig, 40, 58, "What lesions need of their surroundings", 30, _INK, weight="bold")
    facts = f"{count(counted['lesions'], 'lesion')} of {count(counted['patients'], 'patient')}"
    facts += " · all beyond the distance is set to the background · bands: 95 %, patients resampled"
    write(fig, 40, 92, facts, 18, _DIM, fit=1480)
    score = _panel(fig, 0, "Mean lesion probability", "tissue kept around the lesion (mm)", "probability")
    found = _panel(fig, 1, "Lesions detected", "tissue kept around the lesion (mm)", "share of lesions")
    chosen = np.unique(np.linspace(0, len(curves) - 1, min(len(curves), _FAINT_LINES)).round().astype(int))
    steps = curves[0].distance_mm[:-1]
    right = _right(steps)
    for n in chosen:
        score.plot(steps, curves[n].mean_probability[:-1], color=_FAINT, linewidth=points(1), alpha=0.45, zorder=1)
        score.plot(right, curves[n].mean_probability[-1], ".", color=_FAINT, alpha=0.45, zorder=1)
    _band(score, by_measure["mean_probability"])
    _band(found, by_measure["detection_rate"])
    _mark(score, by_measure["level_off_mm"][0], "95 % of the untouched image's", 0)
    for n, at in enumerate(DETECTED):
        _mark(found, by_measure[f"detected_{100 * at:g}_mm"][0], f"{100 * at:g} % detected", n)
        found.axhline(at, color=_RULE, linewidth=points(1.4), linestyle=(0, (5, 3)), zorder=0.5)
    for ax in (score, found):
        room = 0.03 * (right - steps[0])
        ax.set(xlim=(steps[0] - room, right + room), ylim=(-0.02, 1.04))
        ticks = [t for t in MaxNLocator(6).tick_values(steps[0], steps[-1]) if steps[0] <= t <= steps[-1]]
        ax.set_xticks([*ticks, right], [*(f"{t:g}" for t in ticks), "all"], parse_math=False)
    style_panels(fig, _RULE)
    return finish(fig, path)


def insertion_figure(
    series: Mapping[str, tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]],
    axis: str,
    channels: Sequence[str],
    path: str | os.PathLike[str] | None,
    *,
    unit: str,
    saliency_unit: str = "",
    sizes: tuple[str, Mapping[str, Sequence[Mapping[str, Any]]]] | None = None,
) -> Figure | None:
    """A PNG: the share of inserted lesions detected against contrast, and, where rows have it, their peak saliency by channel.

    Args:
        series: by name, such as "FLAIR alone", rows of `insertion_rows` and their `insertion_summary` over `axis`; four at most.
        axis: the column of contrasts. unit: of it. channels: of the saliency; a panel each.
        sizes: name of a series, and by size its `insertion_summary`, for a panel of their own; the first four are drawn.
        path: PNG to write, through a temporary name; None returns the figure.
    Raises ValueError for no series or more than four.
    """
    if not 1 <= len(series) <= len(_STYLES):
        raise ValueError(f"{len(series)} series: between 1 and {len(_STYLES)} can be told apart")
    peaks = [f"saliency_{name}_peak" for name in channels]
    shown = [
        (name, column)
        for name, column in zip(channels, peaks, strict=True)
        if any(column in row for rows, _ in series.values() for row in rows)
    ]
    first = 1 + (sizes is not None)
    panels = first + len(shown)
    across, down = min(panels, 2), (panels + 1) // 2
    fig = new_page(2 * _LEFT + _WIDE + (across - 1) * (_WIDE + _GAP), _TOP + down * _BELOW - 40, "white")
    write(fig, 40, 58, "Synthetic lesions", 30, _INK, weight="bold")
    counted = next(iter(series.values()))[1][0]
    facts = f"{count(counted['lesions'], 'lesion')} in scans of {count(counted['patients'], 'patient')}"
    facts += " · bands: 95 %, patients resampled" if counted["patients"] > 1 else " · one patient: no bands"
    write(fig, 40, 92, facts, 18, _DIM, fit=fig.bbox.width - 80)
    levels = sorted({row[axis] for rows, _ in series.values() for row in rows})
    rates = {"Lesions detected": {name: summary for name, (_, summary) in series.items()}}
    if sizes is not None:
        rates[f"Lesions detected by size, {sizes[0]}"] = dict(list(sizes[1].items())[: len(_STYLES)])
    for place, (title, summaries) in enumerate(rates.items()):
        ax = _panel(fig, place, title, f"contrast ({unit})", "share of lesions")
        for n, (name, summary) in enumerate(summaries.items()):
            own = [row for row in summary if row["measure"] == "detection_rate"]
            _band(ax, own, n, axis, name, width=_width(n, len(summaries)))
        ax.set(ylim=(-0.02, 1.04))
        for at in DETECTED:
            ax.axhline(at, color=_RULE, linewidth=points(1.4), linestyle=(0, (5, 3)), zorder=0.5)
        _legend(ax)
    for place, (name, column) in enumerate(shown, start=first):
        ax = _panel(fig, place, f"Peak saliency, {name}", f"contrast ({unit})", saliency_unit)
        for n, (one, (rows, _)) in enumerate(series.items()):
            by_level = [[row[column] for row in rows if row[axis] == level] for level in levels]
            colour, dashes = _STYLES[n]
            # series side by side, so that none hides another
            shift = (n - (len(series) - 1) / 2) * 0.06 * float(np.diff(levels).min(initial=1.0))
            for level, values in zip(levels, by_level, strict=True):
                ax.plot(
                    [level + shift] * len(values), values, ".", color=colour, markersize=points(7), alpha=0.4, zorder=1
                )
            mean = [np.mean(values) for values in by_level]
            ax.plot(levels, mean, color=colour, linestyle=dashes, linewidth=_width(n, len(series)), zorder=3, label=one)
        ax.axhline(0, color=_RULE, linewidth=points(1.4), zorder=0.5)
        _legend(ax)
    for ax in fig.axes:
        if len(levels) <= _TICKS:
            ax.set_xticks(levels, [f"{level:g}" for level in levels])
    style_panels(fig, _RULE)
    return finish(fig, path)


def _width(n: int, count: int) -> float:
    """Of the line of a series: one that is drawn over another lets it be seen at its sides."""
    return points(2.8 + 1.6 * (count - 1 - n))


def _legend(ax: Axes) -> None:
    """Where it hides least; dashes long enough to be told apart."""
    ax.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", handlelength=3.2,
              prop={"family": FONT, "size": points(15)}, labelcolor=_INK).set_zorder(6)  # fmt: skip


def _panel(fig: Figure, place: int, title: str, below: str, beside: str) -> Axes:
    """A panel; two stand beside each other."""
    x, y = _LEFT + place % 2 * (_WIDE + _GAP), _TOP + place // 2 * _BELOW
    ax = add_panel(fig, x, y, (_WIDE, _HIGH), title)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.yaxis.set_major_locator(MaxNLocator(6))
    write(fig, x, y - 18, title, 19, _INK, weight="bold", fit=_WIDE)
    write(fig, x + _WIDE / 2, y + _HIGH + 68, below, 16, _DIM, ha="center")
    write(fig, x - 78, y + _HIGH / 2, beside, 16, _DIM, ha="center", va="center", rotation=90, fit=_HIGH)
    return ax


def _right(steps: np.ndarray) -> float:
    """Where on the axis the untouched image stands: apart from the last step."""
    return float(steps[-1] + 0.08 * max(steps[-1] - steps[0], 1.0))


def _band(
    ax: Axes,
    rows: Sequence[Mapping[str, Any]],
    style: int = 0,
    axis: str = "distance_mm",
    label: str | None = None,
    width: float | None = None,
) -> None:
    """The line of the estimates in their band; an infinite place, the untouched image, as a dot with a bar."""
    colour, dashes = _STYLES[style]
    place, *values = (np.array([row[name] for row in rows], float) for name in (axis, "estimate", "low", "high"))
    finite = np.isfinite(place)
    estimate, low, high = (v[finite] for v in values)
    ax.fill_between(place[finite], low, high, color=colour, alpha=0.2, linewidth=0, zorder=2)
    line = {"color": colour, "linestyle": dashes, "linewidth": points(2.8) if width is None else width}
    ax.plot(place[finite], estimate, **line, zorder=3, label=label)
    if not finite.all():
        right, (estimate, low, high) = _right(place[finite]), (v[~finite] for v in values)
        ax.vlines(right, low, high, color=colour, linewidth=points(2.4), alpha=0.5, zorder=2)
        ax.plot(right, estimate, "o", color=colour, markersize=points(9), zorder=3)


def _mark(ax: Axes, row: Mapping[str, Any], name: str, line: int) -> None:
    """A triangle on the axis at a place, and the place with its interval in words; only the words where it is not reached."""
    estimate, low, high = (row[end] for end in ("estimate", "low", "high"))
    text = f"{name}: not reached" if np.isnan(estimate) else f"{name}: {number(estimate, plus=False)} mm"
    if not np.isnan(estimate) and not np.isnan(low):
        text += f" ({number(low, plus=False)} to {'beyond' if np.isinf(high) else number(high, plus=False)})"
    if not np.isnan(estimate):
        ax.plot(estimate, 0, "^", color=_INK, markersize=points(12), transform=ax.get_xaxis_transform(), zorder=5,
                clip_on=False)  # fmt: skip
    ax.text(0.97, 0.14 - 0.075 * line, text, transform=ax.transAxes, ha="right", va="center", color=_INK, family=FONT,
            fontsize=points(16), parse_math=False, zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2, "alpha": 0.8})  # fmt: skip
