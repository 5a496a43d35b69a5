"""A scan before and after it was altered: one axial slice through each lesion, all channels, one grey scale a row."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from xaiseg.report.canvas import DIM, INK, PAGE, add_panel, finish, new_page, points, write
from xaiseg.report.lesion import outline, planes_through

_PANEL, _GAP, _WIDE, _LEFT, _TOP, _FOOT = 190, 6, 26, 56, 172, 40
_ACCENT = "#7dff8a"  # the outline of the lesion


class Slice(NamedTuple):
    """A part of an axial plane. values: `(x, y, C)`, x to the right and y to the front. mask: `(x, y)`. spacing: mm."""

    values: np.ndarray
    mask: np.ndarray
    spacing: tuple[float, float]


class SliceRow(NamedTuple):
    """One lesion in several images, the untouched one first."""

    name: str
    slices: Sequence[Slice]


def axial_slice(image: np.ndarray, voxels: np.ndarray, affine: np.ndarray, side_mm: float = 50.0) -> Slice:
    """The axial plane through the voxel nearest the centroid of `voxels` `(n, 3)`, a square of this side around it."""
    low, high = voxels.min(0), voxels.max(0) + 1
    own = np.zeros(high - low, bool)
    own[tuple((voxels - low).T)] = True
    sides = voxel_sizes(affine)
    middle = np.array(planes_through(own, sides)) + low
    to_ras = io_orientation(affine)
    reach = np.ceil(side_mm / 2 / sides).astype(int)
    reach[to_ras[:, 0] == 2] = 0
    first = np.maximum(middle - reach, 0)
    box = tuple(slice(a, b) for a, b in zip(first, np.minimum(middle + reach + 1, image.shape[:3]), strict=True))
    mask = np.zeros(image.shape[:3], bool)
    mask[tuple(voxels.T)] = True
    values, mask = (apply_orientation(a[box], to_ras)[:, :, 0] for a in (image, mask))
    x, y, _ = voxel_sizes(affine @ inv_ornt_aff(to_ras, image.shape[:3])).tolist()
    return Slice(np.array(values), np.array(mask), (x, y))


def slices_figure(
    rows: Sequence[SliceRow],
    columns: Sequence[str],
    channels: Sequence[str],
    path: str | os.PathLike[str] | None,
    *,
    title: str,
    facts: str,
) -> Figure | None:
    """A PNG: a row for each lesion, for each channel the images side by side, the lesion's outline on the first.

    Voxels are drawn as they are. A channel of a row has one grey scale, from the smallest to the largest value of its slices.

    columns: what the images of a row are. path: PNG to write, through a temporary name; None returns the figure.
    Raises ValueError for no rows, or rows of other than these columns.
    """
    if not rows or any(len(row.slices) != len(columns) for row in rows):
        raise ValueError(f"{len(rows)} rows: expected at least one, each with {len(columns)} slices")
    block = len(columns) * (_PANEL + _GAP) - _GAP + _WIDE
    width = max(_LEFT + len(channels) * block + 14, 760)
    fig = new_page(width, _TOP + len(rows) * (_PANEL + _GAP) + _FOOT, PAGE)
    write(fig, _LEFT - 24, 56, title, 28, INK, weight="bold", fit=width - 60)
    write(fig, _LEFT - 24, 88, facts, 17, DIM, fit=width - 60)
    for c, channel in enumerate(channels):
        x = _LEFT + c * block
        write(fig, x, 130, channel, 19, INK, weight="bold")
        for k, column in enumerate(columns):
            write(fig, x + k * (_PANEL + _GAP) + _PANEL / 2, 160, column, 16, DIM, ha="center", fit=_PANEL)
        for r, row in enumerate(rows):
            y = _TOP + r * (_PANEL + _GAP)
            if not c:
                write(fig, 30, y + _PANEL / 2, row.name, 15, DIM, ha="center", va="center", rotation=90, fit=_PANEL)
            tissue = np.concatenate([s.values[..., c][s.values[..., c] != 0] for s in row.slices])
            low, high = (tissue.min(), tissue.max()) if len(tissue) else (0.0, 1.0)
            for k, one in enumerate(row.slices):
                ax = add_panel(fig, x + k * (_PANEL + _GAP), y, (_PANEL, _PANEL), f"{channel} {r} {k}")
                _draw(ax, one, c, (float(low), float(max(high, low + 1e-6))), outlined=not k)
    write(
        fig,
        _LEFT - 24,
        fig.bbox.height - 14,
        "Axial; radiological convention: the patient's right is on the left.",
        14,
        DIM,
    )
    return finish(fig, path)


def _draw(ax: Axes, one: Slice, channel: int, grey: tuple[float, float], outlined: bool) -> None:
    """A channel of a slice in a square of mm, right on the left."""
    step = np.array(one.spacing)
    (x0, y0), (x1, y1) = -step / 2, (np.array(one.mask.shape) - 0.5) * step
    values = np.where(one.values[..., channel] == 0, grey[0], one.values[..., channel])
    ax.imshow(values.T, cmap="gray", vmin=grey[0], vmax=grey[1], origin="lower", extent=(x0, x1, y0, y1), aspect="auto",
              interpolation="nearest")  # fmt: skip
    half = max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    ax.set(xlim=(x + half, x - half), ylim=(y - half, y + half))
    if outlined:
        for colour, width in (("black", 2.6), (_ACCENT, 1.2)):  # a dark rim: visible on white and on black
            lines = LineCollection(list(outline(one.mask) * step), colors=colour, linewidths=points(width))
            ax.add_collection(lines, autolim=False)
