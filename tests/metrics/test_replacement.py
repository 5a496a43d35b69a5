"""Noisy linear imputation against a dense solve of the same equations, written as loops."""

import doctest
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg.metrics.replacement import by_baseline, linear_imputation, noisy_linear
from xaiseg.saliency.baselines import given

KEY = jax.random.key(0)


def dense(values, mask):
    """Every masked voxel is the weighted mean of its neighbours: one dense system, solved by LU."""
    masked = [tuple(v) for v in np.argwhere(mask).tolist()]
    matrix, right = np.zeros((len(masked), len(masked))), np.zeros(len(masked))
    for row, voxel in enumerate(masked):
        total = 0.0
        for step in itertools.product((-1, 0, 1), repeat=3):
            beside = tuple(v + s for v, s in zip(voxel, step, strict=True))
            if step == (0, 0, 0) or not all(0 <= b < n for b, n in zip(beside, mask.shape, strict=True)):
                continue
            weight = 1 / np.square(step).sum()
            total += weight
            if mask[beside]:
                matrix[row, masked.index(beside)] -= weight
            else:
                right[row] += weight * values[beside]
        matrix[row, row] += total
    return np.linalg.solve(matrix, right)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_imputation_is_the_dense_solution(share):
    rng = np.random.default_rng(3)
    values = 5 + rng.standard_normal((6, 5, 7))
    mask = rng.random(values.shape) < share
    # 1e-6 of the right-hand side, magnified by the condition of the matrix
    np.testing.assert_allclose(linear_imputation(values, mask), dense(values, mask), atol=1e-4)


def test_a_linear_image_comes_back_from_what_surrounds_the_mask():
    """Neighbours are symmetric, so a linear function solves the equations."""
    values = np.einsum("aijk,a->ijk", np.indices((9, 8, 7)), [1.0, -2.0, 0.5])
    mask = np.zeros(values.shape, bool)
    mask[2:7, 2:6, 1:6] = True
    np.testing.assert_allclose(linear_imputation(values, mask), values[mask], atol=1e-4)


def test_what_nothing_surrounds_takes_the_mean():
    values = np.random.default_rng(0).standard_normal((4, 4, 4))
    np.testing.assert_allclose(linear_imputation(values, np.ones(values.shape, bool)), values.mean())
    large = np.random.default_rng(0).standard_normal((24, 24, 24))
    np.testing.assert_allclose(linear_imputation(large, np.ones(large.shape, bool)), large.mean())


def test_channels_are_filled_apart_and_noise_has_its_size():
    image = jax.random.normal(KEY, (12, 12, 12, 2))
    mask = np.zeros(image.shape, bool)
    mask[2:9, 3:9, 2:10, 1] = True
    plain = np.asarray(noisy_linear(0)(KEY, image)(mask))
    noisy = np.asarray(noisy_linear(0.3)(KEY, image)(mask))
    np.testing.assert_array_equal(plain[~mask], np.asarray(image)[~mask])
    np.testing.assert_array_equal(noisy[~mask], np.asarray(image)[~mask])
    values = np.asarray(image, np.float64)[..., 1]
    np.testing.assert_allclose(plain[mask], linear_imputation(values, mask[..., 1]), atol=1e-6)
    # a standard deviation of 336 normal numbers: within 15 % but for one in 10⁴
    assert (noisy - plain)[mask].std() == pytest.approx(0.3, rel=0.15)
    np.testing.assert_array_equal(noisy, noisy_linear(0.3)(KEY, image)(mask))


def test_a_baseline_is_prepared_once():
    calls = []

    def baseline(image):
        calls.append(1)
        return given(jnp.zeros_like(image))(image)

    image = jnp.ones((2, 2, 2, 1))
    replace = by_baseline(baseline)(KEY, image)
    mask = np.zeros(image.shape, bool)
    mask[0] = True
    assert replace(mask).sum() == 4
    assert replace(~mask).sum() == 4
    assert len(calls) == 1


def test_noise_below_zero_is_refused():
    with pytest.raises(ValueError, match="noise is -1"):
        noisy_linear(-1)


def test_the_example_runs():
    result = doctest.testmod(sys.modules["xaiseg.metrics.replacement"])
    assert result.attempted > 0
    assert result.failed == 0
