"""A lesion in three planes: the whole slice, each channel close up, and the saliency on top."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from xaiseg.report.canvas import (
    DIM,
    FONT,
    INK,
    OPAQUE_FROM,
    PAGE,
    RULE,
    add_panel,
    finish,
    new_page,
    number,
    overlay_colours,
    points,
    style_ticks,
    write,
)

PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}  # normal, horizontal, vertical axis in RAS
ENDS = (("L", "R"), ("P", "A"), ("I", "S"))  # what lies at the low and at the high end of each RAS axis
_ACCENT = "#7dff8a"  # the outline of the lesion


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
    gap, wide, left, top, right, foot = 8, 26, 52, 178, 176, 52
    panel = (1680 - left - right - gap * (len(backgrounds) - 3) - wide * 2) // len(backgrounds)
    panel = min(max(panel, 220), 420)
    lefts = [
        left + c * (panel + gap) + (wide - gap) * ((c >= 1) + (c >= saliency_from)) for c in range(len(backgrounds))
    ]
    height = 3 * panel + 2 * gap
    fig = new_page(lefts[-1] + panel + right, top + height + foot, PAGE)

    write(fig, left, 62, title, 32, INK, weight="bold", fit=fig.bbox.width - 2 * left)
    write(fig, left, 96, subtitle, 19, DIM, fit=fig.bbox.width - 2 * left)
    for group, (first, last) in groups.items():
        write(fig, lefts[first], 140, group, 17, DIM)
        ends = np.array([lefts[first], lefts[last] + panel]) / fig.bbox.width
        fig.add_artist(Line2D(ends, [1 - 147 / fig.bbox.height] * 2, color=RULE, linewidth=1))
    for x, name in zip(lefts, (channels[0], *channels, *names), strict=True):
        write(fig, x + panel / 2, 170, name, 18, INK, ha="center", fit=panel)

    for row, (plane, (normal, *shown)) in enumerate(PLANES.items()):
        y = top + row * (panel + gap)
        place = f"{plane.capitalize()}   {'xyz'[normal]} = {number(round(position[normal]), '.0f')} mm"
        write(fig, left - 16, y + panel / 2, place, 17, DIM, ha="center", va="center", rotation=90, fit=panel)
        # views, not copies: a scan is large and three slices of it are not
        slices, lesion, maps = (np.moveaxis(a, normal, 0)[voxel[normal]] for a in (image, mask, saliency))
        for column, (x, channel) in enumerate(zip(lefts, backgrounds, strict=True)):
            ax = add_panel(fig, x, y, (panel, panel), f"{plane} {column}")
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

    _colour_bar(add_panel(fig, lefts[-1] + panel + wide, top, (20, height), "colour bar"), scale, limit)
    write(fig, fig.bbox.width - 32, top + height / 2, unit, 17, DIM, ha="center", va="center", rotation=90, fit=height)
    note = (
        "Radiological convention: the patient's right is on the left.  "
        f"Colour fades towards zero below {OPAQUE_FROM:.0%} of the limit."
    )
    write(fig, left, fig.bbox.height - 18, note, 15, DIM, fit=fig.bbox.width - 2 * left)
    return finish(fig, path)


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
        lines = LineCollection(list(segments), colors=colour, linewidths=points(width), capstyle="projecting")
        ax.add_collection(lines, autolim=False)


def _label(ax: Axes, x: float, y: float, text: str, transform: Any, va: str = "center") -> None:
    rim = [withStroke(linewidth=2, foreground="black", alpha=0.7)]
    ax.text(x, y, text, transform=transform, color=INK, family=FONT, size=points(15), ha="center", va=va,
            path_effects=rim)  # fmt: skip


def _sides(ax: Axes, horizontal: tuple[str, str], vertical: tuple[str, str]) -> None:
    (right, left), (bottom, top) = horizontal, vertical  # low end, high end
    for x, y, end in ((0.035, 0.5, left), (0.965, 0.5, right), (0.5, 0.04, bottom), (0.5, 0.955, top)):
        _label(ax, x, y, end, ax.transAxes)


def _scale_bar(ax: Axes, centre: np.ndarray, side: float) -> None:
    """A bar of 10 mm in the lower right corner; the horizontal axis is reversed."""
    x, y = centre - np.array([0.46, 0.45]) * side
    for colour, width in (("black", 5.0), (INK, 3.0)):
        ax.plot([x, x + 10], [y, y], color=colour, linewidth=points(width), solid_capstyle="butt")
    _label(ax, x + 5, y + 0.02 * side, "10 mm", ax.transData, va="bottom")


def _colour_bar(ax: Axes, scale: dict[str, Any], limit: float) -> None:
    low, high = scale["vmin"], scale["vmax"]
    ax.set_facecolor("#5a5a5a")  # grey as tissue is, so that the bar shows what the panels show
    ax.imshow(np.linspace(low, high, 512)[:, None], origin="lower", extent=(0, 1, low, high), aspect="auto", **scale)
    ticks = np.linspace(low, high, 5) if limit else np.zeros(1)
    ax.yaxis.tick_right()
    ax.set_yticks(ticks, labels=[number(t, plus=low < 0) for t in ticks])
    ax.tick_params(length=4, width=1, pad=4, color=DIM, labelcolor=INK)
    style_ticks(ax)
