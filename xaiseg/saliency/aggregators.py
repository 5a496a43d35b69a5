"""Reductions over the rows of an instance's Jacobian, one streaming pass, independent of how rows are chunked.

Row `i` is `∂y[v_i]/∂x`, with `v_i` the instance's `i`-th voxel in C order and `y` the blended logit of the lesion class.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from xaiseg._types import Aggregator


def mean() -> Aggregator:
    """`M = 1/|Ω| Σ_i row_i` (Spagnolo et al. 2026, eq. 2, for one sample)."""
    return Aggregator(_mean_init, _mean_update, _mean_finalize, linear=True)


def signed_max() -> Aggregator:
    """`M[v, c] = row_{i*}[v, c]`, `i* = argmax_i |row_i[v, c]|` for each input voxel and channel (eq. 3).

    Ties go to the lowest row index, whatever the order in which rows arrive.
    """
    return Aggregator(_max_init, _max_update, _max_finalize)


AGGREGATORS = {"signed_max": signed_max, "mean": mean}


class _Mean(NamedTuple):
    total: Array
    rows: Array


def _mean_init(shape: tuple[int, ...]) -> _Mean:
    return _Mean(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.float32))


def _mean_update(state: _Mean, rows: Array, index: Array, weight: Array) -> _Mean:
    return _Mean(state.total + rows.sum(0), state.rows + weight.sum())


def _mean_finalize(state: _Mean) -> Array:
    return state.total / state.rows


class _SignedMax(NamedTuple):
    value: Array
    row: Array


def _max_init(shape: tuple[int, ...]) -> _SignedMax:
    return _SignedMax(jnp.zeros(shape, jnp.float32), jnp.full(shape, jnp.iinfo(jnp.int32).max, jnp.int32))


def _max_update(state: _SignedMax, rows: Array, index: Array, weight: Array) -> _SignedMax:
    # Padding rows are zero and a zero never beats anything: their weight need not be looked at.
    def step(best: _SignedMax, entry: tuple[Array, Array]) -> tuple[_SignedMax, None]:
        row, number = entry
        new, old = jnp.abs(row), jnp.abs(best.value)
        wins = (new > old) | ((new == old) & (number < best.row))
        return _SignedMax(jnp.where(wins, row, best.value), jnp.where(wins, number, best.row)), None

    return jax.lax.scan(step, state, (rows, index))[0]


def _max_finalize(state: _SignedMax) -> Array:
    return state.value
