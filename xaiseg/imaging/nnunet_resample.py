"""nnU-Net v2's resampling, without scikit-image: `resample_data_or_seg_to_shape` for images and logits.

The faces of the old and new field of view coincide: voxel i of the new grid has its centre at (i + 0.5) · scale - 0.5
of the old, scale the ratio of the two shapes. Source: nnunetv2/preprocessing/resampling/default_resampling.py (2.8.1)
and the `skimage.transform.resize(mode="edge", anti_aliasing=False)` that it calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

RESAMPLE = "resample_data_or_seg_to_shape"
KEEP = "no_resampling_hack"
_ANISOTROPIC = 3  # ratio of the longest to the shortest side of a voxel; ANISO_THRESHOLD in nnunetv2/configuration.py


@dataclass(frozen=True)
class Resampling:
    """How nnU-Net resamples images, or logits; the fields are the function and its arguments in plans.json.

    Attributes:
        resampling_fn: "resample_data_or_seg_to_shape", or "no_resampling_hack" for none.
        order: of the spline, 0 to 5.
        order_z: of the spline along an axis that is resampled separately.
        force_separate_z: whether the axis of the longest spacing is resampled separately; None where one spacing is
            more than 3 times another.
    """

    resampling_fn: str = RESAMPLE
    order: int = 3
    order_z: int = 0
    force_separate_z: bool | None = False


def new_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """Voxels along each axis once `spacing` has become `target`, both in mm; 0 for an axis thinner than half of one."""
    return tuple(round(old / new * n) for n, old, new in zip(shape, spacing, target, strict=True))


def separate_axis(spacing: Sequence[float], target: Sequence[float], force: bool | None) -> int | None:
    """The axis that is resampled separately from the other two, or None."""
    if force is False:
        return None
    candidates = [spacing] if force else [s for s in (spacing, target) if max(s) / min(s) > _ANISOTROPIC]
    if not candidates:
        return None
    coarsest = np.flatnonzero(max(candidates[0]) / np.array(candidates[0]) == 1)
    return int(coarsest[0]) if len(coarsest) == 1 else None


def resample(
    data: np.ndarray, shape: tuple[int, ...], spacing: Sequence[float], target: Sequence[float], rule: Resampling
) -> np.ndarray:
    """Interpolate each channel onto `shape` voxels; `data` itself where it has that shape already.

    Args:
        data: (C, X, Y, Z) float.
        shape: (X', Y', Z').
        spacing: of `data`, in mm; it decides, with `target`, only whether an axis is separate.
        target: of the result, in mm.

    Returns:
        (C, X', Y', Z') of the dtype of `data`, computed in float64.
    """
    if data.shape[1:] == shape:
        return data
    axis = separate_axis(spacing, target, rule.force_separate_z)
    out = np.empty((len(data), *shape), data.dtype)
    for new, channel in zip(out, data, strict=True):
        old = channel.astype(np.float64)
        if axis is None:
            new[...] = _resize(old, shape, rule.order)
        else:
            in_plane = np.empty([old.shape[a] if a == axis else n for a, n in enumerate(shape)])
            for to, plane in zip(np.moveaxis(in_plane, axis, 0), np.moveaxis(old, axis, 0), strict=True):
                to[...] = _resize(plane, to.shape, rule.order)
            new[...] = _zoom(in_plane, shape, rule.order_z)
    return out


def _resize(values: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """`skimage.transform.resize`, which keeps a spline from overshooting the values it was made of."""
    zoomed = _zoom(values, shape, order)
    return np.clip(zoomed, values.min(), values.max(), out=zoomed)


def _zoom(values: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    factors = [1 / (old / new) for old, new in zip(values.shape, shape, strict=True)]
    return ndimage.zoom(values, factors, order=order, mode="nearest", grid_mode=True)
