"""Small pictures of lesions, drawn with numpy: three planes, grey scan, signed saliency, outline, the patient's sides.

As `report.lesion` draws them: radiological convention, voxels as they are, colour that fades towards zero.
"""

import io
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from xaiseg.report.canvas import overlay_colours
from xaiseg.report.html.scans import Crop, Volume
from xaiseg.report.lesion import ENDS, PLANES, planes_through, symmetric_limit

OUTLINE = (125, 255, 138)
SMALLEST_MM = 40.0
MARGIN_MM = 14.0
_GAP = 2
_PAGE = (14, 15, 18)
_INK = (242, 242, 240)
_LETTERS = {  # 5 rows of 4 pixels
    "L": (8, 8, 8, 8, 15),
    "R": (14, 9, 14, 10, 9),
    "A": (6, 9, 15, 9, 9),
    "P": (14, 9, 14, 8, 8),
    "I": (14, 4, 4, 4, 14),
    "S": (7, 8, 6, 1, 14),
}


class Layer(NamedTuple):
    """A row of a picture: the grey channel, and the map on it, None for the scan and the outline alone."""

    channel: int
    map: int | None


class View(NamedTuple):
    """What of a lesion is shown: the voxel that all planes go through, and the square's centre and side in mm from voxel 0."""

    voxel: tuple[int, int, int]
    centre: np.ndarray
    side: float


def view_of(voxels: np.ndarray, spacing: Sequence[float]) -> View:
    """Of a lesion's voxels `(n, 3)`, RAS: through the one nearest its centroid, with a margin, at least 40 mm wide."""
    low, high = voxels.min(0), voxels.max(0)
    mask = np.zeros(high - low + 1, bool)
    mask[tuple((voxels - low).T)] = True
    i, j, k = (low + planes_through(mask, spacing)).tolist()
    extent = float(((high - low + 1) * spacing).max())
    return View((i, j, k), (low + high) / 2 * np.asarray(spacing), max(SMALLEST_MM, extent + 2 * MARGIN_MM))


def sampled(
    view: View, plane: str, spacing: Sequence[float], shape: Sequence[int], size: int
) -> tuple[np.ndarray, ...]:
    """Voxel indices along three axes for the `size` x `size` pixels of a plane, each `(size, size)`, and whether they are inside.

    The left edge is the patient's right, or front; the upper edge is up, or front.
    """
    _, across, up = PLANES[plane]
    steps = view.side * (0.5 - (np.arange(size) + 0.5) / size)  # mm from the centre, falling
    index = [np.full((size, size), view.voxel[axis]) for axis in range(3)]
    columns, rows = (np.floor((view.centre[axis] + steps) / spacing[axis] + 0.5).astype(int) for axis in (across, up))
    index[across], index[up] = np.broadcast_to(columns, (size, size)), np.broadcast_to(rows[:, None], (size, size))
    inside = np.ones((size, size), bool)
    for axis in (across, up):
        inside &= (index[axis] >= 0) & (index[axis] < shape[axis])
        index[axis] = np.clip(index[axis], 0, shape[axis] - 1)
    return (*index, inside)


def picture(
    scan: Volume, voxels: np.ndarray, saliency: Crop | None, layers: Sequence[Layer], size: int, signed: bool = True
) -> np.ndarray:
    """RGB `(rows, columns, 3)` uint8: a row of tiles per layer, a column per plane, `size` pixels each.

    All maps of a lesion share one scale, from minus to plus its largest |value|, or from 0 where it is not signed.
    """
    view = view_of(voxels, scan.spacing)
    shape = scan.image.shape[:3]
    limit = symmetric_limit(saliency.values) if saliency is not None and saliency.values.size else 0.0
    out = np.empty((len(layers) * (size + _GAP) - _GAP, len(PLANES) * (size + _GAP) - _GAP, 3), np.uint8)
    out[:] = _PAGE
    low = voxels.min(0)
    mask = np.zeros(voxels.max(0) - low + 1, bool)
    mask[tuple((voxels - low).T)] = True
    for column, plane in enumerate(PLANES):
        *index, inside = sampled(view, plane, scan.spacing, shape, size)
        place = np.stack(index, -1)
        lesion = _within(mask, low, place) & inside
        edge = _edge(lesion)
        values = None if saliency is None else _within(saliency.values, np.array(saliency.start), place)
        for row, layer in enumerate(layers):
            grey = np.where(inside, scan.image[(*index, layer.channel)], 0)
            tile = _greys(grey, scan.windows[layer.channel], darker=layer.map is not None)
            if layer.map is not None and values is not None:
                tile = _overlaid(tile, np.where(inside, values[..., layer.map], 0), limit, signed)
            tile[edge] = OUTLINE
            _sides(tile, plane)
            y, x = row * (size + _GAP), column * (size + _GAP)
            out[y : y + size, x : x + size] = tile
    return out


def webp(rgb: np.ndarray, quality: int = 60) -> bytes:
    """Compressed; the same picture gives the same bytes."""
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "WEBP", quality=quality, method=4)
    return stream.getvalue()


def _within(box: np.ndarray, start: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Values of a box that begins at `start` at voxels `(…, 3)`; zero beyond it."""
    local = place - start
    held = ((local >= 0) & (local < box.shape[:3])).all(-1)
    out = np.zeros((*place.shape[:-1], *box.shape[3:]), box.dtype)
    out[held] = box[tuple(local[held].T)]
    return out


def _edge(mask: np.ndarray) -> np.ndarray:
    """Pixels beside a mask: they leave all of the lesion to be seen."""
    padded = np.pad(mask, 1)
    around = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return around & ~mask


def _greys(values: np.ndarray, window: tuple[float, float], darker: bool) -> np.ndarray:
    low, high = window
    if darker:  # over white, weak colour would read as a tint
        high += 0.35 * (high - low)
    # 0 is the brain's mean after z-scoring, but outside the brain it is no tissue
    level = np.clip((np.where(values == 0, low, values) - low) / (high - low), 0, 1)
    return np.repeat(np.rint(255 * level).astype(np.uint8)[..., None], 3, -1)


@cache
def colours(signed: bool) -> np.ndarray:
    """RGBA in 0 to 1 of equally spaced values, from minus to plus the limit, or from 0."""
    table = overlay_colours(signed)
    return table(np.arange(table.N))


def _overlaid(tile: np.ndarray, values: np.ndarray, limit: float, signed: bool) -> np.ndarray:
    if not limit:
        return tile
    table = colours(signed)
    level = (values / limit + 1) / 2 if signed else values / limit
    rgba = table[np.clip((level * len(table)).astype(int), 0, len(table) - 1)]
    opacity = rgba[..., 3:]
    return np.rint(tile * (1 - opacity) + 255 * rgba[..., :3] * opacity).astype(np.uint8)


def _sides(tile: np.ndarray, plane: str) -> None:
    """The letters of what lies at the left and the right edge."""
    _, across, _ = PLANES[plane]
    right, left = ENDS[across]  # low end, high end; the axis is reversed
    scale = max(1, len(tile) // 90)
    for letter, at in ((left, 2), (right, len(tile) - 2 - 4 * scale)):
        glyph = np.array([[row >> (3 - bit) & 1 for bit in range(4)] for row in _LETTERS[letter]], bool)
        glyph = np.kron(glyph, np.ones((scale, scale), bool))
        top = (len(tile) - len(glyph)) // 2
        for shift, colour in ((1, (0, 0, 0)), (0, _INK)):  # a shadow: to be read on white tissue too
            part = tile[top + shift : top + shift + len(glyph), at + shift : at + shift + glyph.shape[1]]
            part[glyph[: part.shape[0], : part.shape[1]]] = colour
