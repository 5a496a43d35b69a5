"""MONAI's `DynUNet`, the dynamic U-Net: residual or plain blocks on the way down, plain ones on the way up."""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from xaiseg.models.blocks import PlainBlock, ResidualBlock
from xaiseg.models.layers import Conv, ConvTranspose, check_activation, check_norm, drop
from xaiseg.models.taps import Taps

PerLevel = Sequence[int | Sequence[int]]


class DynUNet(nn.Module):
    """U-Net with a block of two convolutions per level, and kernels and strides of each level and axis of their own.

    Attributes:
      filters: features of each level, top first. The last is the bottleneck.
      kernel_size, strides: of each level, an int or one int per axis. Kernels are odd, the first stride is 1.
      upsample_kernel_size: of each step up, top first. MONAI asks for it besides the strides; it equals `strides[1:]`.
      out_channels: classes of the logits.
      norm, activation: see `layers.NORMS`, `layers.ACTIVATIONS`.
      residual: whether the blocks on the way down have a shortcut (MONAI's `res_block`).
      trans_bias: whether the transposed convolutions have a bias.
      heads: decoder levels below the top, 1 to `heads`, that have logits of their own for deep supervision.
      ndim: spatial axes, 3 or 2.
      dropout: in training, of what every convolution gives, that of the logits too, as MONAI 1 has it.

    The default is the paper's network, 341,922 parameters for two input channels. The paper's dropout of 0.1 did nothing in its
    version of MONAI, 0.9.
    """

    filters: Sequence[int] = (16, 32, 64)
    kernel_size: PerLevel = (3, 3, 3)
    strides: PerLevel = (1, 2, 2)
    upsample_kernel_size: PerLevel = (2, 2)
    out_channels: int = 2
    norm: str = "instance"
    activation: str = "leakyrelu"
    residual: bool = True
    trans_bias: bool = False
    heads: int = 0
    ndim: int = 3
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Array, offsets: Mapping[str, Array] | None = None, train: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Logits `(N, *spatial, out_channels)` and the named taps for `x` `(N, *spatial, C)`.

        Each side of the grid must be a multiple of `tile_alignment`. Taps of a block are `encoder{i}` (level 0 is the top),
        `bottleneck`, `decoder{i}`, and of its convolutions' outputs `….conv1` and `….conv2`. `decoder{i}.up` is the output of the
        transposed convolution, `head{i}` the logits of level `i` on its own grid. `logits` is the last. `offsets[name]` is added
        at that tap, so that the derivative with respect to a zero offset is the gradient there.

        Raises ValueError for a grid that does not fit and for options that no DynUNet has.
        """
        self._check_options()
        if any(n % f for n, f in zip(x.shape[1:-1], self.tile_alignment, strict=True)):
            raise ValueError(
                f"a grid of {x.shape[1:-1]} does not fit: sides must be multiples of {self.tile_alignment}"
            )
        ones, zeros = (1,) * self.ndim, (0,) * self.ndim
        kernels, strides = self._per_axis(self.kernel_size), self._per_axis(self.strides)
        bottom = len(self.filters) - 1
        taps = Taps(offsets)
        style = self.norm, self.activation, self.dropout

        def head(name: str, y: Array) -> Array:
            return drop(Conv(self.out_channels, ones, ones, name=name)(y), self.dropout, train)

        skips: list[Array] = []
        encoder = ResidualBlock if self.residual else PlainBlock
        for level, features in enumerate(self.filters):
            name = f"encoder{level}" if level < bottom else "bottleneck"
            block = encoder(features, kernels[level], strides[level], *style, name=name)
            x = taps(name, block(x, taps.within(name), train))
            skips.append(x)
        for level in reversed(range(bottom)):
            name, features, step = f"decoder{level}", self.filters[level], strides[level + 1]
            x = ConvTranspose(features, step, step, self.trans_bias, padding=zeros, name=f"{name}_up")(x)
            x = drop(taps(f"{name}.up", x), self.dropout, train)
            x = jnp.concatenate([x, skips[level]], axis=-1)
            # a step up has the kernel of the level that it comes from
            block = PlainBlock(features, kernels[level + 1], ones, *style, name=name)
            x = taps(name, block(x, taps.within(name), train))
            if 1 <= level <= self.heads:
                taps(f"head{level}", head(f"head{level}", x))
        logits = taps("logits", head("output", x))
        return logits, taps.values

    @property
    def tile_alignment(self) -> tuple[int, ...]:
        """The product of the strides along each axis."""
        return tuple(math.prod(axis) for axis in zip(*self._per_axis(self.strides), strict=True))

    def _check_options(self) -> None:
        levels = len(self.filters)
        if levels < 3:
            raise ValueError(f"a DynUNet has at least three levels, not {levels}")
        for what, values, count in (
            ("kernel_size", self.kernel_size, levels),
            ("strides", self.strides, levels),
            ("upsample_kernel_size", self.upsample_kernel_size, levels - 1),
        ):
            if len(values) != count:
                raise ValueError(f"{levels} filters need {count} values of {what}, not {len(values)}")
            if any(len(axes) != self.ndim for axes in self._per_axis(values)):
                raise ValueError(f"{what} is {values}; expected per level an int or {self.ndim} of them")
        kernels, strides = self._per_axis(self.kernel_size), self._per_axis(self.strides)
        if any(s != 1 for s in strides[0]):
            raise ValueError(f"the first stride is {strides[0]}; it must be 1, or the logits miss the input's grid")
        if (ups := self._per_axis(self.upsample_kernel_size)) != strides[1:]:
            raise ValueError(f"upsample_kernel_size {ups} must equal the strides below the top, {strides[1:]}")
        for kernel, stride in zip(kernels, strides, strict=True):
            if any(k % 2 == 0 for k in kernel):
                raise ValueError(f"kernel_size {kernel} must be odd: an even one changes the grid")
            # MONAI pads (k - s + 1) / 2; the shortcut of a residual block is a convolution too, with kernel 1
            if any((1 if self.residual else k) < s - 1 for k, s in zip(kernel, stride, strict=True)):
                raise ValueError(f"strides {stride} are too wide for the kernels they go with")
        if not 0 <= self.heads < levels - 1:
            raise ValueError(f"{levels} levels can have 0 to {levels - 2} heads, not {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 or more and less than 1")
        check_norm(self.norm)
        check_activation(self.activation)

    def _per_axis(self, values: PerLevel) -> list[tuple[int, ...]]:
        return [(value,) * self.ndim if isinstance(value, int) else tuple(value) for value in values]
