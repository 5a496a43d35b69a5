"""Picture of what filling a lesion changes: its own probability, and what becomes of its neighbours by their distance."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xaiseg.report.canvas import add_panel, count, finish, new_page, points, style_panels, write

_INK, _DIM, _RULE = "#17181b", "#5b5f66", "#c4c7cc"
_FILLED, _NEIGHBOUR = "#d55e00", "#0072b2"
_WIDE, _HIGH, _LEFT, _TOP, _GAP = 520, 420, 120, 170, 140


def counterfactual_figure(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str] | None) -> Figure | None:
    """A PNG with panels: probability of each filled lesion before and after; change of the neighbours' probability, and change of
    saliency where the rows have it, against the distance from the filled lesion.

    Args:
        rows: of `counterfactual_rows`, with a patient.
        path: PNG to write, through a temporary name; None returns the figure.
    """
    filled, near = ([row for row in rows if row["role"] == role] for role in ("filled", "neighbour"))
    with_saliency = "saliency_change" in rows[0]
    panels = 2 + with_saliency
    fig = new_page(2 * _LEFT - 40 + panels * _WIDE + (panels - 1) * _GAP, _TOP + _HIGH + 110, "white")
    write(fig, 40, 58, "Scans without one of their lesions", 30, _INK, weight="bold")
    facts = f"{count(len(filled), 'lesion')} of {count(len({row['patient'] for row in rows}), 'patient')} filled one at a time · "
    facts += f"{count(len(near), 'neighbour')}"
    write(fig, 40, 92, facts, 18, _DIM, fit=fig.bbox.width - 80)

    pairs = np.array([[row["before_mean_probability"], row["after_mean_probability"]] for row in filled], float)
    ax = _panel(fig, 0, "Filled lesions", "", "mean lesion probability")
    for pair in pairs:
        ax.plot([0, 1], pair, "-o", color=_FILLED, alpha=0.45, linewidth=points(1.6), markersize=points(7), zorder=2)
    ax.plot([0, 1], pairs.mean(0), "-D", color=_INK, linewidth=points(3), markersize=points(10), zorder=4)
    ax.set(xlim=(-0.3, 1.3), ylim=(-0.03, 1.03))
    ax.set_xticks([0, 1], [f"before: {pairs[:, 0].mean():.2f}", f"after: {pairs[:, 1].mean():.2f}"])

    distance = np.array([row["distance_mm"] for row in near], float)
    ax = _panel(fig, 1, "Neighbours", "distance from the filled lesion (mm)", "change of mean probability")
    change = np.array([row["after_mean_probability"] - row["before_mean_probability"] for row in near], float)
    ax.axhline(0, color=_RULE, linewidth=points(1.6), zorder=0.5)
    ax.plot(distance, change, "o", color=_NEIGHBOUR, alpha=0.6, markersize=points(9), zorder=3)
    span = max(0.05, 1.15 * float(np.abs(change).max(initial=0)))
    ax.set(ylim=(-span, span), xlim=(0, 1.05 * max(float(distance.max(initial=0)), 5.0)))
    if not near:
        _none(ax)
    if with_saliency:
        ax = _panel(fig, 2, "Saliency maps", "distance from the filled lesion (mm)", "‖after − before‖ / ‖before‖")
        for group, colour, mark in ((filled, _FILLED, "s"), (near, _NEIGHBOUR, "o")):
            name = "filled" if group is filled else "neighbours"
            at, values = ([row[column] for row in group] for column in ("distance_mm", "saliency_change"))
            ax.plot(
                at, values, mark, color=colour, alpha=0.6, markersize=points(9), zorder=3, label=name, clip_on=False
            )
        ax.set(xlim=(0, 1.05 * max(float(distance.max(initial=0)), 5.0)))
        ax.set_ylim(bottom=0)
        ax.legend(loc="upper right", frameon=False, prop={"family": "DejaVu Sans", "size": points(15)}, labelcolor=_INK)
    style_panels(fig, _RULE)
    return finish(fig, path)


def _panel(fig: Figure, column: int, title: str, below: str, beside: str) -> Axes:
    x = _LEFT + column * (_WIDE + _GAP)
    ax = add_panel(fig, x, _TOP, (_WIDE, _HIGH), title)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.yaxis.set_major_locator(MaxNLocator(6))
    write(fig, x, _TOP - 18, title, 19, _INK, weight="bold", fit=_WIDE)
    write(fig, x + _WIDE / 2, _TOP + _HIGH + 68, below, 16, _DIM, ha="center")
    write(fig, x - 84, _TOP + _HIGH / 2, beside, 16, _DIM, ha="center", va="center", rotation=90, fit=_HIGH)
    return ax


def _none(ax: Axes) -> None:
    ax.text(0.5, 0.6, "no lesion that near", transform=ax.transAxes, ha="center", color=_DIM, fontsize=points(17),
            family="DejaVu Sans")  # fmt: skip
