"""The score of an instance, `S_i(x) = mean_{v∈Ω_i} y(x)[v]`, for many images: what measures of faithfulness ask the network.

Only windows that hold voxels of the instance are evaluated: the blended logit of a voxel is a fixed sum over them.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import Instance, LogitsFn, SaliencyMap
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor, WindowPlan, check_grid, cut, pad
from xaiseg.inference.devices import device_of, row_shards
from xaiseg.saliency.linearise import few_sizes, fill

# Windows evaluated together on an accelerator. On CPU one alone is about as fast as several.
_CHUNK = 8


class _Held(NamedTuple):
    """The voxels of an instance in one window: places `(n, 3)`, and what each adds to the score per logit, `(n,)`."""

    place: np.ndarray
    weight: np.ndarray


def instance_scores(
    predictor: StitchedPredictor, images: Iterable[Array], instance: Instance, *, chunk: int | None = None
) -> np.ndarray:
    """`S_i(x)`, the mean over the instance's voxels of the blended logit of the predictor's class: `(m,)` float64.

    images: `m` of them, `(X, Y, Z, C)`, all of one shape, drawn from the iterable as they are needed.
    chunk: images whose windows are evaluated together, in one compiled program, the last batch filled up; by default 1 on CPU
      and 8 elsewhere. Batches are spread over the devices of the predictor's mesh. Neither changes a result beyond rounding.

    Raises ValueError for a chunk below 1, an instance without voxels or outside of the volume, or a class that does not exist.

    >>> import jax.numpy as jnp, numpy as np, xaiseg
    >>> predictor = xaiseg.StitchedPredictor(lambda x: 2 * x, (4, 4, 4), target_class=0)
    >>> lesion = xaiseg.Instance(1, np.array([[0, 0, 0], [5, 4, 3]], np.int32))
    >>> instance_scores(predictor, [jnp.ones((6, 6, 6, 1)), jnp.zeros((6, 6, 6, 1))], lesion).round(6).tolist()
    [2.0, 0.0]
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    if not len(instance.voxels):
        raise ValueError(f"instance {instance.label} has no voxels")
    shards = row_shards(predictor)
    scores: list[np.ndarray] = []
    held: list[tuple[np.ndarray, _Held]] = []
    plan: WindowPlan | None = None
    for number, batch in enumerate(_batches(iter(images), chunk or _default_chunk(predictor))):
        if plan is None:
            plan = predictor.plan(batch[0].shape)
            held = _windows_of(plan, instance)
        shard = shards[number % len(shards)]
        filled = [*batch, *[batch[-1]] * ((chunk or _default_chunk(predictor)) - len(batch))]
        padded = tuple(pad(x, plan) for x in jax.device_put(filled, device_of(shard)))
        total = np.zeros(len(filled))
        for start, (place, weight) in held:
            logits = _window_logits(shard.logits_fn, _cut(padded, start, plan.window), shard.target_class)
            picked = np.asarray(_pick(logits, fill(place, few_sizes(len(place)))), np.float64)
            total += picked[:, : len(place)] @ weight
        scores.append(total[: len(batch)])
    return np.concatenate(scores) if scores else np.zeros(0)


def score_passes(predictor: StitchedPredictor, shape: Sequence[int], instance: Instance) -> int:
    """Windows that `instance_scores` evaluates for each image of this shape."""
    return len(_windows_of(predictor.plan(tuple(shape)), instance))


def place_of(saliency: SaliencyMap, shape: Sequence[int]) -> tuple[tuple[slice, ...], np.ndarray]:
    """Where a map lies in a volume `(X, Y, Z, C)`, and its values there, `(x, y, z, C)` float64.

    A map of one channel, such as a class-activation map, stands for every channel of the image. Raises InputError for another
    number of channels than one or the image's, and ValueError for a crop that does not fit.
    """
    values, start = np.asarray(saliency.values, np.float64), saliency.start
    if values.shape[-1] not in (1, shape[-1]):
        raise InputError(
            f"a map has {values.shape[-1]} channels and the image {shape[-1]}: expected as many, or one for all; "
            "explain one layer at a time"
        )
    end = [s + n for s, n in zip(start, values.shape[:3], strict=True)]
    if min(start) < 0 or any(e > n for e, n in zip(end, shape[:3], strict=True)):
        raise ValueError(f"a map from {tuple(start)} to {tuple(end)} does not lie in the volume {tuple(shape[:3])}")
    return tuple(map(slice, start, end)), np.broadcast_to(values, (*values.shape[:3], shape[-1]))


def in_volume(saliency: SaliencyMap, shape: Sequence[int]) -> np.ndarray:
    """The map over a volume `(X, Y, Z, C)`, float32, zero outside of its crop; see `place_of`."""
    where, values = place_of(saliency, shape)
    volume = np.zeros(tuple(shape), np.float32)
    volume[where] = values
    return volume


def box_around(instance: Instance, shape: Sequence[int], margin: int) -> np.ndarray:
    """The mask `(X, Y, Z)` of an instance's bounding box and `margin` voxels around it, as far as the volume goes."""
    low = np.maximum(instance.voxels.min(0) - margin, 0)
    high = instance.voxels.max(0) + margin + 1
    mask = np.zeros(tuple(shape[:3]), bool)
    mask[tuple(map(slice, low.tolist(), high.tolist()))] = True
    return mask


def generator(key: Array, number: int) -> np.random.Generator:
    """NumPy's generator for draw `number` of a JAX key: the same however many are drawn."""
    return np.random.default_rng(np.asarray(jax.random.key_data(jax.random.fold_in(key, number))).ravel())


def _default_chunk(predictor: StitchedPredictor) -> int:
    device = device_of(predictor) or jax.devices()[0]
    return 1 if device.platform == "cpu" else _CHUNK


def _batches(images: Iterator[Array], size: int) -> Iterator[list[Array]]:
    while batch := list(islice(images, size)):
        yield batch


def _windows_of(plan: WindowPlan, instance: Instance) -> list[tuple[np.ndarray, _Held]]:
    local, share = plan.coverage(instance.voxels)
    weight = share.astype(np.float64) / len(instance.voxels)
    return [
        (plan.starts[w], _Held(local[w][inside], weight[w][inside]))
        for w, inside in enumerate(share > 0)
        if inside.any()
    ]


@partial(jax.jit, static_argnums=2)
def _cut(padded: tuple[Array, ...], start: Array, window: tuple[int, ...]) -> Array:
    return jnp.stack([cut(x, start, window) for x in padded])


@partial(jax.jit, static_argnums=2)
def _window_logits(logits_fn: LogitsFn, windows: Array, target_class: int) -> Array:
    logits = logits_fn(windows)
    check_grid(logits, windows.shape[1:-1], len(windows))
    if target_class not in range(logits.shape[-1]):
        raise ValueError(
            f"target_class is {target_class}, but the network has {logits.shape[-1]} classes, numbered from 0"
        )
    return logits[..., target_class]


@jax.jit
def _pick(logits: Array, place: Array) -> Array:
    return logits[:, place[:, 0], place[:, 1], place[:, 2]]
