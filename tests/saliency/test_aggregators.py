"""Streaming reductions against their definition on the whole stack of rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg.saliency import AGGREGATORS, l2_norm, mean, negative_max, positive_max, quantile, signed_max, total

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


DEFINITIONS = {
    "signed_max": by_definition,
    "mean": lambda rows: rows.mean(0),
    "sum": lambda rows: rows.sum(0),
    "positive_max": lambda rows: np.maximum(rows, 0).max(0),
    "negative_max": lambda rows: np.minimum(rows, 0).min(0),
    "l2_norm": lambda rows: np.sqrt((rows**2).sum(0)),
}


def test_every_aggregator_has_a_definition():
    assert set(AGGREGATORS) == {*DEFINITIONS, "median"}
    assert set(AGGREGATORS.values()) == {
        signed_max,
        mean,
        total,
        positive_max,
        negative_max,
        l2_norm,
        quantile,
    }


def test_only_linear_aggregators_may_be_summed_first():
    assert {name for name, make in AGGREGATORS.items() if make().linear} == {"mean", "sum"}


@pytest.mark.parametrize("size", [1, 4, 11])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_each_is_its_definition_in_any_order_and_chunking(name, size):
    rows = np.random.default_rng(6).standard_normal((11, *SHAPE)).astype(np.float32)
    order = np.random.default_rng(7).permutation(11)
    expected = DEFINITIONS[name](rows.astype(np.float64))
    # float32 sums of eleven numbers
    np.testing.assert_allclose(stream(AGGREGATORS[name](), rows, order, size), expected, atol=1e-5)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_two_halves_merged_are_the_whole(name):
    rows, aggregator = rows_with_ties(), AGGREGATORS[name]()
    states = []
    for held in (np.arange(4, 11), np.arange(4)):
        weight = jnp.ones(len(held))
        state = aggregator.update(aggregator.init(SHAPE), jnp.asarray(rows[held]), jnp.asarray(held, jnp.int32), weight)
        states.append(state)
    merged = aggregator.finalize(aggregator.merge(*states))
    # small integers: their sums are exact
    np.testing.assert_array_equal(merged, stream(aggregator, rows, np.arange(11), 11))


@pytest.mark.parametrize("size", [1, 4, 11])
@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_quantile_is_the_order_statistic_to_its_accuracy(q, size):
    rows = np.random.default_rng(8).standard_normal((11, *SHAPE)).astype(np.float32) ** 3
    rows[:, 0, 0] = 0
    rows[3:, 0, 1] = 0
    found = stream(quantile(q, accuracy=0.1), rows, np.random.default_rng(9).permutation(11), size)
    expected = np.sort(rows, axis=0)[int(np.floor(q * 10))]
    # the bound of DDSketch, and a rounding of the logarithm at a bin's edge
    assert (np.abs(found - expected) <= 0.1001 * np.abs(expected)).all()


def test_a_quantile_counts_rows_that_were_computed_elsewhere_as_zero():
    """Three rows of 5 arrive for one part of the map only: of 8 rows the median is 0 there too if five are zero."""
    aggregator = quantile(0.5)
    state = aggregator.init((2, 1, 1, 1))
    state = aggregator.update(state, jnp.full((3, 2, 1, 1, 1), 5.0), jnp.arange(3), jnp.ones(3))
    other = aggregator.update(aggregator.init((1, 1, 1, 1)), jnp.full((5, 1, 1, 1, 1), 7.0), jnp.arange(5), jnp.ones(5))
    counts = state.counts.at[:, :1].add(other.counts)
    found = aggregator.finalize(type(state)(counts, state.rows + other.rows))
    np.testing.assert_allclose(found.ravel(), [7, 0], rtol=0.05)


@pytest.mark.parametrize("arguments", [{"q": 1.5}, {"q": -0.1}, {"accuracy": 0.0}, {"accuracy": 1.0}])
def test_a_quantile_that_is_none(arguments):
    with pytest.raises(ValueError, match="q must be from 0 to 1 and accuracy between 0 and 1"):
        quantile(**arguments)
