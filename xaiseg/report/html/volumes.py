"""Volumes as the viewer in a page takes them: cropped, in 8 bits, as compressed NIfTI in base64."""

import base64
import zlib

import nibabel as nib
import numpy as np

from xaiseg.report.html.scans import Crop, Volume

MARGIN_MM = 20.0  # of a map around its lesion
_LEVELS = 127


def packed(array: np.ndarray, affine: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> str:
    """A gzip-compressed NIfTI file in base64, without a time in it: values are `slope · stored + inter`."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(slope, inter)
    image.header.set_xyzt_units("mm")
    squeeze = zlib.compressobj(9, wbits=31)
    return base64.b64encode(squeeze.compress(image.to_bytes()) + squeeze.flush()).decode("ascii")


def brain_box(volume: Volume) -> tuple[slice, ...]:
    """Where any channel is not zero or a lesion is, and two voxels more."""
    seen = (volume.image != 0).any(-1) | (volume.labels > 0)
    if not seen.any():
        return tuple(slice(0, n) for n in seen.shape)
    return tuple(_span(np.flatnonzero(seen.any(tuple({0, 1, 2} - {axis}))), 2, seen.shape[axis]) for axis in range(3))


def scan_volume(volume: Volume, channel: int, box: tuple[slice, ...]) -> str:
    """A channel: 0 outside the brain, 1 to 255 from black to white of its grey window."""
    low, high = volume.windows[channel]
    values = volume.image[..., channel][box]
    step = (high - low) / 254
    stored = np.where(values == 0, 0, 1 + np.rint(np.clip((values - low) / step, 0, 254))).astype(np.uint8)
    return packed(stored, moved(volume.affine, box), step, low - step)


def label_volume(volume: Volume, box: tuple[slice, ...]) -> str:
    """Lesions by number."""
    labels = volume.labels[box]
    return packed(labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.int16), moved(volume.affine, box))


def map_volumes(volume: Volume, saliency: Crop, voxels: np.ndarray) -> tuple[list[str], float]:
    """Each channel of a map within 20 mm of its lesion's bounding box, and the largest |value| of all of the map, `limit`.

    Stored are integers from -127 to 127, `limit` / 127 apart.
    """
    limit = float(np.abs(saliency.values).max(initial=0.0))
    reach = np.ceil(MARGIN_MM / np.array(volume.spacing)).astype(int)
    low = np.maximum(voxels.min(0) - reach, 0)
    high = np.minimum(voxels.max(0) + reach + 1, volume.image.shape[:3])
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    values = np.zeros((*(high - low), saliency.values.shape[-1]), np.float32)
    start = np.array(saliency.start)
    first, last = np.maximum(low, start), np.minimum(high, start + saliency.values.shape[:3])
    if (first < last).all():
        there = tuple(slice(a, b) for a, b in zip(first - low, last - low, strict=True))
        values[there] = saliency.values[tuple(slice(a, b) for a, b in zip(first - start, last - start, strict=True))]
    step = limit / _LEVELS or 1.0
    stored = np.rint(values / step).astype(np.int16)
    affine = moved(volume.affine, box)
    return [packed(stored[..., c].astype(np.int8), affine, step) for c in range(values.shape[-1])], limit


def moved(affine: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
    """The affine of a crop."""
    out = affine.copy()
    out[:3, 3] = affine[:3, :3] @ [part.start for part in box] + affine[:3, 3]
    return out


def _span(found: np.ndarray, margin: int, size: int) -> slice:
    return slice(max(int(found[0]) - margin, 0), min(int(found[-1]) + margin + 1, size))
