"""Occlusion: how much of an instance's target goes when a patch of the image is replaced by a reference.

It asks the network itself, at another image, and takes no derivative: a check on gradients, at many forward passes. Blending is
linear, so a patch takes one pass through each view that holds voxels of the instance and sees the patch; all else keeps the logits
of the clean image.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import Explainer, Info, Instance, LogitsFn, Progress, SaliencyMap
from xaiseg.inference import StitchedPredictor, check_grid, cut, pad
from xaiseg.inference.devices import device_of, row_shards
from xaiseg.saliency.baselines import Baseline, reference_image, zero
from xaiseg.saliency.linearise import few_sizes, fill
from xaiseg.saliency.patches import mean_over_patches, patches_in, per_axis, reached, region_of
from xaiseg.saliency.rows import head_of
from xaiseg.saliency.schedule import Geometry, Held, View, held_by_view, portions
from xaiseg.saliency.targets import Head, Target

Channels = Literal["each", "together"]

# Passes on their way at once on each device: the next is prepared while one is computed.
_IN_FLIGHT = 2
# Windows evaluated together on an accelerator. On CPU one alone is about as fast as several.
_CHUNK = 8
# Voxels of an instance, times occlusions, whose logits are held at once.
_HELD = 2**22


def occlusion(
    *,
    patch: int | Sequence[int] = 8,
    stride: int | Sequence[int] | None = None,
    margin: int | None = 16,
    baseline: Baseline | None = None,
    target: Target | str = "logit",
    channels: Channels = "each",
    chunk: int | None = None,
) -> Explainer:
    """`M[u, c] = mean_{p ∋ u} (S(x) - S(x with x' in patch p of channel c))`, with `S(x) = mean_{v∈Ω} t(y(x)[v])`.

    Zeiler & Fergus, *Visualizing and Understanding Convolutional Networks*, ECCV 2014, in three dimensions and for one instance.
    Positive where the image speaks for the lesion: without it the target falls. Maps are signed, in Δtarget, not per unit of the
    image. `S` is the mean over the instance, not the sum, so that small and large lesions compare.

    patch: sides in voxels, one number or one per axis. stride: from patch to patch, the patch itself by default. Patches lie on
      one grid for the whole volume, that begins at its first voxel; the last of an axis is cut off by the volume's end. Hence
      the maps of all instances are of the same patches. Where patches overlap, a voxel gets the mean over those that cover it.
    margin: the map covers the instance's bounding box and so many voxels around it, within the volume; every patch that reaches
      into it is tried, so that a wider margin extends a map and changes nothing in it. None: all that the windows with voxels of
      the instance see; what lies beyond has no effect, whatever patch it shares with something that has.
    baseline: gives the reference image `x'`, `zero()` by default. Under `noisy` it is that of each noisy copy, unless `given`.
    target: `t`, see `targets.Target`; of the blended logits, linear or not.
    channels: `each` occludes every channel alone, `(x, y, z, C)`. `together` occludes all of them at once, `(x, y, z, 1)`: what
      two channels tell both is lost only then.
    chunk: occluded windows evaluated together, by default 1 on CPU and 8 elsewhere. It and the number of devices of the predictor's
      mesh change the result by rounding at most.

    Beware: a patch on a boundary mixes both sides, and its edges are themselves something to see for the network. The result
    depends on `patch` and `baseline`, tells nothing finer than a patch, and adds up to nothing in particular.

    `Info.rows` are forward passes through one view, the clean one of each included; `Info.extra["patches"]` positions tried.
    Raises ValueError for a patch or stride below 1, a stride beyond the patch, which would leave gaps that are never occluded, a
    negative margin, unknown channels, or a chunk below 1; when called, as `jacobian_rows` and `baselines.reference_image`.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, StitchedPredictor
    >>> predictor = StitchedPredictor(lambda x: 3 * x[..., :1] - x[..., 1:], (4, 4, 4), target_class=0)
    >>> lesion = Instance(1, np.array([[0, 0, 1], [0, 0, 2]], np.int32))
    >>> explain = occlusion(patch=(4, 4, 2))
    >>> (saliency,), (info,) = explain(jax.random.key(0), predictor, jnp.ones((4, 4, 4, 2)), [lesion])
    >>> saliency.values[0, 0].tolist()  # each patch holds half of the lesion
    [[1.5, -0.5], [1.5, -0.5], [1.5, -0.5], [1.5, -0.5]]
    >>> info.rows, info.extra["patches"]
    (5, 2)
    """
    sides = per_axis("patch", patch)
    step = sides if stride is None else per_axis("stride", stride)
    if any(s > n for s, n in zip(step, sides, strict=True)):
        raise ValueError(f"stride {step} is larger than the patch {sides}: what lies between patches is never occluded")
    if margin is not None and margin < 0:
        raise ValueError(f"margin is {margin} voxels, expected at least 0, or None for all that the windows see")
    if channels not in get_args(Channels):
        raise ValueError(f"channels is {channels!r}, known are {', '.join(get_args(Channels))}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")

    def explain(
        key: Array,
        predictor: StitchedPredictor,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        if not instances:
            return [], []
        predictor = predictor.fitted(predictor.plan(image.shape))
        passes = _Passes(
            predictor, image, reference_image(baseline or zero(), image), head_of(predictor, target, image), chunk
        )
        plan, alone = passes.geometry.plan, np.eye(image.shape[-1], dtype=bool)
        switched = alone if channels == "each" else np.ones((1, image.shape[-1]), bool)
        maps, infos = [], []
        # one by one: what is computed together must not depend on what else is explained
        for instance in instances:
            held = held_by_view(passes.geometry, instance)
            windows = sorted({view[0] for view in held})
            region = region_of(plan, instance, margin, windows)
            low, high = patches_in(plan.shape, region, sides, step)
            effects, rows = _effects(passes, held, len(instance.voxels), low, high, switched, progress)
            values = mean_over_patches(region, low, high, effects).astype(image.dtype)
            x, y, z = region.start
            maps.append(SaliencyMap(jax.device_put(values, device_of(predictor)), (x, y, z)))
            infos.append(Info(rows=rows, windows=len(windows), extra={"patches": len(low)}))
        return maps, infos

    return explain


def occlusion_passes(
    predictor: StitchedPredictor,
    shape: tuple[int, ...],
    instance: Instance,
    *,
    patch: int | Sequence[int] = 8,
    stride: int | Sequence[int] | None = None,
    margin: int | None = 16,
) -> int:
    """Forward passes through one view that `occlusion` of each channel takes for an instance in a volume `(X, Y, Z, C)`."""
    sides = per_axis("patch", patch)
    plan = predictor.plan(shape)
    geometry = Geometry.of(plan, predictor.fitted(plan).local_fn)
    views = {view for portion in portions(geometry, [instance]) for view in portion.views}
    region = region_of(geometry.plan, instance, margin, sorted({view[0] for view in views}))
    step = sides if stride is None else per_axis("stride", stride)
    low, high = patches_in(geometry.plan.shape, region, sides, step)
    offset = np.array([lo for lo, _ in geometry.plan.padding], np.int32)
    tried = sum(int(reached(geometry, view, low + offset, high + offset).sum()) for view in views)
    return len(views) + tried * shape[-1]


class _Occluded(NamedTuple):
    """What `m` passes occlude: patches from `low` to before `high` `(m, 3)` in the padded volume, of the channels `on` `(m, C)`."""

    low: np.ndarray
    high: np.ndarray
    on: np.ndarray

    def part(self, which: slice | np.ndarray) -> "_Occluded":
        return _Occluded(self.low[which], self.high[which], self.on[which])


class _Passes:
    """Forward passes through views of one image, parts of it occluded."""

    def __init__(
        self, predictor: StitchedPredictor, image: Array, reference: Array, head: Head, chunk: int | None
    ) -> None:
        plan, local = predictor.plan(image.shape), predictor.local_fn
        self.geometry, self.head, self.channels = Geometry.of(plan, local), head, image.shape[-1]
        both = tuple(self.geometry.with_reach(pad(x, plan)) for x in (image, reference))
        shards = row_shards(predictor)
        self._shards = [(s, *(both if device_of(s) is None else jax.device_put(both, device_of(s)))) for s in shards]
        self.chunk = chunk or (1 if next(iter(self._shards[0][1].devices())).platform == "cpu" else _CHUNK)

    def logits(
        self, view: View, place: np.ndarray, occluded: _Occluded, progress: Progress | None = None
    ) -> np.ndarray:
        """The chosen logits `(m, n, classes)` at `place` `(n, 3)` of a view, for each of `m` occlusions."""
        found: list[np.ndarray] = []
        flying: deque[tuple[Array, int]] = deque()

        def land() -> None:
            logits, count = flying.popleft()
            found.append(np.asarray(logits)[:count, : len(place)])
            if progress is not None:
                progress(count)

        # few shapes of the step that picks the voxels, and one of the network: an empty patch occludes nothing
        places = fill(place, few_sizes(len(place)))
        for number, first in enumerate(range(0, len(occluded.low), self.chunk)):
            part = occluded.part(slice(first, first + self.chunk))
            batch = self._forward(number % len(self._shards), view, _Occluded(*(fill(a, self.chunk) for a in part)))
            flying.append((_pick(batch, places), len(part.low)))
            if len(flying) > _IN_FLIGHT * len(self._shards):
                land()
        while flying:
            land()
        return np.concatenate(found)

    def _forward(self, shard: int, view: View, occluded: _Occluded) -> Array:
        predictor, image, reference = self._shards[shard]
        plan, local, corner = self.geometry.plan, predictor.local_fn, self.geometry.corner(view)
        # counted from the first voxel of what the view depends on; the images begin that much before the padded volume
        relative = occluded._replace(low=occluded.low - corner, high=occluded.high - corner)
        source = (image, reference, self.geometry.place(view), relative)
        if local is None:
            return _window_logits(predictor.logits_fn, *source, plan.window, self.head)
        start, sides = np.array(view[1:], np.int32), np.array(plan.window, np.int32)
        return _tile_logits(local.function, *source, start, sides, local.field, self.head)


@partial(jax.jit, static_argnums=(5, 6))
def _window_logits(
    logits_fn: LogitsFn,
    image: Array,
    reference: Array,
    corner: Array,
    occluded: _Occluded,
    window: tuple[int, ...],
    head: Head,
) -> Array:
    batch = _occlude(image, reference, corner, occluded, window)
    logits = logits_fn(batch)
    check_grid(logits, window, len(batch))
    return head.choose(logits)


@partial(jax.jit, static_argnums=(7, 8))
def _tile_logits(
    function: Any,
    image: Array,
    reference: Array,
    corner: Array,
    occluded: _Occluded,
    start: Array,
    sides: Array,
    field: tuple[int, ...],
    head: Head,
) -> Array:
    return head.choose(function(_occlude(image, reference, corner, occluded, field), start, sides))


def _occlude(image: Array, reference: Array, corner: Array, occluded: _Occluded, window: tuple[int, ...]) -> Array:
    """The window `(K, *window, C)` at `corner`, each with its patch of the reference."""
    within = occluded.on[:, None, None, None, :]
    for axis, n in enumerate(window):
        place = jnp.arange(n, dtype=occluded.low.dtype)[None]
        along = (place >= occluded.low[:, axis, None]) & (place < occluded.high[:, axis, None])
        within = within & along.reshape([-1, *(n if a == axis else 1 for a in range(3)), 1])
    return jnp.where(within, cut(reference, corner, window)[None], cut(image, corner, window)[None])


@jax.jit
def _pick(logits: Array, place: Array) -> Array:
    return logits[:, place[:, 0], place[:, 1], place[:, 2]]


@partial(jax.jit, static_argnums=0)
def _target(head: Head, logits: Array) -> Array:
    return head(logits)


def _effects(
    passes: _Passes,
    held: dict[View, Held],
    voxels: int,
    low: np.ndarray,
    high: np.ndarray,
    switched: np.ndarray,
    progress: Progress | None,
) -> tuple[np.ndarray, int]:
    """`S(x) - S(x')` of an instance for each patch `(P, 3)` and each row of `switched` `(c, C)`, `(P, c)`; and the passes it took.

    The change of each view's logits is added to the clean blended ones, and the target applied to that.
    """
    offset = np.array([lo for lo, _ in passes.geometry.plan.padding], np.int32)
    count = len(switched)
    every = _Occluded(
        np.repeat(low + offset, count, axis=0),
        np.repeat(high + offset, count, axis=0),
        np.tile(switched, (len(low), 1)),
    )
    nothing = _Occluded(np.zeros((1, 3), np.int32), np.zeros((1, 3), np.int32), np.zeros((1, passes.channels), bool))
    clean = {view: passes.logits(view, part.place, nothing, progress)[0] for view, part in held.items()}
    rows = len(held)
    some = next(iter(clean.values()))
    # in half precision neither blending nor a difference would be left with digits
    blended = np.zeros((voxels, some.shape[-1]), np.result_type(some.dtype, np.float32))
    for view, part in held.items():
        blended[part.row] += part.share[:, None] * clean[view]
    whole = _targets(passes.head, blended)
    effects = np.zeros(len(every.low), np.float64)
    for block in _blocks(len(every.low), max(passes.chunk, _HELD // voxels)):
        occluded = every.part(block)
        changed = np.repeat(blended[None], len(occluded.low), axis=0)
        seen = np.zeros(len(occluded.low), bool)
        for view, part in held.items():
            which = np.flatnonzero(reached(passes.geometry, view, occluded.low, occluded.high))
            if not len(which):
                continue
            logits = passes.logits(view, part.place, occluded.part(which), progress)
            changed[which[:, None], part.row] += part.share[:, None] * (logits - clean[view])
            seen[which] = True
            rows += len(which)
        if seen.any():
            left = _targets(passes.head, changed[seen])
            effects[block][seen] = (whole - left).mean(axis=1, dtype=np.float64)
    return effects.reshape(len(low), count), rows


def _targets(head: Head, logits: np.ndarray) -> np.ndarray:
    """The target `(...)` of chosen logits `(..., classes)`, in few compiled shapes."""
    flat = logits.reshape(-1, logits.shape[-1])
    filled = np.pad(flat, ((0, few_sizes(len(flat)) - len(flat)), (0, 0)), mode="edge")
    return np.asarray(_target(head, filled))[: len(flat)].reshape(logits.shape[:-1])


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))
