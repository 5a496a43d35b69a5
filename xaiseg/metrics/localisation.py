"""Where a map lies: in the lesion it explains, and not in others."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree

from xaiseg._types import Instance, SaliencyMap


class Localisation(NamedTuple):
    """How much of a map lies in its instance, 0 to 1; NaN for an empty instance, or where there is nothing of that sign.

    positive, negative, absolute: mass accuracy of `M⁺`, `M⁻` and `|M|`, over all channels.
    rank: rank accuracy. pointing: 1 where the map points at the instance, else 0.
    """

    positive: float
    negative: float
    absolute: float
    rank: float
    pointing: float


def localisation(
    saliency: SaliencyMap,
    instance: Instance,
    *,
    tolerance_mm: float = 0.0,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Localisation:
    """Mass accuracy `Σ_Ω M⁺ / Σ M⁺` (and of `M⁻` and `|M|`), rank accuracy `|top_|Ω| ∩ Ω| / |Ω|` (Arras et al. 2022), and the
    pointing game: `argmax |M|` lies within `tolerance_mm` of a voxel centre of Ω (Zhang et al. 2018).

    Ranks and argmax are those of the largest `|M|` over the channels of a voxel. Of equal values at the edge of the top, and of
    equal maxima, the mean over all choices counts. Zeros are never among the top: a map that is zero points nowhere. spacing:
    length of a voxel along each axis, mm.

    >>> values = np.zeros((4, 1, 1, 1), np.float32)
    >>> values[:3, 0, 0, 0] = 3, 1, -4
    >>> lesion = Instance(1, np.array([[0, 0, 0], [1, 0, 0]], np.int32))
    >>> localisation(SaliencyMap(values, (0, 0, 0)), lesion, tolerance_mm=1)
    Localisation(positive=1.0, negative=0.0, absolute=0.5, rank=0.5, pointing=1.0)
    """
    if not tolerance_mm >= 0:
        raise ValueError(f"tolerance_mm is {tolerance_mm}, expected at least 0")
    values = np.asarray(saliency.values, np.float64)
    if not (len(instance.voxels) and np.isfinite(values).all()):
        return Localisation(*[np.nan] * 5)
    inside = values_at(saliency, instance)
    positive, negative, absolute = (
        _share(part(inside).sum(), part(values).sum())
        for part in (lambda v: np.maximum(v, 0), lambda v: np.maximum(-v, 0), np.abs)
    )
    height = np.abs(values).max(-1)
    if not height.any():
        return Localisation(positive, negative, absolute, np.nan, np.nan)
    rank = _in_top(np.abs(inside).max(-1), height.ravel(), len(instance.voxels))
    peaks = np.argwhere(height == height.max()) + saliency.start
    mm = np.asarray(spacing, np.float64)
    away = KDTree(instance.voxels * mm).query(peaks * mm)[0]
    # the last digit of a distance is rounding
    pointing = float((away <= tolerance_mm * (1 + 1e-9)).mean())
    return Localisation(positive, negative, absolute, rank, pointing)


def leakage(saliency: SaliencyMap, own: int, instances: Sequence[Instance]) -> float:
    """`Σ over other instances of |M_i| ÷ Σ over all instances of |M_i|`: what the map of one instance says of others.

    own: place in `instances` of the one that the map explains. NaN where there is no other, or the map is zero in all of them.
    """
    masses = np.array([np.abs(values_at(saliency, i)).sum() for i in instances])
    if len(masses) < 2:
        return np.nan
    return _share(masses.sum() - masses[own], masses.sum())


def values_at(saliency: SaliencyMap, instance: Instance) -> np.ndarray:
    """The map at the instance's voxels, `(n, C)` float64: zero beyond its crop."""
    values = np.asarray(saliency.values)
    local = instance.voxels - np.array(saliency.start)
    held = ((local >= 0) & (local < values.shape[:3])).all(1)
    found = np.zeros((len(local), values.shape[-1]))
    found[held] = values[tuple(local[held].T)]
    return found


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole != 0 else np.nan


def _in_top(inside: np.ndarray, height: np.ndarray, count: int) -> float:
    """The share of the instance's voxels that are among the `count` highest."""
    count = min(count, len(height))
    edge = np.partition(height, len(height) - count)[len(height) - count]
    above, level = int((height > edge).sum()), int((height == edge).sum())
    hits = float((inside > edge).sum())
    if edge > 0:
        hits += (count - above) / level * float((inside == edge).sum())
    return hits / len(inside)
