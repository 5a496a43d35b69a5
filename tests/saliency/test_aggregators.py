"""Streaming reductions against their definition on the whole stack of rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg.saliency import AGGREGATORS, mean, signed_max

SHAPE = (3, 4, 2, 2)


def stream(aggregator, rows, order, size):
    """Rows in the given order, in chunks of `size`, the last filled up with zeros as `rows.py` does."""
    state = aggregator.init(SHAPE)
    for first in range(0, len(order), size):
        index = order[first : first + size]
        empty = size - len(index)
        chunk = np.concatenate([rows[index], np.zeros((empty, *SHAPE), np.float32)])
        weight = np.array([1] * len(index) + [0] * empty, np.float32)
        numbers = np.concatenate([index, np.zeros(empty, int)]).astype(np.int32)
        state = aggregator.update(state, jnp.asarray(chunk), jnp.asarray(numbers), jnp.asarray(weight))
    return np.asarray(aggregator.finalize(state))


def rows_with_ties():
    """Small integers: many rows share the largest magnitude, with either sign, and some places are zero in every row."""
    rows = np.random.default_rng(0).integers(-2, 3, (11, *SHAPE)).astype(np.float32)
    rows[:, 0, 0] = 0
    return rows


def by_definition(rows):
    """`argmax` takes the first of equal values: the lowest row."""
    first = np.abs(rows).argmax(0)
    return np.take_along_axis(rows, first[None], 0)[0]


def test_the_ties_are_there():
    rows = rows_with_ties()
    largest = np.abs(rows).max(0)
    assert ((rows == largest).any(0) & (rows == -largest).any(0) & (largest > 0)).mean() > 0.5


@pytest.mark.parametrize("size", [1, 2, 3, 11, 16])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_signed_max_is_its_definition_in_any_order_and_chunking(seed, size):
    rows = rows_with_ties()
    order = np.arange(11) if seed is None else np.random.default_rng(seed).permutation(11)
    np.testing.assert_array_equal(stream(signed_max(), rows, order, size), by_definition(rows))


def test_signed_max_keeps_the_sign_and_not_the_sum():
    rows = np.stack([np.full(SHAPE, v, np.float32) for v in (1, -3, 2.5, 1)])
    assert (stream(signed_max(), rows, np.arange(4), 2) == -3).all()


@pytest.mark.parametrize("size", [1, 4, 11])
@pytest.mark.parametrize("seed", [None, 3])
def test_mean_is_its_definition_in_any_order_and_chunking(seed, size):
    rows = np.random.default_rng(4).standard_normal((11, *SHAPE)).astype(np.float32)
    order = np.arange(11) if seed is None else np.random.default_rng(seed).permutation(11)
    # float32 sums of eleven numbers
    np.testing.assert_allclose(stream(mean(), rows, order, size), rows.astype(np.float64).mean(0), atol=1e-6)


def test_a_sum_of_rows_counts_for_as_many():
    rows = np.random.default_rng(5).standard_normal((5, *SHAPE)).astype(np.float32)
    aggregator = mean()
    state = aggregator.init(SHAPE)
    for part in (rows[:3], rows[3:]):
        total = jnp.asarray(part.sum(0)[None])
        state = aggregator.update(state, total, jnp.zeros(1, jnp.int32), jnp.full(1, len(part), jnp.float32))
    np.testing.assert_allclose(aggregator.finalize(state), rows.mean(0), atol=1e-6)


def test_only_linear_aggregators_may_be_summed_first():
    assert {name: make().linear for name, make in AGGREGATORS.items()} == {"signed_max": False, "mean": True}
