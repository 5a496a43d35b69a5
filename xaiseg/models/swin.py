"""Shifted-window attention on a grid, 3-D and 2-D alike: the transformer of MONAI's SwinUNETR (Liu et al., arXiv:2103.14030).

Sizes of windows, shifts, padding and regions are known when a network is traced: numpy computes them.
"""

import itertools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from xaiseg.models.layers import Dense, LayerNorm
from xaiseg.models.precision import at_precision

# Which corner of each 2×2×2 cell comes where in the features that a merging joins. `legacy` repeats two corners and leaves out
# two, a mistake that every network trained with MONAI up to 1.4 has learned with.
MERGINGS = {
    "legacy": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
    "merging": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "mergingv2": tuple(itertools.product((0, 1), repeat=3)),
}
_MERGING_2D = ((0, 0), (1, 0), (0, 1), (1, 1))  # MONAI has one order in two dimensions

_MASKED = -100.0
_CHUNK = 2**24  # scores at a time where they are recomputed


class SwinBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, for `x` `(N, *grid, C)`.

    window: sides of the attention windows. shifted: whether they are moved by half a window. An axis that is no longer than the
    window is one window, not shifted. remat: hold the attention scores of some windows at a time and compute them again in the
    backward pass.
    """

    num_heads: int
    window: Sequence[int]
    shifted: bool
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x + self._attention(LayerNorm(name="norm1")(x))
        y = Dense(int(x.shape[-1] * self.mlp_ratio), name="linear1")(LayerNorm(name="norm2")(x))
        return x + Dense(x.shape[-1], name="linear2")(jax.nn.gelu(y, approximate=False))

    def _attention(self, x: Array) -> Array:
        grid = x.shape[1:-1]
        window = tuple(min(n, w) for n, w in zip(grid, self.window, strict=True))
        shift = tuple(w // 2 if self.shifted and n > w else 0 for n, w in zip(grid, self.window, strict=True))
        axes = tuple(range(1, x.ndim - 1))
        # zeros, which take part in the attention: MONAI does not mask them
        padded = jnp.pad(x, ((0, 0), *((0, -n % w) for n, w in zip(grid, window, strict=True)), (0, 0)))
        if any(shift):
            padded = jnp.roll(padded, [-s for s in shift], axes)
        regions = _regions(padded.shape[1:-1], window, shift) if any(shift) else None
        attend = WindowAttention(self.num_heads, self.window, self.qkv_bias, self.remat, name="attn")
        y = join(attend(split(padded, window), regions), window, padded.shape[1:-1])
        if any(shift):
            y = jnp.roll(y, shift, axes)
        return y[(slice(None), *(slice(n) for n in grid))]


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of each window, with a learned bias for their relative position.

    Parameters `qkv`, `proj` and `position_bias` `(prod(2·window - 1), num_heads)`.
    """

    num_heads: int
    window: Sequence[int]
    qkv_bias: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, regions: np.ndarray | None) -> Array:
        """For `x` `(N, windows, tokens, C)`. Tokens attend within their region; `regions` is `(windows, tokens)`, None for one."""
        *outer, tokens, c = x.shape
        qkv = Dense(3 * c, self.qkv_bias, name="qkv")(x).reshape(*outer, tokens, 3, self.num_heads, c // self.num_heads)
        q, k, v = (jnp.moveaxis(qkv[..., i, :, :], -2, -3) for i in range(3))  # (N, windows, heads, tokens, C / heads)
        q = q * (c // self.num_heads) ** -0.5
        size = math.prod(2 * w - 1 for w in self.window)
        table = self.param("position_bias", nn.initializers.truncated_normal(0.02), (size, self.num_heads))
        # a window that was cut to a short axis uses the corner of the full window's index, whatever it means there
        index = relative_position_index(self.window)[:tokens, :tokens]
        bias = jnp.moveaxis(table[index], -1, 0)
        y = (_attend_by_chunks if self.remat else _attend)(q, k, v, bias, regions)
        return Dense(c, name="proj")(jnp.moveaxis(y, -3, -2).reshape(*outer, tokens, c))


class PatchMerging(nn.Module):
    """Halve the grid and double the features: the corners of each cell joined in the order `MERGINGS[order]`, norm, product."""

    order: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ndim, c = x.ndim - 2, x.shape[-1]
        cells = split(x, (2,) * ndim)
        corners = MERGINGS[self.order] if ndim == 3 else _MERGING_2D
        flat = [np.ravel_multi_index(corner, (2,) * ndim) for corner in corners]
        y = jnp.concatenate([cells[:, :, i] for i in flat], axis=-1)
        y = Dense(2 * c, use_bias=False, name="reduction")(LayerNorm(name="norm")(y))
        return y.reshape(x.shape[0], *(n // 2 for n in x.shape[1:-1]), 2 * c)


def split(x: Array, window: Sequence[int]) -> Array:
    """`(N, *grid, C)` as `(N, windows, tokens, C)`; the window divides the grid."""
    n, *grid, c = x.shape
    sides = [(g // w, w) for g, w in zip(grid, window, strict=True)]
    ndim = len(grid)
    x = x.reshape(n, *itertools.chain(*sides), c)
    x = x.transpose(0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1)
    return x.reshape(n, -1, math.prod(window), c)


def join(windows: Array, window: Sequence[int], grid: Sequence[int]) -> Array:
    """The inverse of `split`."""
    ndim = len(grid)
    counts = [g // w for g, w in zip(grid, window, strict=True)]
    x = windows.reshape(windows.shape[0], *counts, *window, windows.shape[-1])
    x = x.transpose(0, *itertools.chain(*((1 + i, 1 + ndim + i) for i in range(ndim))), 2 * ndim + 1)
    return x.reshape(windows.shape[0], *grid, windows.shape[-1])


def relative_position_index(window: Sequence[int]) -> np.ndarray:
    """Row of the bias table for each pair of tokens of a window, `(tokens, tokens)`."""
    tokens = np.indices(window).reshape(len(window), -1)
    apart = tokens[:, :, None] - tokens[:, None, :] + np.array(window)[:, None, None] - 1
    return np.ravel_multi_index(tuple(apart), tuple(2 * w - 1 for w in window))


def _regions(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> np.ndarray:
    """A number for each token, `(windows, tokens)`, that differs where rolling brought together what is not adjacent."""
    axes = []
    for n, w, s in zip(grid, window, shift, strict=True):
        i = np.arange(n)
        axes.append(np.where(i < n - w, 0, np.where(i < n - s, 1, 2)) if s else np.zeros(n, int))
    ids = sum(3**a * ids for a, ids in enumerate(np.meshgrid(*axes, indexing="ij")))
    counts = [n // w for n, w in zip(grid, window, strict=True)]
    cells = np.asarray(ids, np.int8).reshape(*itertools.chain(*zip(counts, window, strict=True)))
    order = (*range(0, cells.ndim, 2), *range(1, cells.ndim, 2))
    return cells.transpose(order).reshape(math.prod(counts), math.prod(window))


def _attend(q: Array, k: Array, v: Array, bias: Array, regions: Array | np.ndarray | None) -> Array:
    """`softmax(q kᵀ + bias) v` for `(N, windows, heads, tokens, features)`, bias `(heads, tokens, tokens)`.

    The sum that normalises comes from a column of ones, after the product instead of before: the matrices of scores are what takes
    time and memory, and this leaves one of them to the backward pass, which then needs no sums over their rows.
    """
    scores = _product(q, k, contract=4) + bias[None, None]
    if regions is not None:
        apart = regions[None, :, None, :, None] != jnp.asarray(regions)[None, :, None, None, :]
        scores = scores + jnp.where(apart, jnp.asarray(_MASKED, q.dtype), jnp.zeros((), q.dtype))
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    y = _product(weights, jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1), contract=3)
    return y[..., :-1] / y[..., -1:]


def _attend_by_chunks(q: Array, k: Array, v: Array, bias: Array, regions: np.ndarray | None) -> Array:
    """`_attend`, some windows at a time, whose scores are computed again in the backward pass."""
    windows, heads, tokens = q.shape[1:4]
    regions = np.zeros((windows, tokens), np.int8) if regions is None else regions

    @jax.checkpoint
    def window(args: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v = (a[:, None] for a in args[:3])
        return _attend(q, k, v, bias, args[3][None])[:, 0]

    outer = tuple(jnp.moveaxis(a, 1, 0) for a in (q, k, v))
    size = max(1, _CHUNK // (q.shape[0] * heads * tokens**2))
    return jnp.moveaxis(lax.map(window, (*outer, jnp.asarray(regions)), batch_size=min(size, windows)), 0, 1)


def _product(a: Array, b: Array, contract: int) -> Array:
    """Matrix products over the first three axes: the last axis of `a` with axis `contract` of `b`."""
    numbers = (((4,), (contract,)), ((0, 1, 2), (0, 1, 2)))
    return at_precision(lambda a, b, precision: lax.dot_general(a, b, numbers, precision=precision), a, b)
