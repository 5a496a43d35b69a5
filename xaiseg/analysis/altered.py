"""Logits of a few voxels in altered copies of one image, without segmenting the copies.

A blended logit depends on the windows that hold its voxel and on no others, so only these are computed, each for all copies in
batches through one compiled program, and once where copies agree in it. Networks with local logits take tiles of windows where
that is less.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import Instance, LocalFn, LogitsFn, Progress
from xaiseg.inference import StitchedPredictor, WindowPlan, check_grid, cut, pad
from xaiseg.inference.devices import device_of, row_shards
from xaiseg.saliency.linearise import few_sizes, fill
from xaiseg.saliency.schedule import Geometry, Held, View, held_by_view

# Passes on their way at once on each device: the next is prepared while one is computed.
_IN_FLIGHT = 2
# Windows evaluated together on an accelerator. On CPU one alone is about as fast as several.
_CHUNK = 8

Box = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Altered:
    """`K` images `(X, Y, Z, C)`, of which number `k` is `alter(parameters[k], *volumes)`.

    alter: a pure function, voxel by voxel, of one set of parameters and of crops `(x, y, z, C_i)` of the volumes. It must give 0
      where all volumes are 0, which is what surrounds a volume smaller than a window. Defined once: programs are compiled for it.
    volumes: `(X, Y, Z, C_i)` each. parameters: arrays `(K, …)`.
    same: `(box) -> (K,)`, equal numbers for images that are equal in a box of the volume; None where all differ everywhere.
    """

    alter: Callable[..., Array]
    volumes: tuple[Array | np.ndarray, ...]
    parameters: tuple[np.ndarray, ...]
    same: Callable[[Box], np.ndarray] | None = None

    def image(self, k: int) -> Array:
        """One of the images, whole."""
        return self.alter(tuple(p[k] for p in self.parameters), *map(jnp.asarray, self.volumes))

    def __len__(self) -> int:
        return len(self.parameters[0])


def altered_logits(
    predictor: StitchedPredictor,
    altered: Altered,
    voxels: np.ndarray,
    *,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, int]:
    """The blended logits `(K, n, classes)` float32 of `voxels` `(n, 3)` in each of the images, and how many passes it took.

    They are those of `predictor(image)` for each image, to the rounding of float32. A pass is one image through one window, or one
    tile. chunk: images evaluated together, by default 1 on CPU and 8 elsewhere; it changes the result by rounding at most.
    Raises ValueError for a chunk below 1 or voxels outside the volume.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    shape = altered.volumes[0].shape
    plan = predictor.plan(shape)
    predictor = predictor.fitted(plan)
    geometry, local, held = _cheapest(plan, predictor.local_fn, voxels)
    shards = [
        (shard, jax.device_put(tuple(geometry.with_reach(pad(jnp.asarray(v), plan)) for v in altered.volumes), device))
        for shard, device in ((s, device_of(s)) for s in row_shards(predictor))
    ]
    if chunk is None:
        chunk = 1 if next(iter(shards[0][1][0].devices())).platform == "cpu" else _CHUNK
    blended: np.ndarray | None = None
    flying: deque[tuple[Array, Held, list[np.ndarray]]] = deque()
    passes = turn = 0

    def land() -> None:
        nonlocal blended
        picked, part, numbers = flying.popleft()
        logits = np.asarray(picked, np.float32)[:, : len(part.row)]
        if blended is None:
            blended = np.zeros((len(altered), len(voxels), logits.shape[-1]), np.float32)
        for values, same in zip(logits, numbers, strict=False):  # behind the last are copies that fill the chunk
            blended[same[:, None], part.row] += part.share[:, None] * values
        if progress is not None:
            progress(len(numbers))

    for view, part in held.items():
        groups = _groups(altered, _box(geometry, view))
        place = fill(part.place, few_sizes(len(part.place)))
        for first in range(0, len(groups), chunk):
            numbers = groups[first : first + chunk]
            chosen = np.array([same[0] for same in numbers] + [numbers[0][0]] * (chunk - len(numbers)))
            shard, volumes = shards[turn % len(shards)]
            parameters = tuple(p[chosen] for p in altered.parameters)
            corner = geometry.place(view)
            if local is None or shard.local_fn is None:
                logits = _window_logits(shard.logits_fn, altered.alter, volumes, corner, parameters, plan.window)
            else:
                start, sides = np.array(view[1:], np.int32), np.array(plan.window, np.int32)
                logits = _tile_logits(
                    shard.local_fn.function, altered.alter, volumes, corner, parameters, start, sides, local.field
                )
            flying.append((_pick(logits, place), part, numbers))
            turn, passes = turn + 1, passes + len(numbers)
            if len(flying) > _IN_FLIGHT * len(shards):
                land()
    while flying:
        land()
    assert blended is not None
    return blended, passes


def passes_at_most(predictor: StitchedPredictor, shape: tuple[int, ...], voxels: np.ndarray, images: int) -> int:
    """How many passes `altered_logits` takes where no two images agree."""
    plan = predictor.plan(shape)
    return images * len(_cheapest(plan, predictor.fitted(plan).local_fn, voxels)[2])


def _cheapest(
    plan: WindowPlan, local_fn: LocalFn | None, voxels: np.ndarray
) -> tuple[Geometry, LocalFn | None, dict[View, Held]]:
    """Windows or tiles of them, whichever hold the voxels with fewer voxels of input."""
    ways: list[LocalFn | None] = [None] if local_fn is None else [local_fn, None]
    found = []
    for local in ways:
        geometry = Geometry.of(plan, local)
        found.append((geometry, local, held_by_view(geometry, Instance(0, voxels))))
    return min(found, key=lambda way: len(way[2]) * math.prod(way[0].field))


def _box(geometry: Geometry, view: View) -> Box:
    """The part of the volume that a view's logits depend on."""
    plan, corner = geometry.plan, geometry.corner(view)
    start = plan.starts[view[0]]
    padding = np.array([lo for lo, _ in plan.padding])
    low = np.maximum(np.maximum(corner, start) - padding, 0)
    end = np.minimum(corner + np.array(geometry.field), start + np.array(plan.window)) - padding
    return tuple(slice(int(a), max(int(b), int(a))) for a, b in zip(low, np.minimum(end, plan.shape), strict=True))


def _groups(altered: Altered, box: Box) -> list[np.ndarray]:
    """The numbers of the images, those together that are equal in the box."""
    if altered.same is None:
        return [np.array([k]) for k in range(len(altered))]
    same = np.asarray(altered.same(box))
    return [np.flatnonzero(same == value) for value in dict.fromkeys(same.tolist())]


@partial(jax.jit, static_argnums=(1, 5))
def _window_logits(
    logits_fn: LogitsFn,
    alter: Callable[..., Array],
    volumes: tuple[Array, ...],
    corner: Array,
    parameters: tuple[Array, ...],
    window: tuple[int, ...],
) -> Array:
    batch = _batch(alter, volumes, corner, parameters, window)
    logits = logits_fn(batch)
    check_grid(logits, window, len(batch))
    return logits


@partial(jax.jit, static_argnums=(1, 7))
def _tile_logits(
    function: Any,
    alter: Callable[..., Array],
    volumes: tuple[Array, ...],
    corner: Array,
    parameters: tuple[Array, ...],
    start: Array,
    sides: Array,
    field: tuple[int, ...],
) -> Array:
    return function(_batch(alter, volumes, corner, parameters, field), start, sides)


def _batch(
    alter: Callable[..., Array],
    volumes: tuple[Array, ...],
    corner: Array,
    parameters: tuple[Array, ...],
    window: tuple[int, ...],
) -> Array:
    crops = [cut(volume, corner, window) for volume in volumes]
    return jax.vmap(lambda one: alter(one, *crops))(parameters)


@jax.jit
def _pick(logits: Array, place: Array) -> Array:
    return logits[:, place[:, 0], place[:, 1], place[:, 2]]
