"""Small charts of an analysis, each a panel that is read on a phone as it is: dots, lines with bands, intervals."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator

from xaiseg.cohort.output import Files
from xaiseg.report.canvas import DPI, finish, new_page, number, points, style_panels, write

INK, DIM, RULE = "#17181b", "#5b5f66", "#c4c7cc"
WIDTH, HEIGHT = 360, 300
# Okabe and Ito's colours, with markers and dashes, so that groups stay apart without colour vision and in print.
GROUPS: dict[str, tuple[str, str, Any]] = {
    "TP": ("#0072b2", "o", "-"),
    "FP": ("#d55e00", "s", (0, (5, 1.6))),
    "FN": ("#aa4499", "^", (0, (1, 1.4))),
    "TN": ("#009e73", "v", (0, (5, 1.6, 1, 1.6))),
}
OTHER: tuple[str, str, Any] = ("#6b6f76", "D", "-")
SERIES: tuple[tuple[str, str, Any], ...] = (*GROUPS.values(), ("#b8860b", "D", "-"), ("#6b6f76", "o", (0, (1, 1.4))))
_FAMILY = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"


class Line:
    """A line: `x`, `y` `(n,)`, perhaps with a band from `low` to `high`; NaN breaks it."""

    def __init__(self, name: str, x: Any, y: Any, low: Any = None, high: Any = None) -> None:
        self.name = name
        self.x, self.y = np.asarray(x, float), np.asarray(y, float)
        self.low, self.high = (None if end is None else np.asarray(end, float) for end in (low, high))


def dots(values: np.ndarray, groups: np.ndarray, title: str, unit: str, *, named: bool = True) -> Figure:
    """Every lesion a dot, by group; a bar at the median, thin ones at the quartiles. named: groups have colours of their own."""
    present = [g for g in GROUPS if g in groups] + sorted(set(groups.tolist()) - set(GROUPS))
    fig, ax = _panel(title, unit, bottom=62)
    labels = []
    for at, group in enumerate(present):
        colour, marker, _ = GROUPS.get(group, OTHER) if named else SERIES[at % len(SERIES)]
        mine = np.sort(values[(groups == group) & np.isfinite(values)])
        # golden-ratio steps over the sorted values: neighbours in value land apart, and no random numbers are drawn
        jitter = (np.arange(len(mine)) * 0.6180339887 + 0.5) % 1 - 0.5
        size = 5.5 if len(mine) <= 120 else 4.2 if len(mine) <= 600 else 2.8
        _marks(ax, at + 0.62 * jitter, mine, marker, size, color=colour, alpha=0.55)
        if len(mine):
            q1, median, q3 = np.quantile(mine, [0.25, 0.5, 0.75])
            ax.plot([at - 0.4, at + 0.4], [median] * 2, color=INK, linewidth=points(2.6), zorder=1.5)
            for quartile in (q1, q3):
                ax.plot([at - 0.4, at + 0.4], [quartile] * 2, color=INK, linewidth=points(0.9), zorder=1.5)
            labels.append(f"{group}, {len(mine)}\n{number(float(median), plus=False)}")
        else:
            labels.append(f"{group}, 0\n")
    side = max(0.6, (3 - len(present)) / 2 + 0.1)
    ax.set(xlim=(-side, len(present) - 1 + side), ylim=_limits(values), xticks=range(len(present)))
    ax.set_xticklabels(labels, parse_math=False)
    _finish(fig, ax)
    for tick, group in zip(ax.get_xticklabels(), present, strict=True):
        tick.set_color(GROUPS.get(group, OTHER)[0] if named else INK)
    return fig


def lines(
    series: Sequence[Line],
    title: str,
    across: str,
    up: str,
    *,
    limits: tuple[float, float] | None = None,
    border: bool = False,
    diagonal: bool = False,
    level: float | None = None,
    faint: Sequence[Line] = (),
    names: Sequence[str] = (),
) -> Figure:
    """Lines with bands of 95 % intervals. border: a mark at x = 0, the lesion's border. faint: single lesions, in grey behind.

    A line is drawn in the style of its name: of a group, or of its place in `names` (by default the series').
    """
    fig, ax = _panel(title, up, bottom=54)
    for one in faint:
        ax.plot(one.x, one.y, color="#9aa0a8", linewidth=points(0.8), alpha=0.4, zorder=1)
    if diagonal:
        ax.plot([0, 1], [0, 1], color=RULE, linewidth=points(1.4), zorder=1)
    if level is not None:
        ax.axhline(level, color=RULE, linewidth=points(1.4), zorder=1)
    places = list(names) or [one.name for one in series]
    for one in series:
        colour, marker, dashes = GROUPS.get(one.name) or SERIES[places.index(one.name) % len(SERIES)]
        if one.low is not None and one.high is not None:
            ax.fill_between(one.x, one.low, one.high, where=np.isfinite(one.low).tolist(), color=colour, alpha=0.18,
                            linewidth=0, zorder=2)  # fmt: skip
        few = one.low is not None and len(one.x) <= 40
        ax.plot(one.x, one.y, color=colour, linestyle=dashes, linewidth=points(2.2), zorder=3,
                marker=marker if few else None, markersize=points(4.5))  # fmt: skip
    drawn = [v for one in series for v in (one.y, one.low, one.high) if v is not None]
    ax.set(ylim=limits or _limits(np.concatenate([np.ravel(v) for v in drawn])))
    ax.xaxis.set_major_locator(MaxNLocator(6))
    if border:
        ax.axvline(0, color=INK, linewidth=points(1.2), linestyle=(0, (2, 2)), zorder=1.5)
        ax.axhline(0, color="#8b8f96", linewidth=points(1.2), zorder=1.5)
    write(fig, (52 + WIDTH - 12) / 2, HEIGHT - 10, across, 13, DIM, ha="center", fit=WIDTH - 64)
    _finish(fig, ax)
    return fig


def intervals(
    rows: Sequence[tuple[str, float, float, float]],
    title: str,
    across: str,
    *,
    dots_of: Sequence[np.ndarray] = (),
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
    groups: Sequence[str] = (),
) -> Figure:
    """A line per row: its name, a mark at the estimate and its interval; single values as dots. reference: a vertical line.

    groups: of the rows, whose colours and marks they then have.
    """
    longest = max(len(name) for name, *_ in rows)
    left = min(150, 22 + 7 * longest)
    height = 92 + 30 * len(rows)
    fig, ax = _panel(title, "", left=left, bottom=54, height=height)
    for n, (_, estimate, low, high) in enumerate(rows):
        colour, marker, _dash = GROUPS.get(groups[n], OTHER) if groups else SERIES[n % len(SERIES)]
        if n < len(dots_of):
            values = dots_of[n][np.isfinite(dots_of[n])]
            jitter = ((np.arange(len(values)) * 0.6180339887 + 0.5) % 1 - 0.5) * 0.5
            _marks(ax, np.sort(values), n + jitter, "o", 3.2, color=colour, alpha=0.35)
        ax.plot([low, high], [n, n], color=colour, linewidth=points(3), solid_capstyle="round", zorder=3)
        ax.plot([estimate], [n], marker, color=colour, markersize=points(8), zorder=4,
                markeredgecolor="white", markeredgewidth=points(1))  # fmt: skip
    if reference is not None:
        ax.axvline(reference, color=INK, linewidth=points(1.2), linestyle=(0, (2, 2)), zorder=2)
    if limits:
        ax.set(xlim=limits)
    ax.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)))
    ax.set_yticklabels([name if len(name) <= 20 else f"{name[:19]}…" for name, *_ in rows], parse_math=False)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    write(fig, (left + WIDTH - 12) / 2, height - 10, across, 13, DIM, ha="center", fit=WIDTH - left)
    _finish(fig, ax)
    ax.grid(axis="x", color="#eceef1", linewidth=0.8)
    ax.grid(visible=False, axis="y")
    return fig


def scatter(x: np.ndarray, y: np.ndarray, groups: np.ndarray, title: str, across: str, up: str) -> Figure:
    """Every lesion by two figures of one unit, on equal axes with the diagonal."""
    fig, ax = _panel(title, up, bottom=54)
    known = np.isfinite(x) & np.isfinite(y)
    low, high = _limits(np.concatenate([x[known], y[known]]))
    ax.plot([low, high], [low, high], color=RULE, linewidth=points(1.4), zorder=1)
    for group in dict.fromkeys(groups[known].tolist()):
        colour, marker, _ = GROUPS.get(group, OTHER)
        mine = known & (groups == group)
        _marks(ax, x[mine], y[mine], marker, 4.4, color=colour, alpha=0.55)
    ax.set(xlim=(low, high), ylim=(low, high))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    write(fig, (52 + WIDTH - 12) / 2, HEIGHT - 10, across, 13, DIM, ha="center", fit=WIDTH - 64)
    _finish(fig, ax)
    return fig


def save(fig: Figure, files: Files, stem: str) -> str:
    """Write `STEM.png` (twice the pixels) and `STEM.svg`; returns the SVG as it is put into a page."""
    text = svg(fig, stem)
    files.text(files.root / f"{stem}.svg", '<?xml version="1.0" encoding="utf-8"?>\n' + text + "\n")
    fig.set_dpi(2 * DPI)
    files.figure(files.root / f"{stem}.png", lambda path: finish(fig, path))
    return _inline(text)


def svg(fig: Figure, salt: str) -> str:
    """The figure as SVG with its text as text; no date, and the same figure gives the same bytes."""
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "path.simplify": False}):
        FigureCanvasSVG(fig).print_svg(stream, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(
        r"\s*<metadata>.*?</metadata>|\s*<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", text, flags=re.S
    )
    text = re.sub(r'font:([^;"]*?)\s[^;"\s]*\'[^;"]*|font-family:[^;"]*', lambda m: _font(m.group(0)), text)
    text = re.sub(
        r"(<svg [^>]*?)>", r'\1 style="stroke-linejoin:round;stroke-linecap:butt">', text, count=1, flags=re.S
    )
    return re.sub(r"\n\s*", "\n", text)


def _font(style: str) -> str:
    size = re.search(r"[\d.]+px", style)
    weight = "bold " if "bold" in style or " 700" in style else ""
    return f"font: {weight}{size[0]} {_FAMILY}" if size else f"font-family: {_FAMILY}"


def _inline(text: str) -> str:
    """Without what only a file of its own needs: names of XML, ids that repeat from figure to figure, a fixed size."""
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'\sid="(?:figure|patch|axes|text|line2d|matplotlib\.axis|xtick|ytick|PathCollection|FillBetweenPolyCollection|'
                  r'PolyCollection|legend|LineCollection)_\d+"', "", text)  # fmt: skip
    width, height = (float(found) for found in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())  # type: ignore[union-attr]
    text = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", text, count=2)
    scale = DPI / 72
    return text.replace("<svg", f'<svg width="{width * scale:.0f}" height="{height * scale:.0f}"', 1)


def _panel(title: str, up: str, *, left: int = 52, bottom: int = 54, height: int = HEIGHT) -> tuple[Figure, Axes]:
    fig = new_page(WIDTH, height, "white")
    write(fig, 10, 20, title, 14, INK, weight="bold", fit=WIDTH - 20)
    if up:
        write(fig, 10, 38, up, 12, DIM, fit=WIDTH - 20)
    top = 48 if up else 34
    ax = fig.add_axes((left / WIDTH, bottom / height, (WIDTH - left - 12) / WIDTH, (height - top - bottom) / height))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.axhline(0, color="#8b8f96", linewidth=points(1), zorder=1) if up else None
    return fig, ax


def _finish(fig: Figure, ax: Axes) -> None:
    style_panels(fig, RULE)
    for tick in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        tick.set_fontsize(points(12))
    ax.tick_params(pad=5)


def _limits(values: np.ndarray) -> tuple[float, float]:
    finite = np.concatenate([[0.0], values[np.isfinite(values)].ravel()])
    low, high = float(finite.min()), float(finite.max())
    pad = 0.06 * (high - low or 1.0)
    return low - pad * (low < 0), high + pad * (high > 0 or low == 0)


def _marks(ax: Axes, x: np.ndarray, y: np.ndarray, marker: str, size: float, **style: Any) -> None:
    """Marks of one colour as one path: a page with thousands has few elements. Circles are ends of lines without length."""
    if not len(x):
        return
    if marker in "os":
        short = 1e-3 * (float(np.ptp(x)) or max(1.0, abs(float(x[0]))))  # the PNG has no ends of lines of length 0
        vertices = np.stack([np.stack([x, y], -1), np.stack([x + short, y], -1)], 1).reshape(-1, 2)
        path = Outline(vertices, np.tile([Outline.MOVETO, Outline.LINETO], len(x)))
        path.should_simplify = False
        ax.add_patch(
            PathPatch(path, fill=False, snap=False, linewidth=points(size), zorder=2,
                      capstyle="round" if marker == "o" else "projecting", **style)
        )  # fmt: skip
        return
    ax.plot(x, y, marker, markersize=points(size), markeredgewidth=0, zorder=2, **style)
