"""What a tile of a network's logits depends on: the cone that opens from it towards the input.

Where no normalisation carries statistics across the grid, a logit depends on a small part of each level only. Evaluated on that
part alone, with convolutions that pad nothing and zeros beyond the grid, as padding would have put there, the network gives the
same numbers, and a pull-back of one logit costs a fraction.

Intervals count from the tile's first voxel on the grid of their level, first included, last not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

Interval = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Cone:
    """encoder: per grid, the input's first, the interval `(low, high)` that is needed of what the way down computes there.
    inputs: of that, what the convolution to the next grid takes; on the last grid, the one at the bottom.
    decoder: per grid, the sides of what is needed of the way up, from the tile's first voxel on."""

    encoder: tuple[Interval, ...]
    inputs: tuple[Interval, ...]
    decoder: tuple[tuple[int, ...], ...]

    @property
    def before(self) -> tuple[int, ...]:
        """Voxels that the field, the tile's part of the input, begins before the tile."""
        return tuple(-low for low in self.encoder[0][0])

    @property
    def after(self) -> tuple[int, ...]:
        """Voxels that the field ends after the tile."""
        return tuple(high - n for high, n in zip(self.encoder[0][1], self.decoder[0], strict=True))

    @classmethod
    def of(
        cls, tile: Sequence[int], steps: Sequence[Sequence[int]], kernel: Sequence[int], up_kernel: Sequence[int]
    ) -> "Cone":
        """Of a U-Net with one convolution at each of its `steps` down, one at the bottom and a transposed one at each step up."""
        decoder = [tuple(tile)]
        for step in steps:
            # output o of a transposed convolution with stride s, kernel k, padding p = (k-1)//2 takes inputs up to (o+p)//s and,
            # the tile being aligned and the kernel narrow, none before the tile's first
            sides = zip(decoder[-1], step, up_kernel, strict=True)
            decoder.append(tuple((n - 1 + (k - 1) // 2) // s + 1 for n, s, k in sides))
        ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
        encoder, inputs = [(zeros, decoder[-1])], []
        for level, step in reversed(list(enumerate([*steps, ones]))):
            inputs.append(_input_of(encoder[-1], step, kernel))
            skip = [(zeros, decoder[level])] if level else []
            encoder.append(_hull([inputs[-1], *skip]))
        return cls(tuple(reversed(encoder[1:])), tuple(reversed(inputs)), tuple(decoder))

    def input(self, level: int, x: Array) -> Array:
        """What the convolution from this grid takes of the way down's tensor there, `(N, *interval, C)`."""
        return cut(x, self.encoder[level], self.inputs[level])

    def skip(self, level: int, x: Array) -> Array:
        """What the way up takes of it."""
        return cut(x, self.encoder[level], ((0,) * len(self.decoder[level]), self.decoder[level]))


def cut(x: Array, held: Interval, wanted: Interval) -> Array:
    """The part of `x` `(N, *held, C)` that is wanted."""
    intervals = zip(held[0], wanted[0], wanted[1], strict=True)
    return x[(slice(None), *(slice(low - first, high - first) for first, low, high in intervals))]


def _hull(intervals: Sequence[Interval]) -> Interval:
    low, high = zip(*intervals, strict=True)
    return tuple(map(min, *low, low[0])), tuple(map(max, *high, high[0]))


def _input_of(output: Interval, step: Sequence[int], kernel: Sequence[int]) -> Interval:
    """What a convolution with symmetric padding needs for this interval of its output."""
    low = tuple(a * s - (k - 1) // 2 for a, s, k in zip(output[0], step, kernel, strict=True))
    high = tuple((b - 1) * s - (k - 1) // 2 + k for b, s, k in zip(output[1], step, kernel, strict=True))
    return low, high


def inside(shape: Sequence[int], low: Sequence[int], start: Array, sides: Array, dtype: jnp.dtype) -> Array:
    """1 where a position of a grid of `sides` is, 0 beyond: `(1, *shape, 1)` for the part that begins `low` from `start`."""
    held = jnp.ones((1,) * (len(shape) + 2), dtype)
    for axis, (n, first) in enumerate(zip(shape, low, strict=True)):
        place = start[axis] + first + jnp.arange(n, dtype=jnp.int32)
        along = ((place >= 0) & (place < sides[axis])).astype(dtype)
        held = held * along.reshape([n if a == axis + 1 else 1 for a in range(len(shape) + 2)])
    return held
