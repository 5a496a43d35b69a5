"""Linen layers with PyTorch's semantics: convolutions on top of `convolution`, normalisation, activation.

Flax's own differ where it matters: their ε is 1e-5 or 1e-6, their fast variance cancels for intensities far from zero, and
their running variance is the biased one.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from xaiseg.models.convolution import conv, conv_transpose

_EPSILON = 1e-5


def _same(kernel_size: Sequence[int]) -> list[tuple[int, int]]:
    """PyTorch's `padding = (k - 1) // 2` on both sides. XLA's SAME would pad an even grid by (0, 1)."""
    return [((k - 1) // 2, (k - 1) // 2) for k in kernel_size]


class Conv(nn.Module):
    """Convolution with symmetric padding. Parameters `kernel` `(*window, C_in, C_out)` and `bias` `(C_out,)`."""

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int]
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        y = conv(x, kernel, self.strides, _same(self.kernel_size))
        return y + _per_channel(self.param("bias", nn.initializers.zeros, (self.features,)), y) if self.use_bias else y


class ConvTranspose(nn.Module):
    """Transposed convolution that multiplies each side by its stride (PyTorch's `output_padding = stride - 1`, MONAI's choice).

    Parameters `kernel` `(*window, C_out, C_in)` and `bias` `(C_out,)`.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int]
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel_size, self.features, x.shape[-1])
        init = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2)
        kernel = self.param("kernel", init, shape)
        padding = _same(self.kernel_size)
        extra = [s + lo + hi - k for s, (lo, hi), k in zip(self.strides, padding, self.kernel_size, strict=True)]
        y = conv_transpose(x, kernel, self.strides, padding, extra)
        return y + _per_channel(self.param("bias", nn.initializers.zeros, (self.features,)), y) if self.use_bias else y


class BatchNorm(nn.Module):
    """Batch normalisation. Parameters `scale`, `bias`; statistics `mean`, `var`, all `(C,)`.

    In inference it is the affine map given by the running statistics. In training it uses the batch's two-pass variance and
    updates the running statistics, with the *unbiased* variance, as PyTorch does.
    """

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,), jnp.float32)
        if train:
            mean, var = _moments(x, tuple(range(x.ndim - 1)))
            if not self.is_initializing():
                count = x.size // c
                unbiased = var.reshape(c) * (count / max(count - 1, 1))
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * lax.stop_gradient(mean.reshape(c))
                running_var.value = keep * running_var.value + (1 - keep) * lax.stop_gradient(unbiased)
        else:
            mean, var = _per_channel(running_mean.value, x), _per_channel(running_var.value, x)
        factor = lax.rsqrt(var + _EPSILON) * _per_channel(scale, x)
        return x * factor + (_per_channel(bias, x) - mean * factor)


class InstanceNorm(nn.Module):
    """Instance normalisation over the spatial axes with the biased two-pass variance. `affine` adds `scale` and `bias` `(C,)`."""

    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        mean, var = _moments(x, tuple(range(1, x.ndim - 1)))
        y = (x - mean) * lax.rsqrt(var + _EPSILON)
        if not self.affine:
            return y
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return y * _per_channel(scale, x) + _per_channel(bias, x)


class PReLU(nn.Module):
    """`max(x, 0) + slope · min(x, 0)` with one learned slope, shape `(1,)` as in PyTorch."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (1,))
        return jnp.where(x >= 0, x, _per_channel(slope, x) * x)


def _moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    mean = x.mean(axes, keepdims=True)
    return mean, jnp.square(x - mean).mean(axes, keepdims=True)


def _per_channel(v: Array, like: Array) -> Array:
    return v.reshape((1,) * (like.ndim - 1) + v.shape)
