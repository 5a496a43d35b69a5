"""The 3-D U-Net of the paper: MONAI's `UNet` without residual units."""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

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
    def __call__(self, x: Array, offsets: Mapping[str, Array] | None = None, train: bool = False) -> tuple[Array, Taps]:
        """Logits `(N, *spatial, out_channels)` and the named taps for `x` `(N, *spatial, C)`.

        Each side of the grid must be a multiple of the product of its strides. Taps are `encoder{i}.conv`, `bottleneck.conv` and
        `decoder{i}.conv`, the outputs of the convolutions (level 0 is the top; `decoder0.conv` is the logits), and the same names
        without `.conv` after normalisation and activation. `offsets[name]` is added at that tap, so that the derivative with
        respect to a zero offset is the gradient at that layer.
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

        skips = []
        for level, (features, step) in enumerate(zip(self.channels[:-1], steps, strict=True)):
            x = down(f"encoder{level}", x, features, step)
            skips.append(x)
        x = down("bottleneck", x, self.channels[-1], self._per_axis(1))
        for level in reversed(range(len(steps))):
            x = jnp.concatenate([skips[level], x], axis=-1)
            if level == 0:
                return up("decoder0", x, self.out_channels, steps[0]), taps
            x = norm_act(f"decoder{level}", up(f"decoder{level}", x, self.channels[level - 1], steps[level]))
        raise ValueError("a U-Net needs at least two levels")

    def _per_axis(self, value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * self.ndim if isinstance(value, int) else tuple(value)
