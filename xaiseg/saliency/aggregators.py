"""Reductions over the rows of an instance's Jacobian: one streaming pass, whatever the order and the chunks of the rows.

Row `i` is `∂t(y[v_i])/∂x`, with `v_i` the instance's `i`-th voxel in C order, `y` the blended logits and `t` the target.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from xaiseg._types import Aggregator

# Magnitudes that the quantile tells apart: far below, a row counts as zero; above, as the largest.
_SMALLEST, _LARGEST = 1e-7, 1e2


def mean() -> Aggregator:
    """`M = 1/|Ω| Σ_i row_i` (Spagnolo et al. 2026, eq. 2, for one sample)."""
    return Aggregator(_sum_init, _sum_update, _add_states, _mean_finalize, linear=True)


def total() -> Aggregator:
    """`M = Σ_i row_i`: the gradient of the target summed over the instance."""
    return Aggregator(_sum_init, _sum_update, _add_states, _sum_finalize, linear=True)


def signed_max() -> Aggregator:
    """`M[v, c] = row_{i*}[v, c]`, `i* = argmax_i |row_i[v, c]|` for each input voxel and channel (eq. 3).

    Ties go to the lowest row index, whatever the order in which rows arrive.
    """
    return Aggregator(_best_init, _best_update, _best_merge, _best_finalize)


def positive_max() -> Aggregator:
    """`M[v, c] = max_i max(row_i[v, c], 0)`: the strongest support that the voxel gives to any voxel of the instance."""
    return Aggregator(jnp.zeros, _positive_update, jnp.maximum, _as_it_is)


def negative_max() -> Aggregator:
    """`M[v, c] = min_i min(row_i[v, c], 0)`: the strongest objection, a value that is not positive."""
    return Aggregator(jnp.zeros, _negative_update, jnp.minimum, _as_it_is)


def l2_norm() -> Aggregator:
    """`M[v, c] = √(Σ_i row_i[v, c]²)`."""
    return Aggregator(jnp.zeros, _squares_update, jnp.add, jnp.sqrt)


@cache
def quantile(q: float = 0.5, *, accuracy: float = 0.05) -> Aggregator:
    """The `q`-quantile of the rows at each input voxel and channel, `0 ≤ q ≤ 1`; the median by default.

    It is the order statistic of rank `⌊q(|Ω| - 1)⌋` to within a relative error of `accuracy` (DDSketch: Masson, Rim, Lee 2019):
    counts in bins whose edges grow geometrically, so that memory does not grow with the instance, and no order of rows matters.
    Magnitudes below 1e-7 count as zero, those above 100 as 100. It takes `2·log(1e9)/log((1+a)/(1-a)) + 1` counts for each voxel
    and channel, 417 at the default accuracy and 105 at 0.2: choose it for few lesions, or on a device with room.
    """
    if not 0 <= q <= 1 or not 0 < accuracy < 1:
        raise ValueError(f"q must be from 0 to 1 and accuracy between 0 and 1, not {q} and {accuracy}")
    growth = math.log((1 + accuracy) / (1 - accuracy))
    half = math.ceil(math.log(_LARGEST / _SMALLEST) / growth)

    def init(shape: tuple[int, ...]) -> _Counts:
        return _Counts(jnp.zeros((2 * half + 1, *shape), jnp.int32), jnp.zeros((), jnp.int32))

    def update(state: _Counts, rows: Array, index: Array, weight: Array) -> _Counts:
        size, weight = jnp.abs(rows), weight.astype(jnp.int32)
        octave = jnp.ceil(jnp.log(jnp.maximum(size, _SMALLEST) / _SMALLEST) / growth).astype(jnp.int32)
        bins = half + jnp.sign(rows).astype(jnp.int32) * jnp.where(size < _SMALLEST, 0, jnp.clip(octave, 1, half))
        counted = jnp.broadcast_to(weight.reshape(-1, *[1] * (rows.ndim - 1)), rows.shape)
        flat, places = state.counts.reshape(len(state.counts), -1), jnp.arange(rows[0].size)
        flat = flat.at[bins.reshape(len(rows), -1), places[None]].add(counted.reshape(len(rows), -1))
        return _Counts(flat.reshape(state.counts.shape), state.rows + weight.sum())

    def finalize(state: _Counts) -> Array:
        # a row that was computed elsewhere only is zero here
        elsewhere = state.rows - state.counts.sum(0)
        up_to = jnp.cumsum(state.counts.at[half].add(elsewhere), axis=0)
        rank = jnp.floor(q * (state.rows - 1).astype(jnp.float32)).astype(jnp.int32)
        step = jnp.argmax(up_to > rank, axis=0) - half
        # the middle, in relative terms, of a bin (γ^(i-1), γ^i]
        value = _SMALLEST * jnp.exp(growth * jnp.abs(step).astype(jnp.float32)) * (2 / (1 + math.exp(growth)))
        return jnp.where(step == 0, jnp.zeros_like(value), jnp.sign(step).astype(jnp.float32) * value)

    return Aggregator(init, update, _add_states, finalize)


class _Counts(NamedTuple):
    counts: Array
    rows: Array


AGGREGATORS: dict[str, Callable[[], Aggregator]] = {
    "signed_max": signed_max,
    "mean": mean,
    "sum": total,
    "positive_max": positive_max,
    "negative_max": negative_max,
    "median": quantile,
    "l2_norm": l2_norm,
}


class _Sum(NamedTuple):
    total: Array
    rows: Array


def _sum_init(shape: tuple[int, ...]) -> _Sum:
    return _Sum(jnp.zeros(shape), jnp.zeros(()))


def _sum_update(state: _Sum, rows: Array, index: Array, weight: Array) -> _Sum:
    return _Sum(state.total + rows.sum(0), state.rows + weight.sum())


def _add_states(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _sum_finalize(state: _Sum) -> Array:
    return state.total


def _best_finalize(state: "_Best") -> Array:
    return state.value


def _as_it_is(state: Array) -> Array:
    return state


def _mean_finalize(state: _Sum) -> Array:
    return state.total / state.rows


class _Best(NamedTuple):
    value: Array
    row: Array


def _best_init(shape: tuple[int, ...]) -> _Best:
    return _Best(jnp.zeros(shape), jnp.full(shape, jnp.iinfo(jnp.int32).max, jnp.int32))


def _best_update(state: _Best, rows: Array, index: Array, weight: Array) -> _Best:
    # An entry that is no row is zero, and a zero never beats anything: its weight need not be looked at.
    for row, number in zip(rows, index, strict=True):
        state = _best_merge(state, _Best(row, jnp.full(row.shape, number, jnp.int32)))
    return state


def _best_merge(a: _Best, b: _Best) -> _Best:
    new, old = jnp.abs(b.value), jnp.abs(a.value)
    wins = (new > old) | ((new == old) & (b.row < a.row))
    return _Best(jnp.where(wins, b.value, a.value), jnp.where(wins, b.row, a.row))


def _positive_update(state: Array, rows: Array, index: Array, weight: Array) -> Array:
    return jnp.maximum(state, rows.max(0))


def _negative_update(state: Array, rows: Array, index: Array, weight: Array) -> Array:
    return jnp.minimum(state, rows.min(0))


def _squares_update(state: Array, rows: Array, index: Array, weight: Array) -> Array:
    return state + jnp.square(rows).sum(0)
