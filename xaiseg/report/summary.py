"""A whole cohort at a glance: the peak saliency of every lesion, by group and against volume."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from xaiseg.report.canvas import add_panel, count, finish, new_page, number, style_ticks, write

_GROUPS = {"TP": ("#0072b2", "o"), "FP": ("#d55e00", "s"), "FN": ("#aa4499", "^"), "TN": ("#009e73", "v")}
_OTHER_GROUP = ("#6b6f76", "D")


def summary_figure(
    rows: Sequence[Mapping[str, Any]], channels: Sequence[str], path: str | os.PathLike[str], *, unit: str = ""
) -> None:
    """Write a PNG of the peak saliency of every lesion of a cohort: by group, and against lesion volume.

    Args:
        rows: one mapping per lesion with "case", "lesion", "group" (TP, FP, FN, TN, or any other name), "voxels" and
            "peak_CHANNEL" for each channel. A lesion whose peak is NaN is counted in the subtitle, not drawn.
        channels: names; one row of panels each, all on one scale.
        path: PNG to write, through a temporary name.
        unit: of the saliency, added to the axis label.
    """
    groups = np.array([str(row["group"]) for row in rows])
    voxels = np.array([row["voxels"] for row in rows], float)
    peaks = {c: np.array([row[f"peak_{c}"] for row in rows], float) for c in channels}
    present = [g for g in _GROUPS if g in groups] + sorted(set(groups) - set(_GROUPS))

    height, gap, left, top = 420, 128, 120, 150
    fig = new_page(1600, top + len(channels) * (height + gap) - 24, "white")
    write(fig, 40, 58, "Peak saliency per lesion", 30, "#17181b", weight="bold")
    undrawn = sum(not all(np.isfinite(peaks[c][n]) for c in channels) for n in range(len(rows)))
    facts = [count(len(rows), "lesion"), count(len({row["case"] for row in rows}), "scan"), "bar: median"]
    facts += [f"{undrawn} without a finite peak"] * bool(undrawn)
    write(fig, 40, 92, " · ".join(facts), 18, "#5b5f66")

    finite = np.concatenate([[0.0], *(p[np.isfinite(p)] for p in peaks.values())])
    low, high = float(finite.min()), float(finite.max())
    pad = 0.06 * (high - low or 1.0)
    sizes = voxels[voxels > 0]
    span = (sizes.min() / 1.6, sizes.max() * 1.6) if sizes.size else (1.0, 1000.0)
    for row, channel in enumerate(channels):
        y = top + row * (height + gap)
        strip = add_panel(fig, left, y, (640, height), f"{channel} groups")
        scatter = add_panel(fig, left + 700, y, (740, height), f"{channel} volume")
        for ax in (strip, scatter):
            _plain(ax, (low - pad, high + pad))
        labels = []
        for at, group in enumerate(present):
            colour, marker = _GROUPS.get(group, _OTHER_GROUP)
            dots: dict[str, Any] = {"s": 30, "c": colour, "marker": marker, "alpha": 0.65, "linewidths": 0}
            chosen = (groups == group) & np.isfinite(peaks[channel])
            values, order = peaks[channel][chosen], np.argsort(peaks[channel][chosen], kind="stable")
            # golden-ratio steps over the sorted values: neighbours in value land apart, and no random numbers are drawn
            jitter = np.empty(len(values))
            jitter[order] = (np.arange(len(values)) * 0.6180339887 + 0.5) % 1 - 0.5
            strip.scatter(at + 0.5 * jitter, values, **dots)
            scatter.scatter(voxels[chosen], values, **dots)
            note = [group, f"n = {len(values)}"]
            if len(values):
                note.append(f"median {number(float(np.median(values)), plus=False)}")
                strip.plot([at - 0.36, at + 0.36], [np.median(values)] * 2, color="#17181b", linewidth=1.8)
            labels.append("\n".join(note))
        side = max(0.6, (3 - len(present)) / 2 + 0.1)  # room as for three groups
        strip.set(xlim=(-side, len(present) - 1 + side), xticks=range(len(present)))
        strip.set_xticklabels(labels, parse_math=False)
        for tick, group in zip(strip.get_xticklabels(), present, strict=True):
            tick.set_color(_GROUPS.get(group, _OTHER_GROUP)[0])
        scatter.set(xscale="log", xlim=span)
        _round_ticks(scatter, span)
        scatter.set_yticklabels([])
        style_ticks(strip)
        style_ticks(scatter)
        write(fig, left + 700 + 370, y + height + 62, "lesion volume (voxels)", 16, "#5b5f66", ha="center")
        write(fig, left, y - 14, channel, 19, "#17181b", weight="bold")
        write(fig, 46, y + height / 2, "peak" + f", {unit}" * bool(unit), 16, "#5b5f66", ha="center",
               va="center", rotation=90, fit=height)  # fmt: skip
    if not finite.size > 1:
        write(fig, 800, top + height / 3, "no lesion with a finite peak", 20, "#5b5f66", ha="center")
    finish(fig, path)


def _plain(ax: Axes, limits: tuple[float, float]) -> None:
    """White axes with a grid behind the dots and a line at zero."""
    ax.set(facecolor="white", ylim=limits)
    ax.yaxis.set_major_locator(MaxNLocator(6))
    ax.grid(axis="y", color="#e6e7ea", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.axhline(0, color="#8b8f96", linewidth=1)
    ax.tick_params(length=0, pad=8, labelcolor="#3c4046")
    for side, spine in ax.spines.items():
        spine.set(visible=side == "bottom", color="#c4c7cc")


def _round_ticks(ax: Axes, span: tuple[float, float]) -> None:
    """Ticks at 1, 2, 5, 10, ... of a logarithmic axis, or at powers of ten alone where that would be many."""
    ticks = [m * 10**k for k in range(12) for m in (1, 2, 5) if span[0] <= m * 10**k <= span[1]]
    if len(ticks) > 7:
        ticks = [t for t in ticks if str(t)[0] == "1"]
    ax.set_xticks(ticks, labels=[f"{t:,}" for t in ticks])
    ax.set_xticks([], minor=True)
