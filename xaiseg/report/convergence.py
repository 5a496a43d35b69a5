"""Whether enough noise samples were taken: the peak of every lesion as its samples came in, with its confidence band."""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from xaiseg._types import Info
from xaiseg.report.canvas import FONT, add_panel, finish, new_page, number, points, style_ticks, write
from xaiseg.saliency.convergence import recommended_samples, relative_error

# Hues and lightnesses that stay apart without colour vision, and dashes that do without any colour.
_STYLES: tuple[tuple[str, Any], ...] = (
    ("#0072b2", "-"),
    ("#d55e00", (0, (4, 1.6))),
    ("#009e73", (0, (1, 1.4))),
    ("#aa4499", (0, (5, 1.6, 1, 1.6))),
)
_INK, _DIM, _BAR = "#17181b", "#5b5f66", "#d9dce2"
_BAND = 1.959964  # standard errors on each side of a mean that hold it with 95 %
_HIGHEST = 1.5  # of the final peak; the first samples may lie far above and would flatten all the rest
_WIDTH, _LEFT, _RIGHT, _TOP, _BETWEEN = 1600, 120, 40, 196, 34


class _Lesion(NamedTuple):
    """What a panel shows. peak, error: `(N, C)`. needed: samples for the tolerance. met: from which sample on it holds, if any."""

    label: str
    peak: np.ndarray
    error: np.ndarray
    needed: int
    met: int | None


def convergence_figure(
    infos: Sequence[Info],
    labels: Sequence[str],
    channels: Sequence[str],
    path: str | os.PathLike[str],
    *,
    unit: str,
    tolerance: float,
) -> None:
    """Write a PNG with a panel per lesion: peak saliency against noise samples, with a 95 % band (±1.96 standard errors).

    All panels share one scale, per cent of the lesion's own largest peak `P` at the end, which is also what the tolerance is
    a fraction of; the final peaks are written beside their lines in `unit`. The first samples may lie above 150 %, where the
    panels end. A grey bar of `±1.96 · tolerance · P` lies behind each line: the tolerance is met when no band is wider than
    its bar, and a mark on the axis shows since when. The heading of a panel tells since when, or how many samples the lesion
    needs; the subtitle how many all of them do.

    Args:
        infos: of the lesions, from an explanation with `noisy`. Those without a course of finite peaks that are not all zero
            are counted in the subtitle, not drawn.
        labels: one per lesion, for example "lesion 3".
        channels: names of the map's channels, four at most.
        path: PNG to write, through a temporary name.
        unit: of the saliency.
        tolerance: wanted standard error at each peak, as a fraction of `P`.

    Raises ValueError where labels or channels do not fit the infos, or the tolerance is not positive.

    >>> import math, pathlib, tempfile
    >>> from xaiseg._types import Course, Info
    >>> course = Course(peak=((1.2,), (1.0,), (1.1,)), standard_error=((math.nan,), (0.2,), (0.1,)))
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "convergence.png"
    >>> convergence_figure([Info(1, 1, 3, course=course)], ["lesion 1"], ["FLAIR"], path, unit="Δlogit", tolerance=0.05)
    >>> path.is_file()
    True
    """
    if len(infos) != len(labels):
        raise ValueError(f"{len(infos)} infos but {len(labels)} labels: expected one of each per lesion")
    if not 1 <= len(channels) <= len(_STYLES):
        raise ValueError(f"{len(channels)} channels: between 1 and {len(_STYLES)} can be told apart in one panel")
    found = [_lesion(*pair, channels, tolerance) for pair in zip(infos, labels, strict=True)]
    lesions = [lesion for lesion in found if lesion is not None]

    columns, height, size = _grid(len(lesions))
    cell = (_WIDTH - _LEFT - _RIGHT + _BETWEEN) // columns
    beside, gap = round((5.4 + (columns <= 2) * 5) * size), 2 * size + 22
    rows = math.ceil(len(lesions) / columns) or 1
    fig = new_page(_WIDTH, _TOP + rows * (height + gap) - gap + 84, "white")
    write(fig, 40, 58, "Peak saliency against noise samples", 30, _INK, weight="bold")
    write(fig, 40, 92, _subtitle(len(infos), lesions, tolerance), 18, _DIM, fit=_WIDTH - 80)
    if lesions:
        _legend(fig, channels, tolerance, unit)
    else:
        write(fig, _WIDTH / 2, _TOP + height / 3, "no lesion with a course of its peak", 20, _DIM, ha="center")
    limits, last = _limits(lesions), max((len(lesion.peak) for lesion in lesions), default=1)
    for n, lesion in enumerate(lesions):
        row, column = divmod(n, columns)
        x, y = _LEFT + column * cell, _TOP + row * (height + gap)
        ax = add_panel(fig, x, y, (cell - beside - _BETWEEN, height), f"lesion {n}")
        ax.set(facecolor="white", xlim=(0, last * 1.03), ylim=limits)
        _axes(ax, left=column == 0, bottom=n + columns >= len(lesions), ticks=4 if columns > 2 else 8)
        _curves(ax, lesion, tolerance)
        _values(ax, lesion, channels if columns <= 2 else None, size)
        _heading(fig, x, y - 0.55 * size, cell - _BETWEEN, lesion, size)
    if lesions:
        middle = _TOP + (rows * (height + gap) - gap) / 2
        write(fig, 38, middle, "peak, % of the lesion's largest", 16, _DIM, ha="center", va="center", rotation=90,
              fit=fig.bbox.height - 90)  # fmt: skip
        write(fig, _LEFT, fig.bbox.height - 18, "noise samples", 16, _DIM)
    finish(fig, path)


def _lesion(info: Info, label: str, channels: Sequence[str], tolerance: float) -> _Lesion | None:
    """What is drawn of a lesion; None where it has no course, or one that does not end in a number above or below zero."""
    if info.course is None or len(info.course.peak) < 2:
        return None
    peak, error = (np.array(x, float) for x in info.course)
    if peak.shape[1] != len(channels):
        raise ValueError(
            f"{label} has peaks of {peak.shape[1]} channels, expected {len(channels)}: {', '.join(channels)}"
        )
    needed, scale = recommended_samples(info, tolerance), np.abs(peak[-1]).max()
    if needed is None or not scale > 0:
        return None
    holds = [relative_error(*point) <= tolerance for point in zip(peak.tolist(), error.tolist(), strict=True)]
    since = len(holds) - next((n for n, held in enumerate(reversed(holds)) if not held), len(holds))
    return _Lesion(label, peak, error, needed, since + 1 if holds[-1] else None)


def _grid(count: int) -> tuple[int, int, int]:
    """Columns, height of a panel and size of its text, in pixels."""
    for most, columns, height, size in ((1, 1, 420, 20), (4, 2, 300, 18), (9, 3, 220, 17), (16, 4, 180, 16)):
        if count <= most:
            return columns, height, size
    return 6, 116, 15


def _subtitle(count: int, lesions: Sequence[_Lesion], tolerance: float) -> str:
    facts = [f"{count} lesion{'s' * (count != 1)}"]
    undrawn = count - len(lesions)
    facts += [f"{undrawn} without a course of a peak"] * bool(undrawn)
    if lesions:
        taken, needed = [len(lesion.peak) for lesion in lesions], [lesion.needed for lesion in lesions]
        met = sum(lesion.met is not None for lesion in lesions)
        facts.append(f"{_span(min(taken), max(taken))} samples")
        facts.append(f"standard error within {100 * tolerance:.3g} % of the largest peak: {met} of {len(lesions)}")
        recommended = f"recommended: {max(needed)} samples"
        if len(lesions) > 2:
            recommended += f" (half of the lesions need no more than {sorted(needed)[(len(needed) - 1) // 2]})"
        facts.append(recommended)
    return " · ".join(facts)


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _limits(lesions: Sequence[_Lesion]) -> tuple[float, float]:
    """Limits of the shared scale: all peaks but the first, the end with its band, and zero, with some room."""
    low, high = 0.0, 1.15
    for lesion in lesions:
        relative = lesion.peak / np.abs(lesion.peak[-1]).max()
        low, high = min(low, np.nanmin(relative[1:])), max(high, np.nanmax(relative[1:]))
    low, high = max(low, -_HIGHEST), min(high, _HIGHEST)
    return low - 0.05 * (high - low) * (low < 0), high + 0.05 * (high - low)


def _axes(ax: Axes, *, left: bool, bottom: bool, ticks: int) -> None:
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}".replace("-", "\u2212")))
    ax.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
    ax.axhline(0, color="#8b8f96", linewidth=1, zorder=0.6, clip_on=False)
    ax.tick_params(length=0, pad=7, labelcolor="#3c4046", labelleft=left, labelbottom=bottom)
    style_ticks(ax)
    for spine in ax.spines.values():
        spine.set(visible=False)


def _curves(ax: Axes, lesion: _Lesion, tolerance: float) -> None:
    scale = np.abs(lesion.peak[-1]).max()
    peak, error = lesion.peak / scale, _BAND * lesion.error / scale
    samples = np.arange(1, len(peak) + 1)
    for c, (colour, dashes) in enumerate(_STYLES[: peak.shape[1]]):
        bar = _BAND * tolerance
        ax.add_patch(Rectangle((0, peak[-1, c] - bar), len(peak), 2 * bar, facecolor=_BAR, linewidth=0, zorder=0.5))
        ax.fill_between(
            samples, (peak - error)[:, c], (peak + error)[:, c], color=colour, alpha=0.25, linewidth=0, zorder=2
        )
        ax.plot(samples, peak[:, c], color=colour, linestyle=dashes, linewidth=points(2.4), zorder=3)
        ax.plot(samples[-1], peak[-1, c], "o", color=colour, markersize=points(6), zorder=4, clip_on=False)
    if lesion.met is not None:
        ax.plot(lesion.met, 0, "^", color=_INK, markersize=points(10), transform=ax.get_xaxis_transform(), zorder=5,
                clip_on=False)  # fmt: skip


def _values(ax: Axes, lesion: _Lesion, names: Sequence[str] | None, size: int) -> None:
    """The final peaks at the height of the lines' ends, moved apart where they would lie on each other."""
    low, high = ax.get_ylim()
    height, line = ax.get_window_extent().height, 1.25 * size
    top = height - line / 2
    wanted = (lesion.peak[-1] / np.abs(lesion.peak[-1]).max() - low) / (high - low) * height
    order = np.argsort(wanted, kind="stable")
    at = np.clip(wanted[order], line / 2, top)
    for k in range(1, len(at)):
        at[k] = max(at[k], at[k - 1] + line)
    for k in reversed(range(len(at))):
        at[k] = min(at[k], top - (len(at) - 1 - k) * line)
    for place, c in zip(at, order, strict=True):
        text = number(lesion.peak[-1, c], plus=False)
        if names is not None:
            text = f"{text}  {names[c]}"
        ax.annotate(text, (1, place / height), (points(8), 0), xycoords="axes fraction", textcoords="offset points",
                    va="center", color=_STYLES[c][0], family=FONT, fontsize=points(size), parse_math=False)  # fmt: skip


def _heading(fig: Figure, x: float, y: float, width: float, lesion: _Lesion, size: int) -> None:
    verdict = f"needs {lesion.needed}" if lesion.met is None else f"met at {lesion.met}"
    room = len(verdict) * 0.66 * size
    write(fig, x, y, lesion.label, size, _INK, weight="bold", fit=width - room - 8)
    write(fig, x + width, y, verdict, size, _INK if lesion.met is None else _DIM, ha="right",
          weight="bold" if lesion.met is None else "normal")  # fmt: skip


def _legend(fig: Figure, channels: Sequence[str], tolerance: float, unit: str) -> None:
    x, y = 40.0, 134.0

    def sample(width: float, **style: Any) -> None:
        ends = np.array([x, x + width]) / fig.bbox.width
        fig.add_artist(Line2D(ends, [1 - (y - 6) / fig.bbox.height] * 2, solid_capstyle="butt", **style))

    def text(words: str) -> None:
        nonlocal x
        write(fig, x, y, words, 16, "#3c4046")
        x += fig.texts[-1].get_window_extent().width + 34

    for (colour, dashes), channel in zip(_STYLES, channels, strict=False):
        sample(44, color=colour, linewidth=points(14), alpha=0.25)
        sample(44, color=colour, linestyle=dashes, linewidth=points(2.4))
        x += 54
        text(channel)
    sample(44, color=_BAR, linewidth=points(14))
    x += 54
    text(f"95 % bands no wider than this: tolerance of {100 * tolerance:.3g} %")
    fig.add_artist(Line2D([(x + 6) / fig.bbox.width], [1 - (y - 6) / fig.bbox.height], marker="^", color=_INK,
                          markersize=points(10)))  # fmt: skip
    x += 20
    text("met from here on")
    text(f"numbers: final peaks{f', {unit}' * bool(unit)}")
