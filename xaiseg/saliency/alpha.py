"""Grad-CAM++'s weights: α from derivatives of second and third order, closed or exact, in the forms that are in use."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from xaiseg.saliency.cam_windows import Linearised, ScoreAtTap, over_grid, upsampled, widened
from xaiseg.saliency.derivatives import directional_derivatives, scalar_derivatives, through_transform
from xaiseg.saliency.linearise import total_memory

FORMS = ("paper", "pooled", "monai", "authors")
DERIVATIVES = ("closed_form", "exact")

_NEAR_ZERO = 1e-3
# Nested forward mode of third order carries eight numbers for each of the network's.
_ORDERS = 8
# Fresh pages cost more than batching saves.
_CPU_WORKING_SET = 64 * 2**20
_MAX_CHUNK = 128

Transform = Callable[[Array], Array]


@dataclass(frozen=True)
class PlusPlus:
    """The rule of Grad-CAM++, see `cam.gradcam_pp`. transform: None for `exp`.

    With exact derivatives, their maps are followed by those of the closed form.
    """

    form: str
    transform: Transform | None
    exact: bool
    chunk: int | None
    minimum: float

    @property
    def needs_score(self) -> bool:
        return self.transform is not None

    @property
    def channels(self) -> int:
        return 2 if self.exact else 1

    @property
    def counts(self) -> int:
        return 3

    def __call__(self, window: Linearised) -> tuple[Array, Array]:
        outer = _transformed(self.transform, window.total)
        closed, counts = _weighted(self.form, outer, window.taps(), None, window.sides)
        if not self.exact:
            return closed, counts
        higher = tuple(self._higher(window, layer) for layer in window.layers)
        exact, counts = _weighted(self.form, outer, window.taps(), higher, window.sides)
        return jnp.concatenate([exact, closed], -1), counts

    def finish(self, maps: Array, counts: list[int]) -> tuple[Array, dict[str, float]]:
        positive, near, undefined = counts
        extra = {"alpha_near_zero": near / max(positive, 1), "alpha_undefined": undefined / max(positive, 1)}
        if not self.exact:
            return maps, extra
        exact, closed = jnp.split(maps, 2, axis=-1)
        differences, peaks = jnp.abs(exact - closed).max((0, 1, 2)).tolist(), exact.max((0, 1, 2)).tolist()
        relative = [d / p if p else (float("inf") if d else 0.0) for d, p in zip(differences, peaks, strict=True)]
        return exact, extra | {"closed_form_difference": max(relative)}

    def _higher(self, window: Linearised, layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where derivatives are exact, and `S''` and `S'''` there, each `(*grid, K)`."""
        g = np.asarray(window.gradients[layer])
        # MONAI's sum of third derivatives takes in those with g < 0, to which nothing else gives a weight
        weighty = np.abs(g) if self.form == "monai" else g
        chosen = np.flatnonzero(weighty > self.minimum * np.abs(g).max())
        chunk = self.chunk or max(1, min(_MAX_CHUNK, _budget(window.activations[layer]) // (_ORDERS * window.shown)))
        f = Partial(ScoreAtTap(layer), window.score)
        _, *found = directional_derivatives(f, window.offsets[layer], chosen, chunk=chunk)
        known, second, third = np.zeros(g.size, bool), np.zeros(g.size, g.dtype), np.zeros(g.size, g.dtype)
        known[chosen] = True
        second[chosen], third[chosen] = found
        return known.reshape(g.shape), second.reshape(g.shape), third.reshape(g.shape)


@partial(jax.jit, static_argnums=0)
def _transformed(h: Transform | None, total: Array) -> tuple[Array, Array, Array]:
    """`h'`, `h''`, `h'''` at the score; of `exp` without the factor `e^S`, which α does not need and which overflows."""
    return scalar_derivatives(h or (lambda s: jnp.exp(s - jax.lax.stop_gradient(s))), total)


@partial(jax.jit, static_argnums=(0, 4))
def _weighted(form: str, outer: Any, taps: Any, higher: Any, sides: tuple[int, ...]) -> tuple[Array, Array]:
    """Maps `(*sides, T)` of a window, and the counts of all taps together."""
    known = higher or [None] * len(taps)
    found = [_of_tap(form, outer, widened(g), widened(a), k) for (g, a), k in zip(taps, known, strict=True)]
    return jnp.stack([upsampled(cam, sides) for cam, _ in found], -1), jnp.stack([c for _, c in found]).sum(0)


def _of_tap(form: str, outer: Any, g: Array, a: Array, higher: Any) -> tuple[Array, Array]:
    """`Σ_k` of the weighted activations of one tap `(*grid, K)`, on its grid; and how many positions have `g > 0`, how many of
    them a denominator near zero, and how many one that is of no use."""
    outer = tuple(h.astype(g.dtype) for h in outer)
    one, zero, grid = jnp.ones_like(g), jnp.zeros_like(g), over_grid(g)
    # In the closed form Y'' and Y''' have the factor g², which cancels in α, and would underflow; not so in MONAI's sum.
    factor = g * g if form == "monai" else one
    second, third = outer[1] * factor, outer[2] * g * factor
    if higher is not None:
        known, *inner = higher
        _, *exact = through_transform(outer, (g, *(d.astype(g.dtype) for d in inner)))
        second, third = (jnp.where(known, e, c) for e, c in zip(exact, (second, third), strict=True))
    sums = (a * third).sum(grid, keepdims=True) if form == "monai" else third * a.sum(grid, keepdims=True)
    denominator = 2 * second + sums
    positive, near = g > 0, jnp.abs(denominator) < _NEAR_ZERO * jnp.abs(second)
    if form == "monai":
        denominator = jnp.where(denominator == 0, one, denominator) + 1e-7
    usable = jnp.isfinite(denominator) & (denominator != 0)
    alpha = jnp.where(positive & usable, second / jnp.where(usable, denominator, one), zero)
    if form == "authors":
        total = alpha.sum(grid, keepdims=True)
        alpha = alpha / jnp.where(total == 0, jnp.ones_like(total), total)
    weights = jnp.where(positive, alpha * g, zero)
    if form != "paper":
        weights = weights.sum(grid, keepdims=True)
    counts = jnp.stack([positive.sum(), (positive & near).sum(), (positive & ~usable).sum()])
    return (weights * a).sum(-1), counts


def _budget(on: Array) -> int:
    """Bytes that the activations of a chunk may take on the device of an array."""
    device = next(iter(on.devices()))
    return _CPU_WORKING_SET if device.platform == "cpu" else total_memory(device) // 4
