"""Linen layers with PyTorch's semantics: convolutions on top of `convolution`, normalisation, activation.

Flax's own differ where it matters: their ε is 1e-5 or 1e-6, their fast variance cancels for intensities far from zero, and
their running variance is the biased one.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from xaiseg.models.convolution import conv, conv_transpose
from xaiseg.models.precision import at_precision

_EPSILON = 1e-5


def _both_sides(padding: Sequence[int] | None, kernel_size: Sequence[int]) -> list[tuple[int, int]]:
    """PyTorch's padding, the same before and after. XLA's SAME would pad an even grid by (0, 1)."""
    return [(p, p) for p in (padding if padding is not None else [(k - 1) // 2 for k in kernel_size])]


class Conv(nn.Module):
    """Convolution with symmetric padding, by default `(k - 1) // 2`.

    Parameters `kernel` `(*window, C_in, C_out)` and `bias` `(C_out,)`.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int]
    use_bias: bool = True
    padding: Sequence[int] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        y = conv(x, kernel, self.strides, _both_sides(self.padding, self.kernel_size))
        return y + _per_channel(self.param("bias", nn.initializers.zeros, (self.features,)), y) if self.use_bias else y


class ConvTranspose(nn.Module):
    """Transposed convolution that multiplies each side by its stride: PyTorch's `output_padding` is what that takes.

    padding: of the convolution whose transpose this is, by default `(k - 1) // 2`; 0 where the kernel is as wide as the stride.

    Parameters `kernel` `(*window, C_out, C_in)` and `bias` `(C_out,)`.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int]
    use_bias: bool = True
    padding: Sequence[int] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel_size, self.features, x.shape[-1])
        init = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2)
        kernel = self.param("kernel", init, shape)
        padding = _both_sides(self.padding, self.kernel_size)
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
        return _affine(self, y) if self.affine else y


class GroupNorm(nn.Module):
    """Group normalisation over the spatial axes and the channels of a group. Parameters `scale`, `bias` `(C,)`."""

    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        if c % self.groups:
            raise ValueError(f"{c} features cannot be split into {self.groups} groups")
        grouped = x.reshape(*x.shape[:-1], self.groups, c // self.groups)
        mean, var = _moments(grouped, (*range(1, x.ndim - 1), grouped.ndim - 1))
        y = ((grouped - mean) * lax.rsqrt(var + _EPSILON)).reshape(x.shape)
        return _affine(self, y)


class LayerNorm(nn.Module):
    """Normalisation over the channels of each voxel. `affine` adds `scale` and `bias` `(C,)`."""

    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        mean, var = _moments(x, (x.ndim - 1,))
        y = (x - mean) * lax.rsqrt(var + _EPSILON)
        return _affine(self, y) if self.affine else y


class Dense(nn.Module):
    """Matrix product over the channels. Parameters `kernel` `(C_in, C_out)` and `bias` `(C_out,)`."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.truncated_normal(0.02), (x.shape[-1], self.features))
        numbers = (((x.ndim - 1,), (0,)), ((), ()))
        y = at_precision(lambda a, b, precision: lax.dot_general(a, b, numbers, precision=precision), x, kernel)
        return y + _per_channel(self.param("bias", nn.initializers.zeros, (self.features,)), y) if self.use_bias else y


NORMS = ("batch", "instance", "instance_affine", "group:N", "none")


def check_norm(kind: str) -> None:
    """Raise ValueError unless `kind` names a normalisation: one of `NORMS`, with a number in place of N."""
    if (kind not in NORMS and not re.fullmatch("group:[1-9][0-9]*", kind)) or kind == "group:N":
        raise ValueError(f"norm is {kind!r}; known are {', '.join(NORMS)}")


def normalise(x: Array, kind: str, name: str, train: bool = False) -> Array:
    """The normalisation `kind`, one of `NORMS`, as the submodule `name` of the module that calls this."""
    check_norm(kind)
    if kind == "none":
        return x
    if kind == "batch":
        return BatchNorm(name=name)(x, train)
    if kind.startswith("group:"):
        return GroupNorm(int(kind.removeprefix("group:")), name=name)(x)
    return InstanceNorm(affine=kind == "instance_affine", name=name)(x)


class PReLU(nn.Module):
    """`max(x, 0) + slope · min(x, 0)` with one learned slope, shape `(1,)` as in PyTorch."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (1,))
        return jnp.where(x >= 0, x, _per_channel(slope, x) * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "leakyrelu": partial(jax.nn.leaky_relu, negative_slope=0.01),
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # PyTorch's is the exact one
    "swish": jax.nn.swish,
}


def check_activation(kind: str) -> None:
    """Raise ValueError unless `kind` names an activation: `prelu` or one of `ACTIVATIONS`."""
    if kind != "prelu" and kind not in ACTIVATIONS:
        raise ValueError(f"activation is {kind!r}; known are prelu, {', '.join(ACTIVATIONS)}")


def activate(x: Array, kind: str, name: str) -> Array:
    """The activation `kind`; `prelu` has a slope and becomes the submodule `name` of the module that calls this."""
    check_activation(kind)
    return PReLU(name=name)(x) if kind == "prelu" else ACTIVATIONS[kind](x)


def drop(x: Array, rate: float, train: bool) -> Array:
    """In training each value is zero with probability `rate`, the others grow by `1 / (1 - rate)`. Needs a key named `dropout`."""
    return nn.Dropout(rate, deterministic=False)(x) if train and rate else x


def _affine(module: nn.Module, y: Array) -> Array:
    scale = module.param("scale", nn.initializers.ones, (y.shape[-1],))
    bias = module.param("bias", nn.initializers.zeros, (y.shape[-1],))
    return y * _per_channel(scale, y) + _per_channel(bias, y)


def _moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    mean = x.mean(axes, keepdims=True)
    return mean, jnp.square(x - mean).mean(axes, keepdims=True)


def _per_channel(v: Array, like: Array) -> Array:
    return v.reshape((1,) * (like.ndim - 1) + v.shape)
