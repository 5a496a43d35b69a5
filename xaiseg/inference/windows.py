"""Where the windows of a volume lie and how they are blended, as MONAI or as nnU-Net does it.

A side smaller than the window is padded with zeros, `diff // 2` before, the rest after. The first axis is outermost.

`monai`: starts advance by `int(window · (1 - overlap))`, the last clamped to the end. `gaussian` is σ = window / 8 per axis, outer
product, clamped from below at 1e-3 (MONAI ≥ 1.2).
`nnunet`: as few windows as a step of at most `window · (1 - overlap)` takes, spread evenly, starts rounded. `gaussian` is a point
filtered with σ = window / 8, cut off at 4 σ, its maximum 10; zeros become its smallest positive value (nnU-Net v2, in float32).
`constant` is ones in both.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

_SIGMA = 0.125
_FLOOR = 1e-3

Triple = tuple[int, int, int]


class Box(NamedTuple):
    """Part of the padded volume: its first voxel and its sides."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WindowPlan:
    """Windows of one volume shape. Coordinates with the suffix `padded` count from the corner of the padded volume.

    shape: of the volume. window: sides. padding: zeros (before, after) per axis. starts: `(n_windows, 3)`, padded coordinates.
    """

    shape: Triple
    window: Triple
    overlap: float
    blending: str
    tiling: str = "monai"

    @cached_property
    def padding(self) -> tuple[tuple[int, int], ...]:
        short = [max(w - n, 0) for n, w in zip(self.shape, self.window, strict=True)]
        return tuple((d // 2, d - d // 2) for d in short)

    @cached_property
    def padded_shape(self) -> Triple:
        x, y, z = (n + lo + hi for n, (lo, hi) in zip(self.shape, self.padding, strict=True))
        return x, y, z

    @cached_property
    def starts(self) -> np.ndarray:
        starts = _starts_evenly if self.tiling == "nnunet" else _starts
        axes = [starts(n, w, self.overlap) for n, w in zip(self.padded_shape, self.window, strict=True)]
        return np.array(list(itertools.product(*axes)), dtype=np.int32)

    @cached_property
    def weight(self) -> np.ndarray:
        """Blend weights of a window, float32 `window`."""
        if self.blending == "constant":
            return np.ones(self.window, np.float32)
        if self.tiling == "nnunet":
            return _filtered_point(self.window)
        axes = []
        for n in self.window:
            t = np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2)
            axes.append(np.exp(-(t**2) / np.float32(2 * (_SIGMA * n) ** 2)))
        product = axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]
        return np.maximum(product, np.float32(max(float(product.min()), _FLOOR)))

    @cached_property
    def total_weight(self) -> np.ndarray:
        """Sum of the blend weights at each voxel, float32 `padded_shape`: the denominator of the blended logits."""
        total = np.zeros(self.padded_shape, np.float32)
        for start in self.starts:
            total[self.slices(start)] += self.weight
        return total

    def slices(self, start: np.ndarray) -> tuple[slice, ...]:
        return tuple(slice(s, s + w) for s, w in zip(start.tolist(), self.window, strict=True))

    def bounding_box(self, windows: np.ndarray) -> Box:
        """The smallest box that holds the windows of these numbers."""
        low = self.starts[windows].min(0)
        high = self.starts[windows].max(0) + np.array(self.window)
        return Box(tuple(low.tolist()), tuple((high - low).tolist()))

    def coverage(self, voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which windows hold which voxels, and with what share of the blended logit.

        voxels: `(n, 3)` in the volume. Returns `local` `(n_windows, n, 3)`, each voxel's place in each window, and `share`
        `(n_windows, n)` float32, `w / Σw` where the window holds the voxel and 0 elsewhere; shares of a voxel add up to 1.
        """
        if (voxels < 0).any() or (voxels >= np.array(self.shape)).any():
            found = f"from {voxels.min(0).tolist()} to {voxels.max(0).tolist()}"
            raise ValueError(f"an instance's voxels must lie in the volume {self.shape}; found {found}")
        padded = voxels + np.array([lo for lo, _ in self.padding], np.int32)
        local = padded[None] - self.starts[:, None]
        inside = ((local >= 0) & (local < np.array(self.window))).all(-1)
        weight = np.zeros(inside.shape, np.float64)
        weight[inside] = self.weight[tuple(local[inside].T)]
        return local.astype(np.int32), (weight / weight.sum(0)).astype(np.float32)


@lru_cache(maxsize=8)
def plan_windows(
    shape: Triple, window: Triple, overlap: float, blending: str = "gaussian", tiling: str = "monai"
) -> WindowPlan:
    """The windows of a volume of `shape`. `overlap` is a fraction of the window; see above for the rest."""
    return WindowPlan(shape, window, overlap, blending, tiling)


def _starts(size: int, window: int, overlap: float) -> list[int]:
    if size == window:
        return [0]
    step = max(int(window * (1 - overlap)), 1)
    count = math.ceil((size - window) / step) + 1
    return [min(i * step, size - window) for i in range(count)]


def _starts_evenly(size: int, window: int, overlap: float) -> list[int]:
    if window == 1:  # a slice of a 2-D network: each once
        return list(range(size))
    count = math.ceil((size - window) / (window * (1 - overlap))) + 1
    return [int(np.round(i * (size - window) / max(count - 1, 1))) for i in range(count)]


def _filtered_point(window: Triple) -> np.ndarray:
    point = np.zeros(window)
    point[tuple(n // 2 for n in window)] = 1
    weight = gaussian_filter(point, [_SIGMA * n for n in window], mode="constant")
    weight = (weight * (10 / weight.max())).astype(np.float32)
    return np.where(weight == 0, weight[weight > 0].min(), weight)
