"""The gradient of a 3-D convolution with respect to its kernel, as matrix products: what training on CPU spends its time in.

It is one product for each tap of the window: what the tap sees of the input times the cotangent, summed over all positions.
XLA's CPU back end takes what JAX derives instead, a convolution with a window as large as the grid, through slow loops: 5 times
PyTorch's time for a plain convolution, 20 times and more for a transposed one (scripts/performance.md).
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax


def kernel_gradient(
    x: Array,
    cotangent: Array,
    precision: lax.Precision,
    *,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Array:
    """`(*window, C_in, C_out)`: of `sum(conv(x, kernel, strides, padding) · cotangent)` with respect to the kernel.

    x: `(N, D, H, W, C_in)`. cotangent: `(N, *out, C_out)`.
    """
    out = cotangent.shape[1:-1]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # Joined taps make wide products of narrow factors, and one copy serves several taps.
    x = jnp.concatenate(_taps(x, 3, window[2], strides[2], out[2]), axis=-1)
    if strides[1] == 1:
        rows = x.shape[2]
        shifted = [
            jnp.pad(cotangent, ((0, 0), (0, 0), (tap, rows - out[1] - tap), (0, 0), (0, 0))) for tap in range(window[1])
        ]
        cotangent = jnp.concatenate(shifted, axis=-1)
    products = []
    for planes in _taps(x, 1, window[0], strides[0], out[0]):
        views = [planes] if strides[1] == 1 else _taps(planes, 2, window[1], strides[1], out[1])
        products += [_product(view, cotangent, precision) for view in views]
    c_in, c_out = x.shape[-1] // window[2], cotangent.shape[-1]
    if strides[1] == 1:
        c_out //= window[1]
    taps = jnp.stack(products).reshape(window[0], -1, window[2], c_in, cotangent.shape[-1] // c_out, c_out)
    # the taps of H are in the second axis or in the fifth
    return jnp.moveaxis(taps, 4, 2).reshape(*window, c_in, c_out)


def _taps(x: Array, axis: int, window: int, stride: int, out: int) -> list[Array]:
    """The `window` views of an axis that meet the outputs. A strided axis is split into (block, phase): strided slices are slow."""
    if stride == 1:
        return [lax.slice_in_dim(x, tap, tap + out, axis=axis) for tap in range(window)]
    blocks = (window - 1) // stride + out
    missing = blocks * stride - x.shape[axis]
    if missing > 0:
        x = jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
    x = lax.slice_in_dim(x, 0, blocks * stride, axis=axis)
    x = x.reshape(*x.shape[:axis], blocks, stride, *x.shape[axis + 1 :])
    phases = [lax.index_in_dim(x, phase, axis + 1, keepdims=False) for phase in range(min(stride, window))]
    return [
        lax.slice_in_dim(phases[tap % stride], tap // stride, tap // stride + out, axis=axis) for tap in range(window)
    ]


def _product(x: Array, cotangent: Array, precision: lax.Precision) -> Array:
    """Summed over positions. Without the barrier XLA writes the view with its channels first, 3 to 5 times slower."""
    x = lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
    cotangent = cotangent.reshape(-1, cotangent.shape[-1])
    return lax.dot_general(x, cotangent, (((0,), (0,)), ((), ())), precision=precision)
