"""Pictures of an analysis: lesions by group, saliency against distance from the border, and how well errors are detected."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from xaiseg.analysis.errors import foremost
from xaiseg.report.canvas import FONT, add_panel, count, finish, new_page, number, points, style_ticks, write

_INK, _DIM, _RULE = "#17181b", "#5b5f66", "#c4c7cc"
# Colour, marker and dashes, so that groups stay apart without colour vision and in print.
_GROUPS: dict[str, tuple[str, str, Any]] = {
    "TP": ("#0072b2", "o", "-"),
    "FP": ("#d55e00", "s", (0, (5, 1.6))),
    "FN": ("#aa4499", "^", (0, (1, 1.4))),
    "TN": ("#009e73", "v", (0, (5, 1.6, 1, 1.6))),
}
_OTHER: tuple[str, str, Any] = ("#6b6f76", "D", "-")
_LINES: tuple[tuple[str, Any], ...] = (
    *((colour, dashes) for colour, _, dashes in _GROUPS.values()),
    ("#6b6f76", "-"),
    ("#b8860b", (0, (5, 1.6))),
)
_TITLES = {
    "peak": "Peak",
    "minimum": "Minimum",
    "mean_inside": "Mean in the lesion",
    "mean_ring": "Mean in the ring around it",
    "positive_mass": "Sum of positive values",
    "negative_mass": "Sum of negative values",
}
_WIDTH, _LEFT, _RIGHT, _TOP = 1600, 130, 40, 168


def group_figure(
    values: Mapping[str, Mapping[str, np.ndarray]],
    groups: np.ndarray,
    patients: np.ndarray,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    unit: str = "",
    comparisons: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a PNG with a dot for every lesion, by group: a row of panels per measure, a panel per channel on one scale.

    Bars are the median, thin lines the quartiles. Beneath a panel: Cliff's delta and the Holm-adjusted p-value of the clustered
    test for each pair of groups.

    Args:
        values: measure to channel to `(n,)`; NaN is counted in the subtitle and not drawn.
        groups, patients: `(n,)`, names.
        path: PNG to write, through a temporary name.
        title: of the method. unit: of the saliency.
        comparisons: rows of `comparisons.tsv` of this method.
    """
    channels = list(next(iter(values.values())))
    found = set(groups.tolist())
    present = [group for group in _GROUPS if group in found] + sorted(found - set(_GROUPS))
    pairs = max(
        (sum(r["measure"] == m and r["channel"] == c for r in comparisons) for m in values for c in channels), default=0
    )
    height, below = 320, 152 + 24 * -(-pairs // 2)
    gap = 40
    width = (_WIDTH - _LEFT - _RIGHT - gap * (len(channels) - 1)) // len(channels)
    fig = new_page(_WIDTH, _TOP + len(values) * (height + below) + 6, "white")
    write(fig, 40, 58, "Saliency of lesions by group", 30, _INK, weight="bold")
    unknown = max(int((~np.isfinite(v)).sum()) for by_channel in values.values() for v in by_channel.values())
    facts = [title, count(len(groups), "lesion"), count(len(set(patients.tolist())), "patient")]
    facts += ["a dot a lesion, bar: median, thin lines: quartiles"]
    facts += [f"up to {unknown} without a finite value"] * bool(unknown)
    write(fig, 40, 92, " · ".join(filter(None, facts)), 18, _DIM, fit=_WIDTH - 80)
    for row, (measure, by_channel) in enumerate(values.items()):
        y = _TOP + row * (height + below)
        limits = _limits(np.concatenate(list(by_channel.values())))
        for column, channel in enumerate(channels):
            x = _LEFT + column * (width + gap)
            ax = add_panel(fig, x, y, (width, height), f"{measure} {channel}")
            _white(ax, limits, left=column == 0)
            _strips(ax, by_channel[channel], groups, present)
            write(fig, x, y - 14, f"{_TITLES.get(measure, measure)}, {channel}", 18, _INK, weight="bold", fit=width)
            mine = [r for r in comparisons if r["measure"] == measure and r["channel"] == channel]
            for n, comparison in enumerate(mine):
                line, side = divmod(n, 2)
                text = _tested(comparison)
                write(fig, x + side * width / 2, y + height + 106 + 24 * line, text, 15, _DIM, fit=width / 2 - 10)
        write(fig, 40, y + height / 2, unit, 15, _DIM, ha="center", va="center", rotation=90, fit=height)
    finish(fig, path)


def profile_figure(
    rows: Sequence[Mapping[str, Any]],
    channels: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    unit: str = "",
) -> None:
    """Write a PNG of mean saliency against the distance from the lesion's border, a panel per channel on one scale.

    A line per group, with a band for the 95 % interval over patients. Lines end where fewer than three lesions have voxels.

    Args:
        rows: of `profiles.tsv`, of one method.
        channels: names; one panel each.
        path: PNG to write, through a temporary name.
        title: of the method. unit: of the saliency.
    """
    drawn = [row for row in rows if row["lesions"] >= min(3, max(r["lesions"] for r in rows))]
    found = list(dict.fromkeys(row["group"] for row in drawn))
    present = [group for group in _GROUPS if group in found] + sorted(set(found) - set(_GROUPS))
    height, gap, top = 460, 70, _TOP + 34
    width = (_WIDTH - _LEFT - _RIGHT - gap * (len(channels) - 1)) // len(channels)
    fig = new_page(_WIDTH, top + height + 96, "white")
    write(fig, 40, 58, "Saliency against distance from the lesion's border", 30, _INK, weight="bold")
    facts = " · ".join(filter(None, [title, "mean over lesions", "band: 95 % interval over patients"]))
    write(fig, 40, 92, facts, 18, _DIM, fit=_WIDTH - 80)
    lesions = {g: max(row["lesions"] for row in drawn if row["group"] == g) for g in present}
    _legend(fig, 134, [(f"{g}, {count(lesions[g], 'lesion')}", *_colours(g)) for g in present])
    ends = np.array([[row["mean"], row["low"], row["high"]] for row in drawn], float)
    limits = _limits(ends)
    span = (min(row["from_mm"] for row in drawn), max(row["to_mm"] for row in drawn))
    for column, channel in enumerate(channels):
        x = _LEFT + column * (width + gap)
        ax = add_panel(fig, x, top, (width, height), channel)
        _white(ax, limits, left=column == 0)
        ax.set(xlim=span)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.axvline(0, color=_INK, linewidth=points(1.4), linestyle=(0, (2, 2)))
        for group in present:
            mine = sorted(
                (r for r in drawn if r["group"] == group and r["channel"] == channel), key=lambda r: r["from_mm"]
            )
            colour, dashes = _colours(group)
            middle = [(r["from_mm"] + r["to_mm"]) / 2 for r in mine]
            low, high = (np.array([r[end] for r in mine], float) for end in ("low", "high"))
            ax.fill_between(middle, low, high, where=np.isfinite(low).tolist(), color=colour, alpha=0.2, linewidth=0)
            means = [r["mean"] for r in mine]
            marker = _GROUPS.get(group, _OTHER)[1]
            # a mark per bin: between bins without voxels the line knows nothing
            ax.plot(middle, means, color=colour, linestyle=dashes, linewidth=points(2.2), marker=marker,
                    markersize=points(7), zorder=3)  # fmt: skip
        for at, text, side in ((-0.012, "inside", "right"), (0.012, "outside", "left")):
            place = (0 - span[0]) / (span[1] - span[0]) + at
            ax.text(place, 0.97, text, transform=ax.transAxes, ha=side, va="top", color=_DIM, family=FONT,
                    fontsize=points(15))  # fmt: skip
        style_ticks(ax)
        write(fig, x, top - 14, channel, 19, _INK, weight="bold")
        write(fig, x + width / 2, top + height + 66, "distance from the border (mm)", 16, _DIM, ha="center")
    write(fig, 40, top + height / 2, f"saliency, {unit}" if unit else "saliency", 15, _DIM, ha="center", va="center",
          rotation=90, fit=height)  # fmt: skip
    finish(fig, path)


def error_figure(
    rows: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]
) -> None:
    """Write a PNG of ROC and precision-recall curves of TP against FP, and of PPV and F1 before and after rejection.

    Args:
        rows: of `error_detection.tsv`; the models are drawn, and single features of the largest AUROC, see `errors.foremost`.
        scores: of `error_scores.tsv`.
        path: PNG to write, through a temporary name.
    """
    shown = foremost(rows)
    size, top = 440, 200
    fig = new_page(_WIDTH, top + size + 96, "white")
    write(fig, 40, 58, "True or false lesion?", 30, _INK, weight="bold")
    first = shown[0]
    facts = [f"{first['n_tp']} TP and {first['n_fp']} FP of {count(first['patients'], 'patient')}"]
    facts += ["scores of patients not seen in fitting", "95 % intervals over patients"]
    write(fig, 40, 92, " · ".join(facts), 18, _DIM, fit=_WIDTH - 80)
    roc = add_panel(fig, 100, top, (size, size), "ROC")
    precision = add_panel(fig, 100 + size + 110, top, (size, size), "precision-recall")
    for ax, title, across, up in (
        (roc, "ROC", "false lesions kept", "true lesions kept"),
        (precision, "Precision and recall", "true lesions kept", "true among the kept"),
    ):
        _white(ax, (0, 1.005), left=True)
        ax.set(xlim=(0, 1.005))
        x = 100 if ax is roc else 100 + size + 110
        write(fig, x, top - 14, title, 19, _INK, weight="bold")
        write(fig, x + size / 2, top + size + 62, across, 16, _DIM, ha="center")
        write(fig, x - 62, top + size / 2, up, 16, _DIM, ha="center", va="center", rotation=90)
    roc.plot([0, 1], [0, 1], color=_RULE, linewidth=points(1.6), zorder=1)
    rate = first["n_tp"] / (first["n_tp"] + first["n_fp"])
    precision.axhline(rate, color=_RULE, linewidth=points(1.6), zorder=1)
    x = 100 + 2 * size + 180
    write(fig, x, top - 14, "AUROC; PPV and F1 before → after rejection", 19, _INK, weight="bold", fit=_WIDTH - x - 30)
    for n, row in enumerate(shown):
        colour, dashes = _LINES[n % len(_LINES)]
        width = points(3.4 if row["features"] > 1 else 1.8)
        mine = [s for s in scores if s["model"] == row["model"]]
        curve = curves(np.array([s["score"] for s in mine], float), np.array([s["group"] == "TP" for s in mine]))
        style: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": width, "zorder": 3 - n / 10}
        roc.plot(curve[0], curve[1], **style)
        precision.plot(curve[1][1:], curve[2][1:], **style)
        y = top + 20 + n * 72
        line = Line2D(np.array([x, x + 46]) / fig.bbox.width, [1 - (y - 6) / fig.bbox.height] * 2, **style)
        fig.add_artist(line)
        write(fig, x + 58, y, row["model"].replace("_", " "), 17, _INK, weight="bold", fit=_WIDTH - x - 90)
        text = f"{_two(row['auroc'])} ({_two(row['auroc_low'])} to {_two(row['auroc_high'])})"
        write(fig, x + 58, y + 22, f"AUROC {text}", 16, _DIM)
        ppv, f1 = (f"{_two(row[f'{m}_before'])} → {_two(row[f'{m}_after'])}" for m in ("ppv", "f1"))
        write(fig, x + 58, y + 43, f"PPV {ppv} · F1 {f1}", 16, _DIM)
    for ax in (roc, precision):
        style_ticks(ax)
    finish(fig, path)


def curves(scores: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False positive rate, true positive rate and precision when lesions of at least each score are kept, from none to all.

    >>> [part.tolist() for part in curves(np.array([0.9, 0.8, 0.1]), np.array([True, False, True]))]
    [[0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0], [1.0, 1.0, 0.5, 0.6666666666666666]]
    """
    order = np.argsort(-scores, kind="stable")
    last = np.concatenate([np.flatnonzero(np.diff(scores[order])), [len(scores) - 1]])  # equal scores go together
    hits = np.concatenate([[0], true[order].cumsum()[last]])
    kept = np.concatenate([[0], last + 1])
    false = kept - hits
    precision = np.divide(hits, kept, out=np.ones(len(kept)), where=kept > 0)
    return false / max((~true).sum(), 1), hits / max(true.sum(), 1), precision


def _strips(ax: Axes, values: np.ndarray, groups: np.ndarray, present: Sequence[str]) -> None:
    labels = []
    for at, group in enumerate(present):
        colour, marker, _ = _GROUPS.get(group, _OTHER)
        mine = values[(groups == group) & np.isfinite(values)]
        order = np.argsort(mine, kind="stable")
        # golden-ratio steps over the sorted values: neighbours in value land apart, and no random numbers are drawn
        jitter = np.empty(len(mine))
        jitter[order] = (np.arange(len(mine)) * 0.6180339887 + 0.5) % 1 - 0.5
        size = 26 if len(mine) <= 300 else 12 if len(mine) <= 1500 else 5
        ax.scatter(at + 0.62 * jitter, mine, s=size, c=colour, marker=marker, alpha=0.6, linewidths=0)
        if len(mine):
            q1, median, q3 = np.quantile(mine, [0.25, 0.5, 0.75])
            ax.plot([at - 0.4, at + 0.4], [median] * 2, color=_INK, linewidth=points(3))
            for quartile in (q1, q3):
                ax.plot([at - 0.4, at + 0.4], [quartile] * 2, color=_INK, linewidth=points(1))
            labels.append(f"{group}\nn = {len(mine)}\nmedian {number(float(median), plus=False)}")
        else:
            labels.append(f"{group}\nn = 0")
    side = max(0.6, (3 - len(present)) / 2 + 0.1)  # room as for three groups
    ax.set(xlim=(-side, len(present) - 1 + side), xticks=range(len(present)))
    ax.set_xticklabels(labels, parse_math=False)
    for tick, group in zip(ax.get_xticklabels(), present, strict=True):
        tick.set_color(_GROUPS.get(group, _OTHER)[0])
    style_ticks(ax)


def _tested(row: Mapping[str, Any]) -> str:
    pair = f"{row['group_a']}–{row['group_b']}"
    if row.get("cliffs_delta") is None:
        return f"{pair}: too few lesions"
    p = row.get("p_clustered_holm")
    said = "no clustered test" if p is None or not np.isfinite(p) else "p < 0.001" if p < 1e-3 else f"p = {p:.2g}"
    return f"{pair}: δ {number(row['cliffs_delta'], '.2f')}, {said}"


def _limits(values: np.ndarray) -> tuple[float, float]:
    finite = np.concatenate([[0.0], values[np.isfinite(values)].ravel()])
    low, high = float(finite.min()), float(finite.max())
    pad = 0.06 * (high - low or 1.0)
    return low - pad * (low < 0), high + pad * (high > 0 or low == 0)


def _white(ax: Axes, limits: tuple[float, float], *, left: bool) -> None:
    """White axes with a light grid behind, a line at zero, and numbers on the first of a row only."""
    ax.set(facecolor="white", ylim=limits)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y", color="#e6e7ea", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.axhline(0, color="#8b8f96", linewidth=1)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.tick_params(length=0, pad=8, labelcolor="#3c4046", labelleft=left)
    for side, spine in ax.spines.items():
        spine.set(visible=side == "bottom", color=_RULE)


def _legend(fig: Figure, y: float, entries: Sequence[tuple[str, str, Any]]) -> None:
    x = 40.0
    for text, colour, dashes in entries:
        ends = np.array([x, x + 46]) / fig.bbox.width
        line = Line2D(ends, [1 - (y - 6) / fig.bbox.height] * 2, color=colour, linestyle=dashes, linewidth=points(2.6))
        fig.add_artist(line)
        write(fig, x + 56, y, text, 16, "#3c4046")
        x += 56 + fig.texts[-1].get_window_extent().width + 34


def _colours(group: str) -> tuple[str, Any]:
    colour, _, dashes = _GROUPS.get(group, _OTHER)
    return colour, dashes


def _two(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "n/a"
