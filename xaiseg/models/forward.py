"""From a network to the function that is explained: slices for 2-D networks, mirrored passes, the mean over an ensemble.

All of it is linear in the logits, so gradients pass through unchanged: the saliency of an ensemble is that of its mean logits.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Variables = Mapping[str, Any]
Offsets = Mapping[str, Array]


@dataclass(frozen=True)
class Forward:
    """How windows go through a network. Hashable, so that models of one architecture share compiled programs.

    network: a Linen module `(x, offsets) -> (logits, taps)`.
    slice_axis: of a 2-D network, the window's spatial axis of side 1; None for a 3-D one.
    mirror_axes: spatial axes of the window. members: names in the variables; empty for a single network.
    """

    network: nn.Module
    slice_axis: int | None = None
    mirror_axes: tuple[int, ...] = ()
    members: tuple[str, ...] = ()

    @cached_property
    def flips(self) -> tuple[tuple[int, ...], ...]:
        """Every combination of the mirror axes, none first, as axes of a batch of windows."""
        axes = [a + 1 for a in self.mirror_axes]
        return tuple(c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n))

    @property
    def passes(self) -> int:
        """Times that a window goes through a network."""
        return len(self.flips) * max(len(self.members), 1)

    def over_passes(self, variables: Variables, one: Callable[[Variables, tuple[int, ...], int], Any]) -> list[Any]:
        """`one(variables of a member, axes to flip, number of the pass)` for every pass.

        Several passes are rematerialised: the residuals of one pass may fill a device, and there may be forty.
        """
        sets = [variables[name] for name in self.members] if self.members else [variables]
        step = jax.checkpoint(one, static_argnums=(1, 2)) if self.passes > 1 else one
        return [step(v, flip, i) for i, (v, flip) in enumerate(itertools.product(sets, self.flips))]

    def apply(self, variables: Variables, x: Array, offsets: Offsets) -> tuple[Array, dict[str, Array]]:
        """One network on windows `(N, *window, C)`, one of whose sides is 1 for a 2-D network."""
        if self.slice_axis is None:
            return self.network.apply(variables, x, offsets)
        axis = self.slice_axis + 1
        offsets = {name: jnp.squeeze(value, axis) for name, value in offsets.items()}
        logits, taps = self.network.apply(variables, jnp.squeeze(x, axis), offsets)
        return jnp.expand_dims(logits, axis), {k: jnp.expand_dims(v, axis) for k, v in taps.items()}


@dataclass(frozen=True)
class LogitsOf:
    """`(variables, x) -> logits`: the mean over members and mirrorings."""

    forward: Forward

    def __call__(self, variables: Variables, x: Array) -> Array:
        def one(v: Variables, flip: tuple[int, ...], number: int) -> Array:
            return jnp.flip(self.forward.apply(v, jnp.flip(x, flip), {})[0], flip)

        return _mean(self.forward.over_passes(variables, one))


@dataclass(frozen=True)
class TappedOf:
    """`(variables, x, offsets) -> (logits, taps)`.

    With several passes a tap holds the activations of all, mirrored back, side by side along its features: the mean logit is one
    function of all of them, and a class-activation map sums over features.
    """

    forward: Forward

    def __call__(self, variables: Variables, x: Array, offsets: Offsets) -> tuple[Array, dict[str, Array]]:
        passes = self.forward.passes

        def one(v: Variables, flip: tuple[int, ...], number: int) -> tuple[Array, dict[str, Array]]:
            own = {k: jnp.flip(jnp.split(o, passes, axis=-1)[number], flip) for k, o in offsets.items()}
            logits, taps = self.forward.apply(v, jnp.flip(x, flip), own)
            return jnp.flip(logits, flip), {k: jnp.flip(a, flip) for k, a in taps.items()}

        logits, taps = zip(*self.forward.over_passes(variables, one), strict=True)
        return _mean(logits), {k: jnp.concatenate([t[k] for t in taps], axis=-1) for k in taps[0]}


def _mean(parts: Any) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts) if len(parts) > 1 else total
