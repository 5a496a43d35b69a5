"""The one place that decides how a convolution is computed.

XLA's CPU back end is good at 2-D convolutions and up to 300 times slower than PyTorch at 3-D, strided-gradient and dilated ones.
On CPU a 3-D convolution is therefore written as 2-D convolutions with the depth (the first spatial axis) folded into the batch;
elsewhere the native 3-D convolution is the right one. Both are plain differentiable JAX code, so forward and reverse mode,
`vmap` and `jet` pass through; the folded form was chosen such that its *transpose*, which JAX derives, is as fast as itself. What
it derives for the kernel is not: training enters `learnt_kernels`, which puts `kernel_gradient` in its place.

Float32 means float32 unless `precision` is told otherwise: accelerators would round factors to TF32 or bfloat16 by default.

Arrays are channels last, `(N, *spatial, C)`; kernels are `(*window, C_in, C_out)`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from xaiseg.models.kernel_gradient import kernel_gradient
from xaiseg.models.platform import platform
from xaiseg.models.precision import at_precision, precision_in_force, precision_of

Lowering = Literal["auto", "folded", "native"]
Padding = Sequence[tuple[int, int]]

# Up to this many input channels the depth taps are joined into the channels of one 2-D convolution; beyond, copying them costs
# more than adding up one convolution per tap (measured, 96³ to 6³ grids, scripts/benchmark.py --layers).
_JOIN_TAPS_UP_TO = 8
# XLA's convolutions are made for large grids: the transpose of one with 512 features on 4³ voxels takes 59 ms, as a product of
# gathered windows 3 ms. Up to this many output voxels the windows are gathered.
_FEW_POSITIONS = 64

_learnt: ContextVar[bool] = ContextVar("learnt_kernels", default=False)


@contextmanager
def learnt_kernels() -> Iterator[None]:
    """Trace networks whose kernels are learnt: folded convolutions then have their own reverse mode, and no forward one."""
    token = _learnt.set(True)
    try:
        yield
    finally:
        _learnt.reset(token)


def conv(x: Array, kernel: Array, strides: Sequence[int], padding: Padding, lowering: Lowering = "auto") -> Array:
    """Convolution (cross-correlation, as in PyTorch) of `x` `(N, *spatial, C_in)` with `kernel` `(*window, C_in, C_out)`.

    `padding` gives zeros before and after each spatial axis. `lowering="auto"` folds 3-D convolutions on CPU. The choice is made
    when the function is traced, not inside the compiled program, so that linearisation residuals hold no untaken branch.
    """
    lowering = _chosen(lowering, kernel)
    forward = partial(_plain, strides=strides, padding=padding, lowering=lowering)
    if lowering == "native" or not _learnt.get():
        return forward(x, kernel)
    return _learn(forward, partial(_of_kernel, window=kernel.shape[:3], strides=strides, padding=padding), x, kernel)


def conv_transpose(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Padding,
    output_padding: Sequence[int],
    lowering: Lowering = "auto",
) -> Array:
    """The transpose of `conv`: `x` `(N, *spatial, C_in)` to `(N, *larger, C_out)`.

    `kernel` is the kernel of the convolution whose transpose this is, `(*window, C_out, C_in)`, so a PyTorch weight
    `(C_in, C_out, *window)` needs its axes moved and nothing flipped. The output side is
    `(n - 1)·stride - pad_before - pad_after + window + output_padding`.
    """
    spatial = [
        (n - 1) * s - lo - hi + k + extra
        for n, s, (lo, hi), k, extra in zip(
            x.shape[1:-1], strides, padding, kernel.shape[:-2], output_padding, strict=True
        )
    ]
    larger = jax.ShapeDtypeStruct((x.shape[0], *spatial, kernel.shape[-2]), x.dtype)
    lowering = _chosen(lowering, kernel)

    def forward(x: Array, kernel: Array) -> Array:
        (y,) = jax.linear_transpose(lambda z: _plain(z, kernel, strides, padding, lowering), larger)(x)
        return y

    if lowering == "native" or not _learnt.get():
        return forward(x, kernel)
    # input and output of the convolution whose transpose this is have changed places
    gradient = partial(_of_kernel, window=kernel.shape[:3], strides=strides, padding=padding)
    return _learn(forward, lambda x, cotangent: gradient(cotangent, x), x, kernel)


def _chosen(lowering: Lowering, kernel: Array) -> Lowering:
    if lowering != "auto":
        return lowering
    return "folded" if kernel.ndim == 5 and platform() == "cpu" else "native"


def _plain(x: Array, kernel: Array, strides: Sequence[int], padding: Padding, lowering: Lowering) -> Array:
    lowered = partial(_native if lowering == "native" else _folded, strides=strides, padding=padding)
    # the folded form is the CPU's: emulated as a whole, it adds the depth taps in float32 and rounds their sum once
    return at_precision(lowered, x, kernel, emulated=lowering == "folded")


def _of_kernel(x: Array, cotangent: Array, window: Sequence[int], strides: Sequence[int], padding: Padding) -> Array:
    products = partial(kernel_gradient, window=window, strides=strides, padding=padding)
    return at_precision(products, x, cotangent, emulated=True)


def _learn(
    forward: Callable[[Array, Array], Array], gradient: Callable[[Array, Array], Array], x: Array, kernel: Array
) -> Array:
    """`forward(x, kernel)`; its gradient with respect to the kernel is `gradient(x, cotangent)`."""
    precision = precision_in_force()

    def backward(factors: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        x, kernel = factors
        with precision_of(precision):
            (of_x,) = jax.linear_transpose(lambda z: forward(z, kernel), x)(cotangent)
            return of_x, gradient(x, cotangent)

    learnt = jax.custom_vjp(forward)
    learnt.defvjp(lambda x, kernel: (forward(x, kernel), (x, kernel)), backward)
    return learnt(x, kernel)


def _native(x: Array, kernel: Array, precision: lax.Precision, strides: Sequence[int], padding: Padding) -> Array:
    spatial = "DHW"[-(kernel.ndim - 2) :]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return lax.conv_general_dilated(
        x, kernel, tuple(strides), list(padding), dimension_numbers=layout, precision=precision
    )


def _folded(x: Array, kernel: Array, precision: lax.Precision, strides: Sequence[int], padding: Padding) -> Array:
    if not any(p for pair in padding for p in pair):
        if all(k == 1 for k in kernel.shape[:3]):
            x = x[:, :: strides[0], :: strides[1], :: strides[2]]
            return _matmul(x, kernel[0, 0, 0], precision)
        if tuple(kernel.shape[:3]) == tuple(strides):
            return _patches(x, kernel, precision)
    out = [
        (n + lo + hi - k) // s + 1
        for n, (lo, hi), k, s in zip(x.shape[1:-1], padding, kernel.shape, strides, strict=False)
    ]
    if math.prod(out) <= _FEW_POSITIONS:
        return _gathered(x, kernel, precision, strides, padding, out)
    return _depth_folded(x, kernel, precision, strides, padding)


def _gathered(
    x: Array, kernel: Array, precision: lax.Precision, strides: Sequence[int], padding: Padding, out: Sequence[int]
) -> Array:
    """One matrix product of all windows, gathered side by side. Its transpose is one, too, and adds up small pieces."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    taps = itertools.product(*map(range, kernel.shape[:3]))
    ends = [(n - 1) * s + 1 for n, s in zip(out, strides, strict=True)]
    views = [
        x[:, a : a + ends[0] : strides[0], b : b + ends[1] : strides[1], c : c + ends[2] : strides[2]]
        for a, b, c in taps
    ]
    return _matmul(jnp.concatenate(views, -1), kernel.reshape(-1, kernel.shape[-1]), precision)


def _matmul(x: Array, matrix: Array, precision: lax.Precision) -> Array:
    return lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())), precision=precision)


def _patches(x: Array, kernel: Array, precision: lax.Precision) -> Array:
    """Windows that tile the grid, as one matrix product: space to depth, or depth to space for the transpose."""
    n, *spatial, c = x.shape
    window = kernel.shape[:3]
    d, h, w = (size // k for size, k in zip(spatial, window, strict=True))
    x = x[:, : d * window[0], : h * window[1], : w * window[2]]
    x = x.reshape(n, d, window[0], h, window[1], w, window[2], c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return _matmul(x.reshape(n, d, h, w, math.prod(window) * c), kernel.reshape(-1, kernel.shape[-1]), precision)


def _depth_folded(x: Array, kernel: Array, precision: lax.Precision, strides: Sequence[int], padding: Padding) -> Array:
    depth, *window, c_in, c_out = kernel.shape
    taps = _depth_taps(x, depth, strides[0], padding[0])
    n, d = taps[0].shape[:2]

    def planes(z: Array, k: Array) -> Array:
        return _native(z.reshape(n * d, *z.shape[2:]), k, precision, strides[1:], padding[1:])

    if c_in <= _JOIN_TAPS_UP_TO:
        joined = jnp.moveaxis(kernel, 0, 2).reshape(*window, depth * c_in, c_out)
        y = planes(jnp.concatenate(taps, axis=-1), joined)
    else:
        y = planes(taps[0], kernel[0])
        for tap, k in zip(taps[1:], kernel[1:], strict=True):
            y = y + planes(tap, k)
    return y.reshape(n, d, *y.shape[1:])


def _depth_taps(x: Array, window: int, stride: int, padding: tuple[int, int]) -> list[Array]:
    """The `window` strided views of the depth axis, each `(N, D_out, H, W, C)`.

    A strided slice has an interior-padded transpose, which XLA's CPU back end fuses badly; splitting the axis into
    (block, phase) turns both directions into contiguous copies.
    """
    lo, hi = padding
    n = x.shape[1] + lo + hi
    out = (n - window) // stride + 1
    blocks = -(-max(n, (out - 1) * stride + window) // stride)
    x = jnp.pad(x, ((0, 0), (lo, blocks * stride - x.shape[1] - lo), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], blocks, stride, *x.shape[2:])
    return [x[:, t // stride : t // stride + out, t % stride] for t in range(window)]
