"""The 3-D U-Net of the paper: MONAI's `UNet` without residual units."""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from xaiseg.models.layers import BatchNorm, Conv, ConvTranspose, InstanceNorm, PReLU

Taps = dict[str, Array]

NORMS = ("batch", "instance", "instance_affine", "none")


class UNet(nn.Module):
    """U-Net with strided convolutions down and transposed convolutions up.

    Attributes:
      channels: features of each level, top first. The last is the bottleneck.
      strides: of the step from each level to the next, `len(channels) - 1` of them; a step is an int or one int per axis.
      out_channels: classes of the logits.
      norm: `batch`, `instance` (no parameters), `instance_affine` or `none`.
      kernel_size, up_kernel_size: an int, or one int per axis, for the way down and the way up.
      ndim: spatial axes, 3 or 2.

    The paper's network is `UNet((32, 64, 128, 256, 512), (2, 2, 2, 2))`, 7,916,170 parameters for two input channels.
    """

    channels: Sequence[int] = (32, 64, 128, 256, 512)
    strides: Sequence[int | Sequence[int]] = (2, 2, 2, 2)
    out_channels: int = 2
    norm: str = "batch"
    kernel_size: int | Sequence[int] = 3
    up_kernel_size: int | Sequence[int] = 3
    ndim: int = 3

    @nn.compact
    def __call__(
        self,
        x: Array,
        offsets: Mapping[str, Array] | None = None,
        train: bool = False,
        tile: tuple[Array, Sequence[int]] | None = None,
    ) -> tuple[Array, Taps]:
        """Logits `(N, *spatial, out_channels)` and the named taps for `x` `(N, *spatial, C)`.

        Each side of the grid must be a multiple of the product of its strides. Taps are `encoder{i}.conv`, `bottleneck.conv` and
        `decoder{i}.conv`, the outputs of the convolutions (level 0 is the top; `decoder0.conv` is the logits), and the same names
        without `.conv` after normalisation and activation. `offsets[name]` is added at that tap, so that the derivative with
        respect to a zero offset is the gradient at that layer.

        `tile = (start, size)` gives the logits of that part of the grid only, `(N, *size, out_channels)`, from a decoder that is
        evaluated nowhere else: the same numbers, as long as `has_local_decoder`. `start` is a multiple of `tile_alignment`.
        """
        if len(self.strides) != len(self.channels) - 1:
            raise ValueError(
                f"{len(self.channels)} channels need {len(self.channels) - 1} strides, not {len(self.strides)}"
            )
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; known are {', '.join(NORMS)}")
        steps = [self._per_axis(s) for s in self.strides]
        factors = [math.prod(axis) for axis in zip(*steps, strict=True)]
        if any(n % f for n, f in zip(x.shape[1:-1], factors, strict=True)):
            raise ValueError(
                f"a grid of {x.shape[1:-1]} cannot be halved evenly: each side must be a multiple of {factors}"
            )
        taps: Taps = {}

        def tap(name: str, value: Array) -> Array:
            if offsets is not None and name in offsets:
                value = value + offsets[name]
            taps[name] = value
            return value

        def norm_act(name: str, y: Array) -> Array:
            if self.norm == "batch":
                y = BatchNorm(name=f"{name}_norm")(y, train)
            elif self.norm != "none":
                y = InstanceNorm(affine=self.norm == "instance_affine", name=f"{name}_norm")(y)
            return tap(name, PReLU(name=f"{name}_act")(y))

        def down(name: str, y: Array, features: int, strides: Sequence[int]) -> Array:
            y = Conv(features, self._per_axis(self.kernel_size), strides, name=f"{name}_conv")(y)
            return norm_act(name, tap(f"{name}.conv", y))

        def up(name: str, y: Array, features: int, strides: Sequence[int]) -> Array:
            y = ConvTranspose(features, self._per_axis(self.up_kernel_size), strides, name=f"{name}_conv")(y)
            return tap(f"{name}.conv", y)

        sides = _tile_sides(tile[1], steps, self._per_axis(self.up_kernel_size)) if tile is not None else []

        def cut(grid: int, y: Array) -> Array:
            """The part of a tensor on the grid below `grid` steps that the tile depends on, zero beyond the grid."""
            if tile is None:
                return y
            origin = tile[0] // jnp.array([math.prod(axis) for axis in zip(*steps[:grid], strict=True)], jnp.int32)
            corner = jnp.pad(origin, (1, 1))
            padded = jnp.pad(y, ((0, 0), *((0, n) for n in sides[grid]), (0, 0)))
            return lax.dynamic_slice(padded, corner, (y.shape[0], *sides[grid], y.shape[-1]))

        def trim(grid: int, y: Array) -> Array:
            """What an up-convolution of a cut tensor gives beyond the tile goes; beyond the grid it becomes the padding's zero."""
            if tile is None:
                return y
            y = y[(slice(None), *(slice(n) for n in sides[grid]))]
            if grid == 0:
                return y
            inside = cut(grid, jnp.ones((1, *skips[grid - 1].shape[1:-1], 1), y.dtype))
            return y * inside

        skips: list[Array] = []
        for level, (features, step) in enumerate(zip(self.channels[:-1], steps, strict=True)):
            x = down(f"encoder{level}", x, features, step)
            skips.append(x)
        x = down("bottleneck", x, self.channels[-1], self._per_axis(1))
        x = cut(len(steps), x)
        for level in reversed(range(len(steps))):
            x = jnp.concatenate([cut(level + 1, skips[level]), x], axis=-1)
            if level == 0:
                return trim(0, up("decoder0", x, self.out_channels, steps[0])), taps
            y = up(f"decoder{level}", x, self.channels[level - 1], steps[level])
            x = trim(level, norm_act(f"decoder{level}", y))
        raise ValueError("a U-Net needs at least two levels")

    @property
    def tile_alignment(self) -> tuple[int, ...]:
        """The product of the strides along each axis."""
        return tuple(math.prod(axis) for axis in zip(*map(self._per_axis, self.strides), strict=True))

    @property
    def has_local_decoder(self) -> bool:
        """Whether a logit depends on the decoder's neighbourhood only: no statistics over the grid, and kernels no wider than
        what the strides bring together, so that a tile needs nothing before its first voxel."""
        up_kernel = self._per_axis(self.up_kernel_size)
        narrow = all(k // 2 < s for step in self.strides for k, s in zip(up_kernel, self._per_axis(step), strict=True))
        return self.norm in ("batch", "none") and narrow

    def _per_axis(self, value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * self.ndim if isinstance(value, int) else tuple(value)


def _tile_sides(size: Sequence[int], steps: Sequence[Sequence[int]], kernel: Sequence[int]) -> list[tuple[int, ...]]:
    """Sides of what a tile depends on, on the grid of each level, the tile's own first.

    Output `o` of an up-convolution with stride `s`, kernel `k`, padding `p = (k-1)//2` takes inputs up to `(o+p)//s`, and, the
    tile being aligned and the kernel narrow, none before the tile's first.
    """
    sides = [tuple(size)]
    for step in steps:
        sides.append(tuple((n - 1 + (k - 1) // 2) // s + 1 for n, s, k in zip(sides[-1], step, kernel, strict=True)))
    return sides
