"""How many samples a peak takes: against hand-worked numbers, and against runs with that many."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Course, Info, Instance, SaliencyMap
from xaiseg.saliency.convergence import recommended_samples, relative_error
from xaiseg.saliency.noise import noisy


def info(peak, error, samples=20):
    return Info(rows=1, windows=1, samples=samples, course=Course((tuple(peak),) * samples, (tuple(error),) * samples))


@pytest.mark.parametrize(
    ("peak", "error", "expected"),
    [
        ([0.5], [0.01], 0.02),
        ([0.5, 0.1], [0.01, 0.02], 0.04),  # the weak channel on the scale of the strong one
        ([-0.5, 0.1], [0.01, 0.02], 0.04),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0], [0.1], math.inf),
    ],
)
def test_relative_error(peak, error, expected):
    assert relative_error(peak, error) == pytest.approx(expected)


@pytest.mark.parametrize(("peak", "error"), [([math.nan, 1.0], [0.1, 0.1]), ([1.0, 0.5], [0.1, math.nan])])
def test_a_number_that_is_missing_is_no_error_of_zero(peak, error):
    assert math.isnan(relative_error(peak, error))
    assert recommended_samples(info(peak, error), 0.05) is None


@pytest.mark.parametrize(
    ("peak", "error", "tolerance", "expected"),
    [
        ([1.0], [0.1], 0.05, 80),  # half the error takes four times the samples
        ([1.0], [0.1], 0.1, 20),  # just met: these
        ([1.0], [0.1], 0.2, 5),
        ([1.0], [0.1], 0.15, 9),  # 8.9
        ([1.0, 0.2], [0.01, 0.1], 0.05, 80),
        ([0.3], [0.03], 0.1, 20),  # 20.000000000000004 in floating point
        ([0.0], [0.0], 0.05, 1),
        ([0.0], [0.1], 0.05, None),
    ],
)
def test_recommended_samples(peak, error, tolerance, expected):
    assert recommended_samples(info(peak, error), tolerance) == expected


def test_as_many_samples_as_recommended_are_enough():
    """Peaks far above the rest of the map, so that no other voxel takes their place and the maximum is not biased."""
    image = jnp.zeros((3, 3, 3, 1)).at[1, 1, 1].set(10.0)

    def itself(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(image, (0, 0, 0))], [Info(1, 1)]

    def run(samples, seed):
        lesion = Instance(1, np.array([[1, 1, 1]], np.int32))
        _, (found,) = noisy(itself, samples=samples, noise=0.3)(jax.random.key(seed), None, image, [lesion])
        return found

    # s = 3, P = 10: 36 samples for 5 %; from 60 samples, to within 18 % and two standard deviations of P
    first = recommended_samples(run(60, 0), 0.05)
    assert first == pytest.approx(36, rel=0.5)
    assert recommended_samples(run(first, 1), 0.05) == pytest.approx(first, rel=0.6)


def test_a_converged_run_needs_no_more_than_it_took():
    assert recommended_samples(info([1.0, 0.3], [0.049, 0.01]), 0.05) <= 20


@pytest.mark.parametrize("tolerance", [0.0, -0.1, math.nan])
def test_a_tolerance_that_none_can_meet(tolerance):
    with pytest.raises(ValueError, match="tolerance must be positive"):
        recommended_samples(info([1.0], [0.1]), tolerance)


def test_one_sample_tells_nothing():
    with pytest.raises(ValueError, match=r"no course of the peak after 1 sample"):
        recommended_samples(Info(rows=1, windows=1), 0.05)
