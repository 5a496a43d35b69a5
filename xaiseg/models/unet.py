"""The 3-D U-Net of the paper: MONAI's `UNet`, with and without residual units."""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from xaiseg.models.cone import Cone, inside
from xaiseg.models.layers import Conv, ConvTranspose, activate, check_activation, check_norm, normalise
from xaiseg.models.taps import Taps


class UNet(nn.Module):
    """U-Net with strided convolutions down and transposed convolutions up.

    Attributes:
      channels: features of each level, top first. The last is the bottleneck.
      strides: of the step from each level to the next, `len(channels) - 1` of them; a step is an int or one int per axis.
      out_channels: classes of the logits.
      norm: one of `layers.NORMS`: `batch`, `instance` (no parameters), `instance_affine`, `group:N` or `none`.
      kernel_size, up_kernel_size: an int, or one int per axis, for the way down and the way up.
      ndim: spatial axes, 3 or 2.
      residual_units: 0, or the convolutions of each `ResidualUnit` on the way down; on the way up one follows each transposed
        convolution, with one convolution.
      activation: `prelu` or one of `layers.ACTIVATIONS`.
      use_bias: of all convolutions.

    The paper's network is `UNet((32, 64, 128, 256, 512), (2, 2, 2, 2))`, 7,916,170 parameters for two input channels.
    """

    channels: Sequence[int] = (32, 64, 128, 256, 512)
    strides: Sequence[int | Sequence[int]] = (2, 2, 2, 2)
    out_channels: int = 2
    norm: str = "batch"
    kernel_size: int | Sequence[int] = 3
    up_kernel_size: int | Sequence[int] = 3
    ndim: int = 3
    residual_units: int = 0
    activation: str = "prelu"
    use_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Array,
        offsets: Mapping[str, Array] | None = None,
        train: bool = False,
        tile: tuple[Sequence[int], Array, Array] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Logits `(N, *spatial, out_channels)` and the named taps for `x` `(N, *spatial, C)`.

        Each side of the grid must be a multiple of the product of its strides. Level 0 is the top. Taps are `encoder{i}`,
        `bottleneck` and `decoder{i}`, the outputs of the levels, and `logits`. Without residual units `encoder{i}.conv`,
        `bottleneck.conv` and `decoder{i}.conv` are the outputs of the convolutions (`decoder0.conv` is the logits, and there is
        no `decoder0`); with them `encoder{i}.unit{j}.conv`, `bottleneck.unit{j}.conv`, `decoder{i}.conv` (the transposed one) and
        `decoder{i}.unit0.conv` are. `offsets[name]` is added at that tap, so that the derivative with respect to a zero offset is
        the gradient at that layer.

        `tile = (size, start, sides)` gives the logits `(N, *size, out_channels)` of the part at `start` of a grid of `sides`, the
        same numbers, and evaluates nothing else: `x` is then the field of the tile, see `cone`. It needs `is_local`. `size`,
        `start` and `sides` are multiples of `tile_alignment`; the last two may be traced.

        Raises ValueError for options or a grid that do not fit.
        """
        self._check_options(tiled=tile is not None)
        steps = [self._per_axis(s) for s in self.strides]
        grid = tile[0] if tile is not None else x.shape[1:-1]
        if any(n % f for n, f in zip(grid, self.tile_alignment, strict=True)):
            raise ValueError(
                f"a grid of {grid} does not fit the strides: each side must be a multiple of {list(self.tile_alignment)}"
            )
        tap = Taps(offsets)
        kernel, up_kernel, ones = map(self._per_axis, (self.kernel_size, self.up_kernel_size, 1))
        cone = self.cone(tile[0]) if tile is not None else None
        first = (0,) * self.ndim
        padding = first if tile is not None else None

        def norm_act(name: str, y: Array) -> Array:
            return activate(normalise(y, self.norm, f"{name}_norm", train), self.activation, f"{name}_act")

        def residual(name: str, y: Array, features: int, strides: Sequence[int], subunits: int, top: bool) -> Array:
            unit = ResidualUnit(
                features, kernel, strides, subunits, self.norm, self.activation, self.use_bias, top, name=name
            )
            return tap(name, unit(y, tap.within(name), train))

        def down(name: str, y: Array, features: int, strides: Sequence[int]) -> Array:
            if self.residual_units:
                return residual(name, y, features, strides, self.residual_units, top=False)
            conv = Conv(features, kernel, strides, self.use_bias, padding, name=f"{name}_conv")
            return tap(name, norm_act(name, tap(f"{name}.conv", conv(y))))

        def up(name: str, y: Array, features: int, strides: Sequence[int], top: bool) -> Array:
            y = ConvTranspose(features, up_kernel, strides, self.use_bias, name=f"{name}_conv")(y)
            y = tap(f"{name}.conv", y)
            if self.residual_units:
                return residual(name, norm_act(name, y), features, ones, 1, top)
            return y if top else tap(name, norm_act(name, y))

        def masked(y: Array, low: Sequence[int], level: int) -> Array:
            """What lies beyond the grid of a level becomes the zero of the padding there."""
            if tile is None:
                return y
            scale = jnp.array([math.prod(axis) for axis in zip(ones, *steps[:level], strict=True)], jnp.int32)
            return y * inside(y.shape[1:-1], low, tile[1] // scale, tile[2] // scale, y.dtype)

        skips: list[Array] = []
        if cone is not None:
            x = masked(x, cone.encoder[0][0], 0)
        for level, (features, step) in enumerate(zip(self.channels[:-1], steps, strict=True)):
            x = down(f"encoder{level}", cone.input(level, x) if cone else x, features, step)
            if cone is not None:
                x = masked(x, cone.encoder[level + 1][0], level + 1)
            skips.append(cone.skip(level + 1, x) if cone else x)
        bottom = len(steps)
        x = down("bottleneck", cone.input(bottom, x) if cone else x, self.channels[-1], ones)
        x = masked(x, first, bottom)
        for level in reversed(range(bottom)):
            x = jnp.concatenate([skips[level], x], axis=-1)
            features = self.channels[level - 1] if level else self.out_channels
            x = up(f"decoder{level}", x, features, steps[level], top=level == 0)
            if cone is not None:
                x = x[(slice(None), *map(slice, cone.decoder[level]))]
                x = masked(x, first, level) if level else x
        return tap("logits", x), tap.values

    def cone(self, tile: Sequence[int]) -> Cone:
        """What the logits of a tile of this size depend on. Raises ValueError unless the network `is_local`."""
        if not self.is_local:
            raise ValueError("this network has no logits of a tile alone")
        steps = [self._per_axis(s) for s in self.strides]
        return Cone.of(tile, steps, self._per_axis(self.kernel_size), self._per_axis(self.up_kernel_size))

    @property
    def tile_alignment(self) -> tuple[int, ...]:
        """The product of the strides along each axis."""
        return tuple(math.prod(axis) for axis in zip(*map(self._per_axis, self.strides), strict=True))

    @property
    def is_local(self) -> bool:
        """Whether a tile of the logits can be had from the part of the grid around it: no statistics over the grid, and kernels
        on the way up no wider than what the strides bring together, so that the decoder needs nothing before the tile's first
        voxel. Residual units are wider."""
        kernel, up_kernel = self._per_axis(self.kernel_size), self._per_axis(self.up_kernel_size)
        steps = [self._per_axis(step) for step in self.strides]
        narrow = all(u // 2 < s for step in steps for u, s in zip(up_kernel, step, strict=True))
        odd = all(k % 2 for k in kernel)
        return self.norm in ("batch", "none") and narrow and odd and not self.residual_units

    def _check_options(self, tiled: bool) -> None:
        if len(self.channels) < 2:
            raise ValueError(f"a U-Net needs at least two levels, channels is {tuple(self.channels)}")
        if len(self.strides) != len(self.channels) - 1:
            raise ValueError(
                f"{len(self.channels)} channels need {len(self.channels) - 1} strides, not {len(self.strides)}"
            )
        if self.residual_units < 0:
            raise ValueError(f"residual_units is {self.residual_units}, expected 0 or more")
        check_norm(self.norm)
        check_activation(self.activation)
        if tiled and not self.is_local:
            raise ValueError("this network has no logits of a tile alone")

    def _per_axis(self, value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * self.ndim if isinstance(value, int) else tuple(value)


class ResidualUnit(nn.Module):
    """conv, norm, activation, `subunits` times, plus the shortcut: MONAI's block of that name.

    The first convolution has the strides. The shortcut is a convolution, `residual`, where grid or features change: as wide as
    the others if strided, 1×1×1 if not. last_conv_only: nothing follows the last convolution. Taps `unit{j}.conv`: outputs of the
    convolutions.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int]
    subunits: int
    norm: str
    activation: str
    use_bias: bool
    last_conv_only: bool

    @nn.compact
    def __call__(self, x: Array, tap: Taps, train: bool = False) -> Array:
        ones = (1,) * len(self.kernel_size)
        y = x
        for j in range(self.subunits):
            strides = ones if j else self.strides
            conv = Conv(self.features, self.kernel_size, strides, self.use_bias, name=f"unit{j}_conv")
            y = tap(f"unit{j}.conv", conv(y))
            if not (self.last_conv_only and j == self.subunits - 1):
                y = activate(normalise(y, self.norm, f"unit{j}_norm", train), self.activation, f"unit{j}_act")
        strided = any(s != 1 for s in self.strides)
        if strided or x.shape[-1] != self.features:
            kernel_size = self.kernel_size if strided else ones
            x = Conv(self.features, kernel_size, self.strides, self.use_bias, name="residual")(x)
        return y + x
