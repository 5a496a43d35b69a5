"""How far apart the surfaces of two masks lie, in mm."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree


class SurfaceDistances(NamedTuple):
    """Mean symmetric surface distance and 95 % Hausdorff distance, in mm."""

    mean: float
    hausdorff95: float


def surface_distances(
    predicted: np.ndarray, reference: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> SurfaceDistances:
    """Distances between the surfaces of two boolean masks `(X, Y, Z)`; NaN where one of them, or both, are empty.

    The surface of a mask are its voxels with a face neighbour outside of it, the border of the array being outside; along an axis
    of one voxel, as of a slice, there are no neighbours. Every surface voxel has its distance to the nearest surface voxel of the
    other mask. The mean is over all of them, of both masks together; the Hausdorff distance is the larger of the 95th percentiles
    of the two directions. Both are as in MONAI. `spacing` is the length of a voxel along each axis, in mm.

    Raises ValueError for masks of different shapes.

    >>> one, other = np.zeros((2, 8, 4, 4), bool)
    >>> one[1, 1, 1] = other[5, 1, 1] = True
    >>> surface_distances(one, other, (0.5, 1, 1))
    SurfaceDistances(mean=2.0, hausdorff95=2.0)
    """
    if predicted.shape != reference.shape:
        raise ValueError(f"masks of shapes {predicted.shape} and {reference.shape}, expected one shape")
    if not (predicted.any() and reference.any()):
        return SurfaceDistances(np.nan, np.nan)
    (box,) = ndimage.find_objects((predicted | reference).astype(np.int8))
    axes = [axis for axis, size in enumerate(predicted.shape) if size > 1]
    # Millimetres before distances: voxels of clinical scans are several times as thick as they are wide.
    one, other = (_surface(mask[box], axes) * np.asarray(spacing) for mask in (predicted, reference))
    # A tree of the few surface voxels, where a distance transform would fill the whole volume.
    there, back = KDTree(other).query(one)[0], KDTree(one).query(other)[0]
    mean = float(np.concatenate([there, back]).mean())
    return SurfaceDistances(mean, float(max(np.percentile(there, 95), np.percentile(back, 95))))


def _surface(mask: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Surface voxels `(n, 3)` of a mask, with neighbours along `axes` only."""
    neighbours = np.zeros((3, 3, 3), bool)
    neighbours[1, 1, 1] = True
    for axis in axes:
        place: list[int | slice] = [1, 1, 1]
        place[axis] = slice(None)
        neighbours[tuple(place)] = True
    return np.argwhere(mask & ~ndimage.binary_erosion(mask, neighbours))
