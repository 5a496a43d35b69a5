"""An evaluation at a glance: volumes against the reference, nDSC of every scan, and which sizes of lesions are found."""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.special import ndtri

from xaiseg.report.canvas import FONT, add_panel, count, finish, new_page, number, points, style_panels, write

_INK, _DIM, _RULE, _DOT = "#17181b", "#5b5f66", "#c4c7cc", "#0072b2"
_DOTS: dict[str, Any] = {"s": 44, "c": _DOT, "marker": "o", "alpha": 0.75, "linewidths": 0}
# Three classes a decade, in mm³: 3 mm³ are three voxels of a usual scan, 10000 a confluent lesion.
_EDGES = (0, 3, 10, 30, 100, 300, 1000, 3000, 10000, np.inf)
_WIDE, _HIGH, _LEFT, _TOP, _GAP_X, _GAP_Y = 620, 400, 130, 170, 170, 170


def evaluation_figure(
    rows: Sequence[Mapping[str, Any]],
    lesions: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
) -> None:
    """Write a PNG with four panels: predicted against reference volume, Bland-Altman, nDSC per scan, detection by volume.

    Bars of the detection rate are Wilson's 95 % intervals, as if lesions were independent of each other.

    Args:
        rows: of `cases.tsv`. lesions: of `lesions.tsv`. summary: of `summary.tsv`; see `xaiseg.metrics.evaluation`.
        path: PNG to write, through a temporary name.
    """
    found = {(row["measure"], row["over"]): row for row in summary}
    predicted = np.array([row["predicted_volume_ml"] for row in rows], float)
    reference = np.array([row["reference_volume_ml"] for row in rows], float)
    fig = new_page(1600, _TOP + 2 * _HIGH + _GAP_Y + 110, "white")
    patients = len({row["patient"] for row in rows})
    write(fig, 40, 58, "Segmentation against the reference", 30, _INK, weight="bold")
    facts = f"{count(len(rows), 'scan')} · {count(patients, 'patient')} · 95 % intervals: of the mean over patients "
    facts += "(bootstrap), of lesions found after Wilson"
    write(fig, 40, 92, facts, 18, _DIM)

    def panel(column: int, line: int, title: str, below: str, beside: str) -> Axes:
        x, y = _LEFT + column * (_WIDE + _GAP_X), _TOP + line * (_HIGH + _GAP_Y)
        ax = add_panel(fig, x, y, (_WIDE, _HIGH), title)
        write(fig, x, y - 18, title, 19, _INK, weight="bold")
        write(fig, x + _WIDE / 2, y + _HIGH + 68, below, 16, _DIM, ha="center")
        write(fig, x - 84, y + _HIGH / 2, beside, 16, _DIM, ha="center", va="center", rotation=90, fit=_HIGH)
        return ax

    volumes = panel(0, 0, "Lesion volume", "reference (mL)", "predicted (mL)")
    _volumes(volumes, predicted, reference, found["volume_pearson", "cohort"]["estimate"])
    limits = {name: found[f"volume_{name}", "cohort"]["estimate"] for name in ("bias", "lower_limit", "upper_limit")}
    differences = panel(1, 0, "Bland-Altman", "mean of predicted and reference (mL)", "predicted − reference (mL)")
    _differences(differences, predicted, reference, limits)
    _scores(panel(0, 1, "nDSC of each scan", "scans, best first", "nDSC"), rows, found["ndsc", "scans"])
    _detection(panel(1, 1, "Reference lesions found", "lesion volume (mm³)", "detection rate"), lesions)
    style_panels(fig, _RULE)
    finish(fig, path)


def _volumes(ax: Axes, predicted: np.ndarray, reference: np.ndarray, correlation: float) -> None:
    high = 1.06 * float(max(predicted.max(), reference.max())) or 1.0
    ax.plot([0, high], [0, high], color=_INK, linewidth=points(1.6), linestyle=(0, (5, 3)), zorder=1)
    ax.scatter(reference, predicted, zorder=2, clip_on=False, **_DOTS)
    ax.set(xlim=(0, high), ylim=(0, high))
    _round_ticks(ax)
    _note(ax, 0.03, 0.94, "dashed: identity")
    if np.isfinite(correlation):
        _note(ax, 0.03, 0.87, f"correlation {number(correlation, plus=False)}")


def _differences(ax: Axes, predicted: np.ndarray, reference: np.ndarray, limits: Mapping[str, float]) -> None:
    means, apart = (predicted + reference) / 2, predicted - reference
    lines = [value for value in limits.values() if np.isfinite(value)]
    low, high = min([0.0, *apart, *lines]), max([0.0, *apart, *lines])
    pad = 0.16 * (high - low or 1.0)
    right = 1.4 * float(means.max()) or 1.0  # beyond the dots there is room for the texts
    ax.set(xlim=(0, right), ylim=(low - pad, high + pad))
    _round_ticks(ax)
    ax.axhline(0, color=_RULE, linewidth=points(1.4), zorder=0.5)
    texts = {"bias": "bias", "lower_limit": "lower limit", "upper_limit": "upper limit"}
    for name, value in limits.items():
        if np.isfinite(value):
            dashes: Any = "-" if name == "bias" else (0, (5, 3))
            ax.axhline(value, color=_INK, linewidth=points(1.6), linestyle=dashes, zorder=1)
            below = name == "lower_limit"
            ax.annotate(f"{texts[name]} {number(value, plus=False)}", (right, value), (-6, -5 if below else 5),
                        textcoords="offset points", ha="right", va="top" if below else "bottom", color=_INK, family=FONT,
                        fontsize=points(15), parse_math=False)  # fmt: skip
    ax.scatter(means, apart, zorder=2, clip_on=False, **_DOTS)


def _scores(ax: Axes, rows: Sequence[Mapping[str, Any]], mean: Mapping[str, Any]) -> None:
    order = sorted(rows, key=lambda row: -row["ndsc"])
    if np.isfinite(mean["low"]):
        ax.axhspan(mean["low"], mean["high"], color="#e3e5e9", zorder=0.4, linewidth=0)
    ax.axhline(mean["estimate"], color=_INK, linewidth=points(1.6), linestyle=(0, (5, 3)), zorder=1)
    places = np.arange(len(order))
    ax.vlines(places, 0, [row["ndsc"] for row in order], color=_RULE, linewidth=points(1.4), zorder=0.8)
    ax.scatter(places, [row["ndsc"] for row in order], zorder=2, clip_on=False, **_DOTS)
    side = max(0.7, (4 - len(order)) / 2)
    ax.set(xlim=(-side, len(order) - 1 + side), ylim=(0, 1.16))
    ax.set_yticks(np.linspace(0, 1, 6))
    longest = max(len(str(row["case"])) for row in order)
    names = longest * 11 * len(order) < _WIDE  # pixels a letter; more would lie on each other
    ax.set_xticks(places if names else [])
    ax.set_xticklabels([str(row["case"]) for row in order] if names else [], parse_math=False)
    band = f" ({mean['low']:.2f} to {mean['high']:.2f}, grey)" if np.isfinite(mean["low"]) else ""
    _note(ax, 0.03, 0.94, f"dashed: mean {mean['estimate']:.2f}{band}")


def _detection(ax: Axes, lesions: Sequence[Mapping[str, Any]]) -> None:
    members = [lesion for lesion in lesions if lesion["mask"] == "reference"]
    size = np.array([lesion["volume_mm3"] for lesion in members], float)
    hit = np.array([lesion["group"] == "TP" for lesion in members], bool)
    bins = [(size >= low) & (size < high) for low, high in pairwise(_EDGES)]
    filled = [n for n, chosen in enumerate(bins) if chosen.any()]
    ax.set(ylim=(0, 1.16))
    ax.set_yticks(np.linspace(0, 1, 6))
    if not filled:
        _note(ax, 0.5, 0.5, "no reference lesion", ha="center")
        return
    first, last = filled[0], filled[-1]
    for at in filled:
        hits, n = int(hit[bins[at]].sum()), int(bins[at].sum())
        ax.plot([at, at], wilson(hits, n), color=_DOT, linewidth=points(2.6), zorder=1, solid_capstyle="butt")
        ax.scatter([at], [hits / n], zorder=2, clip_on=False, **_DOTS | {"s": 70, "alpha": 1})
        ax.annotate(f"n={n}", (at, 1.09), ha="center", va="center", color=_INK, family=FONT, fontsize=points(14),
                    parse_math=False)  # fmt: skip
    # Ticks at the edges of classes, which are narrower than the names of classes would be.
    side = max(0.0, (3 - (last - first)) / 2)
    ax.set(xlim=(first - 0.5 - side, last + 0.5 + side))
    ax.set_xticks(np.arange(first, last + 2) - 0.5)
    edges = _EDGES[first : last + 2]
    ax.set_xticklabels(["∞" if edge == np.inf else f"{edge:g}" for edge in edges], parse_math=False)


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate `hits / n` (1927), which stays within 0 and 1.

    >>> [round(end, 4) for end in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    z = float(ndtri((1 + level) / 2))
    middle, half = hits / n + z * z / (2 * n), z * (hits * (n - hits) / n**3 + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def _round_ticks(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.yaxis.set_major_locator(MaxNLocator(6))


def _note(ax: Axes, x: float, y: float, text: str, ha: str = "left") -> None:
    ax.text(x, y, text, transform=ax.transAxes, ha=ha, va="center", color=_INK, family=FONT, fontsize=points(15),
            parse_math=False, zorder=3)  # fmt: skip
