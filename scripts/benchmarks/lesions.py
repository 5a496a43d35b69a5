"""Lesions to measure with: compact, deterministic, at places that few or many windows hold."""

from collections.abc import Sequence

import numpy as np

from xaiseg.inference import WindowPlan

# By how many windows hold the lesion; of the last, as many as there are anywhere.
PLACES = ("one window", "two windows", "most windows")


def ball(centre: Sequence[int], count: int) -> np.ndarray:
    """The `count` voxels nearest to `centre`, `(count, 3)` int32 in C order; of those equally far, the first in C order."""
    r = radius(count)
    offsets = np.stack(np.meshgrid(*[np.arange(-r, r + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    nearest = np.sort(np.argsort((offsets**2).sum(1), kind="stable")[:count])
    return (offsets[nearest] + np.array(centre)).astype(np.int32)


def radius(count: int) -> int:
    """No voxel of a ball lies further from its centre, along each axis."""
    r = 0
    while np.count_nonzero(sum(np.ix_(*[np.arange(-r, r + 1) ** 2] * 3)) <= r**2) < count:
        r += 1
    return r


def centre_at(plan: WindowPlan, place: str, count: int) -> tuple[int, ...] | None:
    """Where a ball of `count` voxels is held whole by as many windows as `place`, one of `PLACES`, says and touches no other.

    The nearest such place to the middle of the volume; None where there is none.
    """
    r, axes = radius(count), []
    for axis, (size, side) in enumerate(zip(plan.shape, plan.window, strict=True)):
        starts, low = np.unique(plan.starts[:, axis]), plan.padding[axis][0]
        at = np.arange(r, size - r)[:, None] + low
        whole = ((at - r >= starts) & (at + r < starts + side)).sum(1)
        touched = ((at + r >= starts) & (at - r < starts + side)).sum(1)
        by_windows = {
            int(n): min((at[(whole == n) & (touched == n), 0] - low).tolist(), key=lambda i: abs(2 * i + 1 - size))
            for n in np.unique(whole[whole == touched])
        }
        axes.append(by_windows)
    if not all(axes):
        return None
    if place == "most windows":
        return tuple(places[max(places)] for places in axes)
    if any(1 not in places for places in axes):
        return None
    centre = [places[1] for places in axes]
    if place == "two windows":
        axis = next((a for a, places in enumerate(axes) if 2 in places), None)
        if axis is None:
            return None
        centre[axis] = axes[axis][2]
    return tuple(centre)


def scattered(shape: Sequence[int], count: int, voxels: int) -> list[np.ndarray]:
    """`count` balls of `voxels` voxels all over the volume."""
    rng, r = np.random.default_rng(0), radius(voxels)
    return [ball([int(rng.integers(r, n - r)) for n in shape], voxels) for _ in range(count)]


def windows_of(plan: WindowPlan, voxels: np.ndarray) -> int:
    """How many windows hold voxels of a lesion."""
    return int(np.count_nonzero((plan.coverage(voxels)[1] > 0).any(1)))
