"""The patches that occlusion tries: one grid for a whole volume, and what of it concerns one instance."""

import itertools
import operator
from collections.abc import Sequence

import numpy as np

from xaiseg._types import Instance
from xaiseg.inference import Box, WindowPlan
from xaiseg.saliency.schedule import Geometry, View


def region_of(plan: WindowPlan, instance: Instance, margin: int | None, windows: Sequence[int]) -> Box:
    """The part of the volume that a map covers."""
    if margin is None:
        box = plan.bounding_box(np.array(windows))
        first = np.array(box.start) - [lo for lo, _ in plan.padding]
        end = first + box.shape
    else:
        first, end = instance.voxels.min(0) - margin, instance.voxels.max(0) + 1 + margin
    first, end = np.maximum(first, 0), np.minimum(end, plan.shape)
    return Box(tuple(first.tolist()), tuple((end - first).tolist()))


def patches_in(
    shape: Sequence[int], region: Box, patch: Sequence[int], stride: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The patches of a volume that reach into a region: their first voxels and ends, `(P, 3)` each."""
    axes = []
    for size, first, n, side, step in zip(shape, region.start, region.shape, patch, stride, strict=True):
        starts = range(0, max(size - side, 0) + step, step)
        axes.append([(s, min(s + side, size)) for s in starts if s < first + n and s + side > first])
    both = np.array(list(itertools.product(*axes)), np.int32)
    return both[..., 0], both[..., 1]


def mean_over_patches(region: Box, low: np.ndarray, high: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """At each voxel of the region the mean effect of the patches that cover it, `(*region, c)`: there is at least one."""
    total, count = np.zeros((*region.shape, effects.shape[1])), np.zeros((*region.shape, 1))
    first = np.maximum(low - region.start, 0)
    end = np.minimum(high - region.start, region.shape)
    for a, b, effect in zip(first, end, effects, strict=True):
        within = tuple(map(slice, a, b))
        total[within] += effect
        count[within] += 1
    return total / count


def reached(geometry: Geometry, view: View, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which patches, from `low` to before `high` `(m, 3)` in the padded volume, reach into what the logits of a view depend on:
    its field, as far as the window goes; `(m,)`."""
    plan, corner = geometry.plan, geometry.corner(view)
    window = plan.starts[view[0]]
    first = np.maximum(corner, window)
    end = np.minimum(corner + np.array(geometry.field), window + np.array(plan.window))
    return ((low < end) & (high > first)).all(-1)


def per_axis(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    sides = [value] * 3 if isinstance(value, int) else list(value)
    if len(sides) != 3 or any(n < 1 for n in sides):
        raise ValueError(f"{name} is {value} voxels, expected at least 1, one number or one for each axis")
    x, y, z = map(operator.index, sides)
    return x, y, z
