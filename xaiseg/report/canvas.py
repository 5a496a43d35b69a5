"""What every picture is drawn on: a page measured in pixels, its text and panels, its colours, its file.

Pages use matplotlib's Agg canvas without pyplot, so that they neither depend on nor change a window system, and a font
that matplotlib ships, so that the same input gives the same bytes.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure

DPI = 100
FONT = "DejaVu Sans"
PAGE, INK, DIM, RULE = "#0e0f12", "#f2f2f0", "#a3a7af", "#3a3d44"  # a dark page, its text and its lines
OPAQUE_FROM = 0.3  # fraction of the limit from which the overlay no longer gains opacity
_HOT = ("#d01000", "#ff3300", "#ff9a00", "#fff08a")
_COLD = ("#1238d8", "#1f70ff", "#33bbff", "#c8f7ff")


def new_page(width: float, height: float, colour: str) -> Figure:
    """An empty page; width and height in pixels."""
    fig = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=colour, edgecolor=colour)
    fig.set_layout_engine("none")  # a style sheet may ask for another
    FigureCanvasAgg(fig)
    return fig


def points(pixels: float) -> float:
    """Pixels in matplotlib's unit of text and lines, 1/72 inch."""
    return pixels * 72 / DPI


def write(
    fig: Figure, x: float, y: float, text: str, size: float, colour: str, *, fit: float | None = None, **style: Any
) -> None:
    """Text at pixels from the upper left corner, shrunk to at most `fit` pixels; a "$" in it is no mathematics."""
    drawn = fig.text(x / fig.bbox.width, 1 - y / fig.bbox.height, text, color=colour, family=FONT, **style)
    drawn.set(fontsize=points(size), parse_math=False)
    while fit is not None and (length := max(drawn.get_window_extent().size)) > fit:
        # hinting: length is not quite linear in size
        drawn.set_fontsize(0.98 * float(drawn.get_fontsize()) * fit / length)


def add_panel(fig: Figure, x: float, y: float, size: tuple[float, float], label: str) -> Axes:
    """Axes without ticks; place and size in pixels from the upper left corner."""
    scale = np.array([fig.bbox.width, fig.bbox.height] * 2)
    ax = fig.add_axes(
        tuple(np.array([x, fig.bbox.height - y - size[1], *size]) / scale), facecolor="black", label=label
    )
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set(color=RULE, linewidth=0.8)
    return ax


def style_ticks(ax: Axes) -> None:
    """Tick labels in the page's font, whatever the style sheet says."""
    for tick in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        tick.set(fontfamily=FONT, fontsize=points(16), parse_math=False)


def style_panels(fig: Figure, rule: str) -> None:
    """White panels with a light grid behind what is drawn, lines in `rule` at left and bottom, ticks in the page's font."""
    for ax in fig.axes:
        ax.set_facecolor("white")
        ax.grid(axis="y", color="#eceef1", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(length=0, pad=8, labelcolor="#3c4046")
        style_ticks(ax)
        for side, spine in ax.spines.items():
            spine.set(visible=side in ("left", "bottom"), color=rule)


def count(n: int, noun: str) -> str:
    """`1 scan`, `2 scans`."""
    return f"{n} {noun}{'s' * (n != 1)}"


def finish(fig: Figure, path: str | os.PathLike[str] | None) -> Figure | None:
    """The figure itself, or None once it is at `path`; no date and no version in the file, so that bytes repeat."""
    if path is None:
        return fig
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        FigureCanvasAgg(fig).print_png(temporary, metadata={"Software": None})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        fig.clear()
    return None


def number(value: float, form: str = "#.3g", plus: bool = True) -> str:
    """A number as it is printed: three digits, a true minus sign, and zero without a sign."""
    text = f"{value:{'+' * plus}{form}}" if value else "0"
    return text.removesuffix(".").replace("-", "\u2212")


def overlay_colours(signed: bool) -> ListedColormap:
    """Colours whose opacity grows with |value|: cold to hot around a transparent zero, or hot alone from zero."""
    size = np.linspace(0, 1, 256)
    opacity = 0.92 * np.minimum(1, size / OPAQUE_FROM)

    def ramp(colours: tuple[str, ...]) -> np.ndarray:
        rgba = LinearSegmentedColormap.from_list("", colours)(size)
        rgba[:, 3] = opacity
        return rgba

    return ListedColormap(np.concatenate([ramp(_COLD)[::-1], ramp(_HOT)]) if signed else ramp(_HOT))
