"""How the class-activation maps of instances are put together from windows, whatever rule weighs the activations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from xaiseg._types import Explainer, Info, Instance, Progress, SaliencyMap, TappedFn
from xaiseg.inference import Box, StitchedPredictor, WindowPlan, check_grid, cut, pad
from xaiseg.inference.devices import device_of
from xaiseg.saliency.rows import crop_to_volume, head_of
from xaiseg.saliency.score import WindowScore, score, window_scores
from xaiseg.saliency.targets import Head, Target

REGIONS = ("instance", "class")

Layers = str | Sequence[str]


class Linearised(NamedTuple):
    """One window of one instance: `S_w` as a function of offsets at taps, and its derivatives there.

    score: `offsets -> (S_w, taps)`, a pytree. offsets: zero, `(1, *grid, K)`. gradients, activations: `(*grid, K)`. All by tap.
    total: the whole score `S`; 0 where the rule does not need it. sides: of the window.
    shown: bytes of all activations that the network shows of one window.
    """

    score: Partial
    layers: tuple[str, ...]
    offsets: Mapping[str, Array]
    gradients: Mapping[str, Array]
    activations: Mapping[str, Array]
    total: Array
    sides: tuple[int, ...]
    shown: int

    def taps(self) -> tuple[tuple[Array, Array], ...]:
        """Gradients and activations in the order of the layers."""
        return tuple((self.gradients[name], self.activations[name]) for name in self.layers)


class Rule(Protocol):
    """How a method weighs the activations of a window, and what it makes of the sum of the windows' maps.

    needs_score: of the whole instance. channels: of the maps, for each tap. counts: how many numbers are counted.
    """

    @property
    def needs_score(self) -> bool: ...
    @property
    def channels(self) -> int: ...
    @property
    def counts(self) -> int: ...

    def __call__(self, window: Linearised) -> tuple[Array, Array]:
        """Maps `(*sides, channels · T)` and counts `(counts,)` of a window."""
        ...

    def finish(self, maps: Array, counts: list[int]) -> tuple[Array, dict[str, float]]:
        """The map `(x, y, z, T)` and figures of an instance, from sums over its windows."""
        ...


def explainer(name: str, rule: Rule, layer: Layers, target: Target | str, region: str) -> Explainer:
    """The method `name`, as messages call it. See `cam` for what it does; raises ValueError as told there."""
    layers = (layer,) if isinstance(layer, str) else tuple(layer)
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layer is {layer!r}, expected the name of a tap or several different ones")
    if region not in REGIONS:
        raise ValueError(f"region is {region!r}, known are {', '.join(REGIONS)}")

    def explain(
        key: Array,
        predictor: StitchedPredictor,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        if predictor.tapped_fn is None:
            raise ValueError(f"{name} needs a network with taps: give the predictor a tapped_fn")
        image = jax.device_put(image, device_of(predictor))
        plan = predictor.plan(image.shape)
        window = jax.ShapeDtypeStruct((1, *plan.window, image.shape[-1]), image.dtype)
        offsets, shown = _offsets(predictor.tapped_fn, window, layers)
        head = head_of(predictor, target, image)
        if not instances:
            return [], []
        scan = _Scan(predictor, plan, pad(image, plan), head, layers, offsets, shown)
        tell = progress or (lambda windows: None)
        if region == "instance":
            found = [scan.explain(rule, instance, None, tell) for instance in instances]
        else:
            everywhere = Instance(0, np.argwhere(predictor.most_probable(predictor(image))).astype(np.int32))
            # the whole volume, so that noisy images, whose regions differ, have maps of one place
            box = Box((0, 0, 0), plan.padded_shape)
            # every info counts all passes, so each pass counts for every instance
            one = scan.explain(rule, everywhere, box, lambda windows: tell(windows * len(instances)))
            found = [one] * len(instances)
        maps, infos = zip(*found, strict=True)
        return list(maps), list(infos)

    return explain


class _Scan(NamedTuple):
    """What all windows of an image share."""

    predictor: StitchedPredictor
    plan: WindowPlan
    padded: Array
    head: Head
    layers: tuple[str, ...]
    offsets: Mapping[str, Array]
    shown: int

    def explain(self, rule: Rule, instance: Instance, box: Box | None, progress: Progress) -> tuple[SaliencyMap, Info]:
        """The map of an instance over a box of the padded volume, by default the smallest that holds its windows."""
        plan = self.plan
        parts: Any = window_scores(self.predictor, plan, self.padded, instance, self.head)
        total = jnp.zeros((), _at_least_float32(self.padded.dtype))
        if rule.needs_score:
            parts = list(parts)
            total = self._whole_score(parts, total)
        if box is None:
            _, share = plan.coverage(instance.voxels)
            box = plan.bounding_box(np.flatnonzero((share > 0).any(1)))
        maps = jnp.zeros((*box.shape, rule.channels * len(self.layers)), total.dtype, device=self.padded.sharding)
        counts, windows = np.zeros(rule.counts, np.int64), 0
        for part in parts:
            score = self._score(part.start, part.share, part.rest)
            gradients, activations = _linearise(score, self.offsets)
            window = Linearised(
                score, self.layers, self.offsets, gradients, activations, total, plan.window, self.shown
            )
            found, counted = rule(window)
            maps = _add_at(maps, found, part.start - np.array(box.start, np.int32))
            # waits, so that the gradients of one window at a time are held
            counts, windows = counts + np.asarray(counted), windows + 1
            progress(1)
        values, extra = rule.finish(maps, counts.tolist())
        return crop_to_volume(plan, values, box), Info(rows=windows, windows=windows, extra=extra)

    def _score(self, start: np.ndarray, share: np.ndarray, rest: Any) -> Partial:
        return Partial(_Score(self.head), self.predictor.tapped_fn, self.padded, start, share, rest)

    def _whole_score(self, parts: Sequence[WindowScore], total: Array) -> Array:
        """`S` of the instance. Of a linear target, the sum over windows; of another, each voxel counts in its first window."""
        seen = np.zeros(self.plan.padded_shape, bool)
        for part in parts:
            share, at = part.share, self.plan.slices(part.start)
            if not self.head.linear:
                share = np.where(seen[at], np.float32(0), share)
                seen[at] |= part.share > 0
            total = total + _value(self._score(part.start, share, part.rest)).astype(total.dtype)
        return total


@dataclass(frozen=True)
class _Score:
    """`S_w` of a window and the activations at its taps. Hashable, so that explanations share compiled programs."""

    head: Head

    def __call__(
        self, tapped_fn: TappedFn, padded: Array, start: Array, share: Array, rest: Array, offsets: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        sides = share.shape
        logits, taps = tapped_fn(cut(padded, start, sides)[None], offsets)
        check_grid(logits, sides)
        return score(self.head, logits[0], share, rest), taps


@dataclass(frozen=True)
class ScoreAtTap:
    """A window's score as a function of the offset at one tap."""

    layer: str

    def __call__(self, score: Partial, offset: Array) -> Array:
        value, _ = score({self.layer: offset})
        return value


@jax.jit
def _linearise(score: Partial, offsets: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Gradients and activations at the taps of the offsets, `(*grid, K)`, from one pass forward and back."""

    def target(offsets: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        value, taps = score(offsets)
        return value, {name: taps[name] for name in offsets}

    gradients, activations = jax.grad(target, has_aux=True)(offsets)
    return {name: g[0] for name, g in gradients.items()}, {name: a[0] for name, a in activations.items()}


@jax.jit
def _value(score: Partial) -> Array:
    value, _ = score({})
    return value


@jax.jit
def _apply(tapped_fn: TappedFn, x: Array) -> tuple[Array, dict[str, Array]]:
    return tapped_fn(x, {})


def _offsets(tapped_fn: TappedFn, window: jax.ShapeDtypeStruct, layers: Sequence[str]) -> tuple[dict[str, Array], int]:
    """Zeros for each of the layers, and the bytes of all activations that the network shows.

    Raises ValueError for a layer that is no tap, or one without a grid.
    """
    # of the compiled function, since `jax.eval_shape` would trace the network at each call
    logits, taps = _apply.eval_shape(tapped_fn, window)
    for layer in layers:
        if layer not in taps:
            raise ValueError(f"no tap {layer!r} in this network; it has {', '.join(taps)}")
        if taps[layer].ndim != len(window.shape):
            raise ValueError(f"tap {layer!r} has shape {taps[layer].shape}, expected (1, x, y, z, features)")
    shown = sum(a.size * a.dtype.itemsize for a in (logits, *taps.values()))
    return {layer: jnp.zeros(taps[layer].shape, taps[layer].dtype) for layer in layers}, shown


def over_grid(tap: Array) -> tuple[int, ...]:
    """The axes of a tap `(*grid, K)` but for its features."""
    return tuple(range(tap.ndim - 1))


def widened(tap: Array) -> Array:
    """A tap in float32 or wider: sums over a grid are not taken in half precision."""
    return tap.astype(_at_least_float32(tap.dtype))


def upsampled(cam: Array, sides: tuple[int, ...]) -> Array:
    """`ReLU` of a map on a tap's grid, trilinearly brought to a window of `sides`."""
    return jax.image.resize(jax.nn.relu(cam), sides, "linear")


@partial(jax.jit, donate_argnums=0)
def _add_at(total: Array, part: Array, corner: Array) -> Array:
    at = jnp.pad(corner, (0, 1))
    seen = jax.lax.dynamic_slice(total, at, part.shape)
    return jax.lax.dynamic_update_slice(total, seen + part.astype(total.dtype), at)


def _at_least_float32(dtype: Any) -> Any:
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
