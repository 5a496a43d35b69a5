"""The two convolution blocks that DynUNet and Swin UNETR are made of."""

from collections.abc import Callable, Sequence

import flax.linen as nn
from jax import Array

from xaiseg.models.layers import ACTIVATIONS, Conv, PReLU, check_activation, drop, normalise
from xaiseg.models.taps import Taps


class PlainBlock(nn.Module):
    """conv, norm, activation, twice: MONAI's `UnetBasicBlock`. Taps `conv1`, `conv2`: outputs of the convolutions.

    norm, activation: see `layers.NORMS`, `layers.ACTIVATIONS`. The first convolution has the strides. dropout: of what each
    convolution gives, in training.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int]
    norm: str = "instance"
    activation: str = "leakyrelu"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, tap: Taps, train: bool = False) -> Array:
        ones = (1,) * len(self.kernel_size)
        activate = _activation(self.activation)
        for i, strides in ((1, self.strides), (2, ones)):
            x = tap(f"conv{i}", _conv(self.features, self.kernel_size, strides, f"conv{i}")(x))
            x = activate(normalise(drop(x, self.dropout, train), self.norm, f"norm{i}", train))
        return x


class ResidualBlock(nn.Module):
    """conv, norm, activation, conv, norm, plus the shortcut, activation: MONAI's `UnetResBlock`.

    Where the features or the grid change, the shortcut is a 1×1×1 convolution with the strides and a norm (`conv3`, `norm3`).
    Taps `conv1`, `conv2`: outputs of the convolutions. dropout: as `PlainBlock`.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int]
    norm: str = "instance"
    activation: str = "leakyrelu"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, tap: Taps, train: bool = False) -> Array:
        ones = (1,) * len(self.kernel_size)
        activate = _activation(self.activation)
        y = tap("conv1", _conv(self.features, self.kernel_size, self.strides, "conv1")(x))
        y = activate(normalise(drop(y, self.dropout, train), self.norm, "norm1", train))
        y = tap("conv2", _conv(self.features, self.kernel_size, ones, "conv2")(y))
        y = normalise(drop(y, self.dropout, train), self.norm, "norm2", train)
        if x.shape[-1] != self.features or any(s != 1 for s in self.strides):
            x = _conv(self.features, ones, self.strides, "conv3")(x)
            x = normalise(drop(x, self.dropout, train), self.norm, "norm3", train)
        return activate(y + x)


def _activation(kind: str) -> Callable[[Array], Array]:
    """One for the whole block: both places of a PReLU share its slope, `act` in the parameters."""
    check_activation(kind)
    return PReLU(name="act") if kind == "prelu" else ACTIVATIONS[kind]


def _conv(features: int, kernel_size: Sequence[int], strides: Sequence[int], name: str) -> Conv:
    """A convolution without bias, with MONAI's padding for these blocks."""
    padding = [max(k - s + 1, 0) // 2 for k, s in zip(kernel_size, strides, strict=True)]
    return Conv(features, kernel_size, strides, use_bias=False, padding=padding, name=name)
