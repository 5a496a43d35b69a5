"""Two pictures: a lesion in three planes with its saliency, and the peaks of a whole cohort.

Both are drawn on matplotlib's Agg canvas without pyplot, so that they neither depend on nor change a window system, and
in a font that matplotlib ships, so that the same input gives the same bytes.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}  # normal, horizontal, vertical axis in RAS
ENDS = (("L", "R"), ("P", "A"), ("I", "S"))  # what lies at the low and at the high end of each RAS axis
OPAQUE_FROM = 0.3  # fraction of the limit from which the overlay no longer gains opacity

_DPI = 100
_FONT = "DejaVu Sans"
_PAGE, _INK, _DIM, _RULE, _ACCENT = "#0e0f12", "#f2f2f0", "#a3a7af", "#3a3d44", "#7dff8a"
_HOT = ("#d01000", "#ff3300", "#ff9a00", "#fff08a")
_COLD = ("#1238d8", "#1f70ff", "#33bbff", "#c8f7ff")
_GROUPS = {"TP": ("#0072b2", "o"), "FP": ("#d55e00", "s"), "FN": ("#aa4499", "^"), "TN": ("#009e73", "v")}
_OTHER_GROUP = ("#6b6f76", "D")


def planes_through(mask: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> tuple[int, int, int]:
    """Index of the voxel of `mask` (X, Y, Z) that lies nearest its centroid, distances in mm; the first one of a tie.

    The centroid of a curved lesion can lie outside it; this voxel cannot. Raises ValueError if the mask is empty.
    """
    voxels = np.argwhere(mask)
    if not len(voxels):
        raise ValueError("the lesion mask is empty: there is nothing to draw")
    offset = (voxels - voxels.mean(axis=0)) * np.asarray(spacing)
    i, j, k = voxels[np.argmin((offset**2).sum(axis=1).round(6))]  # rounded: a tie must not hang on the last bit
    return int(i), int(j), int(k)


def field_of_view(mask: np.ndarray, spacing: Sequence[float], margin_mm: float) -> tuple[np.ndarray, float]:
    """Centre (3,) and side of the cube around `mask` with `margin_mm` to spare, in mm from the centre of voxel 0."""
    low, high = _bounds(mask)
    extent = (high - low + 1) * np.asarray(spacing)
    return (low + high) / 2 * np.asarray(spacing), float(extent.max() + 2 * margin_mm)


def symmetric_limit(saliency: np.ndarray) -> float:
    """Largest |saliency| over all voxels and channels: the colour scale runs from minus to plus this value."""
    return max(float(saliency.max()), -float(saliency.min()))


def grey_window(channel: np.ndarray) -> tuple[float, float]:
    """0.5th and 99.8th percentile of the non-zero voxels (the brain): black and white of the grey display."""
    brain = channel[channel != 0]
    if not brain.size:
        return 0.0, 1.0
    low, high = np.percentile(brain, (0.5, 99.8))
    return float(low), float(max(high, low + 1e-6))


def outline(plane: np.ndarray) -> np.ndarray:
    """Voxel edges around a 2-D mask: segments (n, 2, 2) of points in voxel units, voxel (0, 0) centred on (0, 0)."""
    padded = np.pad(plane, 1)
    i, j = np.nonzero(padded[1:] != padded[:-1])
    across = np.stack([np.stack([i - 0.5, j - 1.5], -1), np.stack([i - 0.5, j - 0.5], -1)], 1)
    i, j = np.nonzero(padded[:, 1:] != padded[:, :-1])
    along = np.stack([np.stack([i - 1.5, j - 0.5], -1), np.stack([i - 0.5, j - 0.5], -1)], 1)
    return np.concatenate([across, along])


def overlay_colours(signed: bool) -> ListedColormap:
    """Colours whose opacity grows with |value|: cold to hot around a transparent zero, or hot alone from zero."""
    size = np.linspace(0, 1, 256)
    opacity = 0.92 * np.minimum(1, size / OPAQUE_FROM)

    def ramp(colours: tuple[str, ...]) -> np.ndarray:
        rgba = LinearSegmentedColormap.from_list("", colours)(size)
        rgba[:, 3] = opacity
        return rgba

    return ListedColormap(np.concatenate([ramp(_COLD)[::-1], ramp(_HOT)]) if signed else ramp(_HOT))


def lesion_figure(
    image: np.ndarray,
    channels: Sequence[str],
    mask: np.ndarray,
    saliency: np.ndarray,
    affine: np.ndarray,
    *,
    title: str,
    subtitle: str,
    unit: str,
    signed: bool = True,
    saliency_names: Sequence[str] | None = None,
    margin_mm: float = 30.0,
    path: str | os.PathLike[str] | None = None,
) -> Figure | None:
    """Draw a lesion in three planes: the whole slice, each channel close up, and each saliency map on its channel.

    Axial, coronal and sagittal planes pass through the lesion's voxel nearest its centroid, in radiological convention
    whatever the storage order. Voxels are drawn as they are, without interpolation. All saliency maps share one scale.

    Args:
        image: (X, Y, Z, C) normalised intensities of the whole scan, 0 outside the brain.
        channels: C names.
        mask: (X, Y, Z), the lesion.
        saliency: (X, Y, Z, S) on the same grid, 0 where not computed; S = C (map s on channel s) or 1 (on channel 0).
        affine: (4, 4) voxel to RAS+ mm.
        title: the lesion, for example "sub-26 · lesion 3 · TP".
        subtitle: one line of facts.
        unit: of the saliency, written along the colour bar.
        signed: scale from -m to +m with m = max |saliency|; otherwise from 0 to m.
        saliency_names: S names, by default `channels`.
        margin_mm: shown on every side of the lesion.
        path: PNG to write, through a temporary name; None returns the figure instead.

    Raises:
        ValueError: shapes that disagree, an empty mask, values that are not finite, negative values in an unsigned map.
    """
    image, mask, saliency = np.asarray(image), np.asarray(mask, bool), np.asarray(saliency)
    names = tuple(channels if saliency_names is None else saliency_names)
    _check(image, tuple(channels), mask, saliency, np.asarray(affine), names, signed)

    to_ras = io_orientation(affine)
    affine = affine @ inv_ornt_aff(to_ras, mask.shape)
    image, mask, saliency = (apply_orientation(a, to_ras) for a in (image, mask, saliency))
    spacing = voxel_sizes(affine)
    voxel = planes_through(mask, spacing)
    position = apply_affine(affine, voxel)
    close_up = field_of_view(mask, spacing, margin_mm)
    brain = image[..., 0] != 0
    whole = field_of_view(brain if brain.any() else np.ones_like(brain), spacing, 6.0)
    windows = [grey_window(image[..., c]) for c in range(len(channels))]
    limit = symmetric_limit(saliency)
    scale = {"vmin": -(limit or 1.0) if signed else 0.0, "vmax": limit or 1.0, "cmap": overlay_colours(signed)}

    on = range(len(channels))
    backgrounds = (0, *on, *(on if len(names) == len(channels) else (0,)))
    saliency_from = 1 + len(channels)
    groups = {
        "Whole slice": (0, 0),
        "Lesion": (1, saliency_from - 1),
        "Saliency": (saliency_from, len(backgrounds) - 1),
    }
    gap, wide, left, top, right, foot = 8, 26, 52, 178, 150, 52
    panel = (1680 - left - right - gap * (len(backgrounds) - 3) - wide * 2) // len(backgrounds)
    panel = min(max(panel, 220), 420)
    lefts = [
        left + c * (panel + gap) + (wide - gap) * ((c >= 1) + (c >= saliency_from)) for c in range(len(backgrounds))
    ]
    height = 3 * panel + 2 * gap
    fig = _page(lefts[-1] + panel + right, top + height + foot, _PAGE)

    _write(fig, left, 62, title, 32, _INK, weight="bold", fit=fig.bbox.width - 2 * left)
    _write(fig, left, 96, subtitle, 19, _DIM, fit=fig.bbox.width - 2 * left)
    for group, (first, last) in groups.items():
        _write(fig, lefts[first], 140, group, 17, _DIM)
        ends = np.array([lefts[first], lefts[last] + panel]) / fig.bbox.width
        fig.add_artist(Line2D(ends, [1 - 147 / fig.bbox.height] * 2, color=_RULE, linewidth=1))
    for x, name in zip(lefts, (channels[0], *channels, *names), strict=True):
        _write(fig, x + panel / 2, 170, name, 18, _INK, ha="center", fit=panel)

    for row, (plane, (normal, *shown)) in enumerate(PLANES.items()):
        y = top + row * (panel + gap)
        place = f"{plane.capitalize()}   {'xyz'[normal]} = {_number(round(position[normal]), '.0f')} mm"
        _write(fig, left - 16, y + panel / 2, place, 17, _DIM, ha="center", va="center", rotation=90, fit=panel)
        # views, not copies: a scan is large and three slices of it are not
        slices, lesion, maps = (np.moveaxis(a, normal, 0)[voxel[normal]] for a in (image, mask, saliency))
        for column, (x, channel) in enumerate(zip(lefts, backgrounds, strict=True)):
            ax = _panel(fig, x, y, (panel, panel), f"{plane} {column}")
            centre, side = close_up if column else whole
            _frame(ax, centre[shown], side)
            low, high = windows[channel]
            if column >= saliency_from:
                high += 0.35 * (high - low)  # a darker ground: over white, weak colour would read as a tint
            # 0 is the brain's mean after z-scoring, but outside the brain it is no tissue
            grey = np.where(slices[..., channel] == 0, low, slices[..., channel])
            _show(ax, grey, spacing[shown], cmap="gray", vmin=low, vmax=high)
            if column >= saliency_from:
                _show(ax, maps[..., column - saliency_from], spacing[shown], **scale)
            if column:
                _contour(ax, lesion, spacing[shown])
            else:
                corner, size = close_up[0][shown] - close_up[1] / 2, close_up[1]
                ax.add_patch(
                    Rectangle((corner[0], corner[1]), size, size, fill=False, edgecolor=_ACCENT, linewidth=1.2)
                )
            if column == 1:
                _scale_bar(ax, centre[shown], side)
            _sides(ax, *(ENDS[axis] for axis in shown))

    _colour_bar(_panel(fig, lefts[-1] + panel + wide, top, (20, height), "colour bar"), scale, limit)
    _write(
        fig, fig.bbox.width - 32, top + height / 2, unit, 17, _DIM, ha="center", va="center", rotation=90, fit=height
    )
    note = (
        "Radiological convention: the patient's right is on the left.  "
        f"Colour fades towards zero below {OPAQUE_FROM:.0%} of the limit."
    )
    _write(fig, left, fig.bbox.height - 18, note, 15, _DIM, fit=fig.bbox.width - 2 * left)
    return _finish(fig, path)


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
    fig = _page(1600, top + len(channels) * (height + gap) - 24, "white")
    _write(fig, 40, 58, "Peak saliency per lesion", 30, "#17181b", weight="bold")
    undrawn = sum(not all(np.isfinite(peaks[c][n]) for c in channels) for n in range(len(rows)))
    facts = [_count(len(rows), "lesion"), _count(len({row["case"] for row in rows}), "scan"), "bar: median"]
    facts += [f"{undrawn} without a finite peak"] * bool(undrawn)
    _write(fig, 40, 92, " · ".join(facts), 18, "#5b5f66")

    finite = np.concatenate([[0.0], *(p[np.isfinite(p)] for p in peaks.values())])
    low, high = float(finite.min()), float(finite.max())
    pad = 0.06 * (high - low or 1.0)
    sizes = voxels[voxels > 0]
    span = (sizes.min() / 1.6, sizes.max() * 1.6) if sizes.size else (1.0, 1000.0)
    for row, channel in enumerate(channels):
        y = top + row * (height + gap)
        strip = _panel(fig, left, y, (640, height), f"{channel} groups")
        scatter = _panel(fig, left + 700, y, (740, height), f"{channel} volume")
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
                note.append(f"median {_number(float(np.median(values)), plus=False)}")
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
        _style_ticks(strip)
        _style_ticks(scatter)
        _write(fig, left + 700 + 370, y + height + 62, "lesion volume (voxels)", 16, "#5b5f66", ha="center")
        _write(fig, left, y - 14, channel, 19, "#17181b", weight="bold")
        _write(fig, 46, y + height / 2, "peak" + f", {unit}" * bool(unit), 16, "#5b5f66", ha="center",
               va="center", rotation=90, fit=height)  # fmt: skip
    if not finite.size > 1:
        _write(fig, 800, top + height / 3, "no lesion with a finite peak", 20, "#5b5f66", ha="center")
    _finish(fig, path)


def _check(
    image: np.ndarray,
    channels: tuple[str, ...],
    mask: np.ndarray,
    saliency: np.ndarray,
    affine: np.ndarray,
    names: tuple[str, ...],
    signed: bool,
) -> None:
    if mask.ndim != 3 or image.shape != (*mask.shape, len(channels)):
        raise ValueError(
            f"image {image.shape} is not the mask's grid {mask.shape} with {len(channels)} channels {channels}"
        )
    if saliency.shape != (*mask.shape, len(names)):
        raise ValueError(
            f"saliency {saliency.shape} is not the mask's grid {mask.shape} with {len(names)} maps {names}"
        )
    if len(names) not in (1, len(channels)):
        raise ValueError(f"{len(names)} saliency maps for {len(channels)} channels: expected one per channel, or one")
    if affine.shape != (4, 4):
        raise ValueError(f"affine has shape {affine.shape}, expected (4, 4)")
    for what, values in (("image", image), ("saliency", saliency)):
        if not np.isfinite([values.min(), values.max()]).all():
            raise ValueError(f"the {what} has values that are not finite")
    if not signed and saliency.min() < -1e-6 * saliency.max():
        raise ValueError(f"the saliency is negative in places ({saliency.min():.3g}): draw it with signed=True")


def _bounds(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last index of the true voxels along each axis."""
    along = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return np.array([a[0] for a in along]), np.array([a[-1] for a in along])


def _points(pixels: float) -> float:
    return pixels * 72 / _DPI


def _number(value: float, form: str = "#.3g", plus: bool = True) -> str:
    text = f"{value:{'+' * plus}{form}}" if value else "0"
    return text.removesuffix(".").replace("-", "\u2212")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _page(width: float, height: float, colour: str) -> Figure:
    fig = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=colour, edgecolor=colour)
    fig.set_layout_engine("none")  # a style sheet may ask for another
    FigureCanvasAgg(fig)
    return fig


def _write(
    fig: Figure, x: float, y: float, text: str, size: float, colour: str, *, fit: float | None = None, **style: Any
) -> None:
    """Text at pixels from the upper left corner, shrunk to at most `fit` pixels; a "$" in it is no mathematics."""
    drawn = fig.text(x / fig.bbox.width, 1 - y / fig.bbox.height, text, color=colour, family=_FONT, **style)
    drawn.set(fontsize=_points(size), parse_math=False)
    while fit is not None and (length := max(drawn.get_window_extent().size)) > fit:
        drawn.set_fontsize(
            0.98 * float(drawn.get_fontsize()) * fit / length
        )  # hinting: length is not quite linear in size


def _panel(fig: Figure, x: float, y: float, size: tuple[float, float], label: str) -> Axes:
    """Axes without ticks; place and size in pixels from the upper left corner."""
    scale = np.array([fig.bbox.width, fig.bbox.height] * 2)
    ax = fig.add_axes(
        tuple(np.array([x, fig.bbox.height - y - size[1], *size]) / scale), facecolor="black", label=label
    )
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set(color=_RULE, linewidth=0.8)
    return ax


def _frame(ax: Axes, centre: np.ndarray, side: float) -> None:
    """Show a square in mm with the horizontal axis reversed: right, or anterior, on the left of the picture."""
    ax.set(xlim=(centre[0] + side / 2, centre[0] - side / 2), ylim=(centre[1] - side / 2, centre[1] + side / 2))


def _show(ax: Axes, plane: np.ndarray, spacing: np.ndarray, **style: Any) -> None:
    """Draw the voxels of a plane that the panel's limits, which stay as they are, let through."""
    limits = {"xlim": ax.get_xlim(), "ylim": ax.get_ylim()}
    low, high = np.sort(list(limits.values()), axis=1).T / spacing
    first = np.maximum(np.floor(low).astype(int), 0)
    last = np.minimum(np.ceil(high).astype(int) + 1, plane.shape)
    (x0, y0), (x1, y1) = (first - 0.5) * spacing, (last - 0.5) * spacing
    part = plane[first[0] : last[0], first[1] : last[1]].T
    ax.imshow(part, origin="lower", extent=(x0, x1, y0, y1), aspect="auto", interpolation="nearest", **style)
    ax.set(**limits)


def _contour(ax: Axes, plane: np.ndarray, spacing: np.ndarray) -> None:
    segments = outline(plane) * spacing
    for colour, width in (("black", 2.6), (_ACCENT, 1.2)):  # a dark rim: visible on white and on black
        lines = LineCollection(list(segments), colors=colour, linewidths=_points(width), capstyle="projecting")
        ax.add_collection(lines, autolim=False)


def _label(ax: Axes, x: float, y: float, text: str, transform: Any, va: str = "center") -> None:
    rim = [withStroke(linewidth=2, foreground="black", alpha=0.7)]
    ax.text(x, y, text, transform=transform, color=_INK, family=_FONT, size=_points(15), ha="center", va=va,
            path_effects=rim)  # fmt: skip


def _sides(ax: Axes, horizontal: tuple[str, str], vertical: tuple[str, str]) -> None:
    (right, left), (bottom, top) = horizontal, vertical  # low end, high end
    for x, y, end in ((0.035, 0.5, left), (0.965, 0.5, right), (0.5, 0.04, bottom), (0.5, 0.955, top)):
        _label(ax, x, y, end, ax.transAxes)


def _scale_bar(ax: Axes, centre: np.ndarray, side: float) -> None:
    """A bar of 10 mm in the lower right corner; the horizontal axis is reversed."""
    x, y = centre - np.array([0.46, 0.45]) * side
    for colour, width in (("black", 5.0), (_INK, 3.0)):
        ax.plot([x, x + 10], [y, y], color=colour, linewidth=_points(width), solid_capstyle="butt")
    _label(ax, x + 5, y + 0.02 * side, "10 mm", ax.transData, va="bottom")


def _colour_bar(ax: Axes, scale: dict[str, Any], limit: float) -> None:
    low, high = scale["vmin"], scale["vmax"]
    ax.set_facecolor("#5a5a5a")  # grey as tissue is, so that the bar shows what the panels show
    ax.imshow(np.linspace(low, high, 512)[:, None], origin="lower", extent=(0, 1, low, high), aspect="auto", **scale)
    ticks = np.linspace(low, high, 5) if limit else np.zeros(1)
    ax.yaxis.tick_right()
    ax.set_yticks(ticks, labels=[_number(t, plus=low < 0) for t in ticks])
    ax.tick_params(length=4, width=1, pad=4, color=_DIM, labelcolor=_INK)
    _style_ticks(ax)


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


def _style_ticks(ax: Axes) -> None:
    for tick in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        tick.set(fontfamily=_FONT, fontsize=_points(16), parse_math=False)


def _round_ticks(ax: Axes, span: tuple[float, float]) -> None:
    """Ticks at 1, 2, 5, 10, ... of a logarithmic axis, or at powers of ten alone where that would be many."""
    ticks = [m * 10**k for k in range(12) for m in (1, 2, 5) if span[0] <= m * 10**k <= span[1]]
    if len(ticks) > 7:
        ticks = [t for t in ticks if str(t)[0] == "1"]
    ax.set_xticks(ticks, labels=[f"{t:,}" for t in ticks])
    ax.set_xticks([], minor=True)


def _finish(fig: Figure, path: str | os.PathLike[str] | None) -> Figure | None:
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
