"""nnU-Net v2's two networks, `PlainConvUNet` and `ResidualEncoderUNet` of dynamic_network_architectures 0.4.4.

Both have the same decoder: a transposed convolution as wide as its stride, concatenation with the encoder's output as
[up, skip], convolutions, and a 1×1×1 segmentation head on each grid. The top head gives the logits; the others served deep
supervision in training.
"""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from xaiseg.models.layers import Conv, ConvTranspose, activate, check_activation, check_norm, normalise
from xaiseg.models.taps import Taps

PerAxis = Sequence[int]


class ConvStack(nn.Module):
    """`convs` times conv, norm, activation; the first convolution has the strides. Taps `conv{j}`: outputs of the convolutions."""

    convs: int
    features: int
    kernel_size: PerAxis
    strides: PerAxis
    use_bias: bool = True
    norm: str = "instance_affine"
    activation: str = "leakyrelu"

    @nn.compact
    def __call__(self, x: Array, tap: Taps, train: bool = False) -> Array:
        for j in range(self.convs):
            strides = self.strides if j == 0 else (1,) * len(self.kernel_size)
            y = Conv(self.features, self.kernel_size, strides, self.use_bias, name=f"conv{j}")(x)
            y = normalise(tap(f"conv{j}", y), self.norm, f"norm{j}", train)
            x = activate(y, self.activation, f"act{j}")
        return x


class ResidualBlock(nn.Module):
    """conv, norm, activation, conv, norm, plus the skip, activation: `BasicBlockD`, of ResNet-D (He et al. 2019).

    The skip averages over the strides; where the features change, a 1×1×1 convolution without bias and a norm follow
    (`skip_conv`, `skip_norm`). Taps `conv1`, `conv2`: outputs of the convolutions.
    """

    features: int
    kernel_size: PerAxis
    strides: PerAxis
    use_bias: bool = True
    norm: str = "instance_affine"
    activation: str = "leakyrelu"

    @nn.compact
    def __call__(self, x: Array, tap: Taps, train: bool = False) -> Array:
        ones = (1,) * len(self.kernel_size)
        y = tap("conv1", Conv(self.features, self.kernel_size, self.strides, self.use_bias, name="conv1")(x))
        y = activate(normalise(y, self.norm, "norm1", train), self.activation, "act1")
        y = tap("conv2", Conv(self.features, self.kernel_size, ones, self.use_bias, name="conv2")(y))
        y = normalise(y, self.norm, "norm2", train)
        x = _average_pool(x, self.strides)
        if x.shape[-1] != self.features:
            x = Conv(self.features, ones, ones, use_bias=False, name="skip_conv")(x)
            x = normalise(x, self.norm, "skip_norm", train)
        return activate(y + x, self.activation, "act2")


class _NnUNet(nn.Module):
    """What the two networks share: everything but the encoder.

    Attributes:
      features: of each stage, top first.
      kernel_sizes, strides: of each stage, odd and one int per axis; the first stage's strides are 1.
      decoder_convs: convolutions of each decoder stage, top first, one fewer than `features`.
      out_channels: classes of the logits.
      conv_bias: of all convolutions but the heads, which have one, and the skips', which have none.
      norm, activation: see `layers.NORMS`, `layers.ACTIVATIONS`.
      ndim: spatial axes, 3 or 2.
    """

    features: Sequence[int] = (32, 64, 128, 256, 320, 320)
    kernel_sizes: Sequence[PerAxis] = ((3, 3, 3),) * 6
    strides: Sequence[PerAxis] = ((1, 1, 1), *((2, 2, 2),) * 5)
    decoder_convs: Sequence[int] = (2, 2, 2, 2, 2)
    out_channels: int = 2
    conv_bias: bool = True
    norm: str = "instance_affine"
    activation: str = "leakyrelu"
    ndim: int = 3

    @nn.compact
    def __call__(
        self, x: Array, offsets: Mapping[str, Array] | None = None, train: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Logits `(N, *spatial, out_channels)` and the named taps for `x` `(N, *spatial, C)`.

        Stage `s` is the grid after the strides of stages 0 to `s`. Taps: `encoder{s}` and `decoder{s}`, the outputs of the stages;
        `decoder{s}.up`, of the transposed convolution onto that grid; `decoder{s}.conv{j}`, of its convolutions before norm;
        `head{s}`, the logits of the lower grids; `logits`; and the encoder's own. `offsets[name]` is added at that tap.
        Raises ValueError for options that do not fit together and for sides that are no multiple of `tile_alignment`.
        """
        self.check(x.shape[1:-1])
        taps = Taps(offsets)
        skips = self._encode(x, taps, train)
        x = skips.pop()
        for s in reversed(range(len(skips))):
            name, stride = f"decoder{s}", self.strides[s + 1]
            none = (0,) * len(stride)
            up = ConvTranspose(self.features[s], stride, stride, self.conv_bias, padding=none, name=f"{name}_up")(x)
            x = jnp.concatenate([taps(f"{name}.up", up), skips[s]], axis=-1)
            x = taps(name, self._stack(name, s, self.decoder_convs[s])(x, taps.within(name), train))
            head = Conv(self.out_channels, self._ones, self._ones, name=f"head{s}")(x)
            logits = taps(f"head{s}" if s else "logits", head)
        return logits, taps.values

    def check(self, grid: Sequence[int]) -> None:
        """Raise ValueError unless the options fit together and `grid`, the spatial sides of an input, fits them."""
        check_norm(self.norm)
        check_activation(self.activation)
        n = len(self.features)
        lengths = [len(self.kernel_sizes), len(self.strides), len(self._per_stage), len(self.decoder_convs) + 1]
        if n < 2 or any(length != n for length in lengths):
            raise ValueError(
                f"{n} stages of features, {lengths[0]} kernel sizes, {lengths[1]} strides, {lengths[2]} encoder stages and "
                f"{lengths[3] - 1} decoder stages do not fit together; give one per stage, two stages or more, and one fewer "
                "decoder stages"
            )
        if any(len(axes) != self.ndim for axes in (*self.kernel_sizes, *self.strides, grid)):
            raise ValueError(f"a {self.ndim}-D network: kernel sizes, strides and the grid need {self.ndim} axes each")
        if any(k % 2 == 0 for kernel in self.kernel_sizes for k in kernel):
            raise ValueError(f"kernel sizes are {self.kernel_sizes}; each must be odd")
        if any(s != 1 for s in self.strides[0]):
            raise ValueError(
                f"the first stage has strides {self.strides[0]}; they must be 1, or the logits were coarser"
            )
        if any(side % f for side, f in zip(grid, self.tile_alignment, strict=True)):
            raise ValueError(f"a grid of {tuple(grid)} does not fit: sides must be multiples of {self.tile_alignment}")

    @property
    def tile_alignment(self) -> tuple[int, ...]:
        """The product of the strides along each axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))

    def _encode(self, x: Array, taps: Taps, train: bool) -> list[Array]:
        raise NotImplementedError

    @property
    def _per_stage(self) -> Sequence[int]:
        raise NotImplementedError

    @property
    def _ones(self) -> tuple[int, ...]:
        return (1,) * self.ndim

    def _stack(self, name: str, stage: int, convs: int, strides: PerAxis | None = None) -> ConvStack:
        kernel = self.kernel_sizes[stage]
        strides = self._ones if strides is None else strides
        features = self.features[stage]
        return ConvStack(convs, features, kernel, strides, self.conv_bias, self.norm, self.activation, name=name)


class PlainConvUNet(_NnUNet):
    """nnU-Net v2's default network. Its own taps: `encoder{s}.conv{j}`, outputs of the convolutions before norm.

    convs: convolutions of each encoder stage. The rest as in `_NnUNet`. The defaults are what nnU-Net plans for isotropic 3-D
    scans: 31,195,594 parameters for one input channel.
    """

    convs: Sequence[int] = (2, 2, 2, 2, 2, 2)

    def _encode(self, x: Array, taps: Taps, train: bool) -> list[Array]:
        outputs = []
        for s, convs in enumerate(self.convs):
            name = f"encoder{s}"
            x = taps(name, self._stack(name, s, convs, self.strides[s])(x, taps.within(name), train))
            outputs.append(x)
        return outputs

    @property
    def _per_stage(self) -> Sequence[int]:
        return self.convs


class ResidualEncoderUNet(_NnUNet):
    """nnU-Net v2's network of the ResEnc plans.

    Its own taps: `stem.conv0`, `stem`, and `encoder{s}.block{b}.conv1`, `.conv2`, outputs of the convolutions before norm.

    blocks: residual blocks of each encoder stage. stem_features: of the convolution ahead of them, by default those of the
    first stage. The rest as in `_NnUNet`.
    """

    blocks: Sequence[int] = (1, 3, 4, 6, 6, 6)
    decoder_convs: Sequence[int] = (1, 1, 1, 1, 1)
    stem_features: int | None = None

    def _encode(self, x: Array, taps: Taps, train: bool) -> list[Array]:
        style = self.conv_bias, self.norm, self.activation
        stem = ConvStack(
            1, self.stem_features or self.features[0], self.kernel_sizes[0], self._ones, *style, name="stem"
        )
        x = taps("stem", stem(x, taps.within("stem"), train))
        outputs = []
        for s, blocks in enumerate(self.blocks):
            stage = taps.within(f"encoder{s}")
            for b in range(blocks):
                strides = self.strides[s] if b == 0 else self._ones
                name = f"encoder{s}_block{b}"
                block = ResidualBlock(self.features[s], self.kernel_sizes[s], strides, *style, name=name)
                x = block(x, stage.within(f"block{b}"), train)
            outputs.append(taps(f"encoder{s}", x))
            x = outputs[-1]
        return outputs

    @property
    def _per_stage(self) -> Sequence[int]:
        return self.blocks


def _average_pool(x: Array, window: PerAxis) -> Array:
    """Means over windows that tile the grid."""
    n, *sides, c = x.shape
    if all(w == 1 for w in window):
        return x
    split = [m for side, w in zip(sides, window, strict=True) for m in (side // w, w)]
    return x.reshape(n, *split, c).mean(tuple(range(2, 2 + 2 * len(sides), 2)))
