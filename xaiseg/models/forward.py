"""From a network to the function that is explained: slices for 2-D networks, mirrored passes, the mean over an ensemble.

All of it is linear in the logits, so gradients pass through unchanged: the saliency of an ensemble is that of its mean logits.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from xaiseg.models.platform import platform
from xaiseg.models.precision import check_precision, precision_of

Variables = Mapping[str, Any]
Offsets = Mapping[str, Array]


@dataclass(frozen=True)
class Forward:
    """How windows go through a network. Hashable, so that models of one architecture share compiled programs.

    network: a Linen module `(x, offsets) -> (logits, taps)`.
    slice_axis: of a 2-D network, the window's spatial axis of side 1; None for a 3-D one.
    mirror_axes: spatial axes of the window. members: names in the variables; empty for a single network.
    loop: run several passes in a loop on CPU too. precision: one of `precision.PRECISIONS`, of convolutions and matrix products;
    ValueError for another.
    """

    network: nn.Module
    slice_axis: int | None = None
    mirror_axes: tuple[int, ...] = ()
    members: tuple[str, ...] = ()
    loop: bool = False
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_precision(self.precision)

    @property
    def mirrorings(self) -> tuple[tuple[bool, ...], ...]:
        """Every combination of the mirror axes, none first: which of them are flipped."""
        return tuple(itertools.product((False, True), repeat=len(self.mirror_axes)))

    @property
    def passes(self) -> int:
        """Times that a window goes through a network."""
        return len(self.mirrorings) * max(len(self.members), 1)

    def sets(self, variables: Variables) -> list[Variables]:
        """The variables of each member, or of the single network."""
        return [variables[name] for name in self.members] if self.members else [variables]

    def over_passes(self, one: Callable[..., Any], variables: Variables, offsets: Offsets) -> Any:
        """`one(variables of a member, mirrored, offsets)` of every pass, its results stacked along a new first axis.

        Members are outermost. `mirrored` tells of each mirror axis whether it is flipped; `offsets` `(…, passes · K)` are split.
        Passes are rematerialised: the residuals of one may fill a device, and there may be forty. Accelerators run them in a loop,
        whose program holds the network once; on CPU a loop around convolutions is slow, so it is unrolled.
        """
        sets = self.sets(variables)
        parts = {k: jnp.moveaxis(o.reshape(*o.shape[:-1], self.passes, -1), -2, 0) for k, o in offsets.items()}
        step = jax.checkpoint(one)
        if platform() == "cpu" and not self.loop:
            passes = enumerate(itertools.product(sets, self.mirrorings))
            results = [step(v, jnp.array(m), {k: o[i] for k, o in parts.items()}) for i, (v, m) in passes]
            return jax.tree.map(lambda *a: jnp.stack(a), *results)
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *sets)
        member, mirrored = (
            jnp.array(a) for a in zip(*itertools.product(range(len(sets)), self.mirrorings), strict=True)
        )
        return jax.lax.map(
            lambda p: step(jax.tree.map(lambda a: a[p[0]], stacked), p[1], p[2]), (member, mirrored, parts)
        )

    def flip(self, x: Array, mirrored: Array) -> Array:
        """`x` `(N, *grid, K)` flipped along those mirror axes whose entry of `mirrored` is true; its own inverse."""
        for i, axis in enumerate(self.mirror_axes):
            x = jnp.where(mirrored[i], jnp.flip(x, axis + 1), x)
        return x

    def apply(self, variables: Variables, x: Array, offsets: Offsets) -> tuple[Array, dict[str, Array]]:
        """One network on windows `(N, *window, C)`, one of whose sides is 1 for a 2-D network."""
        if self.slice_axis is None:
            return self._run(variables, x, offsets)
        axis = self.slice_axis + 1
        offsets = {name: jnp.squeeze(value, axis) for name, value in offsets.items()}
        logits, taps = self._run(variables, jnp.squeeze(x, axis), offsets)
        return jnp.expand_dims(logits, axis), {k: jnp.expand_dims(v, axis) for k, v in taps.items()}

    def _run(self, variables: Variables, x: Array, offsets: Offsets) -> tuple[Array, dict[str, Array]]:
        with precision_of(self.precision):
            return self.network.apply(variables, x, offsets)


@dataclass(frozen=True)
class LogitsOf:
    """`(variables, x) -> logits`: the mean over members and mirrorings."""

    forward: Forward

    def __call__(self, variables: Variables, x: Array) -> Array:
        forward = self.forward
        if forward.passes == 1:
            (own,) = forward.sets(variables)
            return forward.apply(own, x, {})[0]

        def one(own: Variables, mirrored: Array, offsets: Offsets) -> Array:
            return forward.flip(forward.apply(own, forward.flip(x, mirrored), {})[0], mirrored)

        return forward.over_passes(one, variables, {}).mean(0)


@dataclass(frozen=True)
class TappedOf:
    """`(variables, x, offsets) -> (logits, taps)`.

    With several passes a tap holds the activations of all, mirrored back, side by side along its features: the mean logit is one
    function of all of them, and a class-activation map sums over features.
    """

    forward: Forward

    def __call__(self, variables: Variables, x: Array, offsets: Offsets) -> tuple[Array, dict[str, Array]]:
        forward = self.forward
        if forward.passes == 1:
            (own,) = forward.sets(variables)
            return forward.apply(own, x, offsets)

        def one(own: Variables, mirrored: Array, offsets: Offsets) -> tuple[Array, dict[str, Array]]:
            flipped = {k: forward.flip(o, mirrored) for k, o in offsets.items()}
            logits, taps = forward.apply(own, forward.flip(x, mirrored), flipped)
            return forward.flip(logits, mirrored), {k: forward.flip(a, mirrored) for k, a in taps.items()}

        logits, taps = forward.over_passes(one, variables, offsets)
        joined = {k: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], -1) for k, a in taps.items()}
        return logits.mean(0), joined
