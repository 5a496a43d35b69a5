"""Spearman's ρ against scipy, structural similarity against loops over windows, entropy against its definition."""

import numpy as np
import pytest
from scipy import stats

from xaiseg import SaliencyMap
from xaiseg.metrics.similarity import histogram_entropy, instance_similarity, spearman, ssim

RNG = np.random.default_rng(0)


def test_spearman_is_scipys():
    a = RNG.standard_normal((5, 6, 7))
    b = np.round(a + RNG.standard_normal(a.shape))  # with ties
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a.ravel(), b.ravel()).statistic, rel=1e-12)
    assert spearman(a, np.exp(a)) == pytest.approx(1)
    for other in (a * 0, a * np.nan):
        assert np.isnan(spearman(a, other))


def brute_force(a, b, data_range, sigma=1.5):
    """Each voxel's Gaussian window written out, the array mirrored at its border."""
    radius = int(3.5 * sigma + 0.5)
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weight = line[:, None, None] * line[:, None] * line
    weight /= weight.sum()
    x, y = (np.pad(v, radius, mode="symmetric") for v in (a, b))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    found = np.zeros(a.shape)
    for place in np.ndindex(a.shape):
        window = tuple(slice(p, p + 2 * radius + 1) for p in place)
        p, q = x[window], y[window]
        mp, mq = (weight * p).sum(), (weight * q).sum()
        vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
        both = (weight * (p - mp) * (q - mq)).sum()
        found[place] = (2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
    return found


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_ssim_is_a_loop_over_windows(noise):
    a = RNG.random((7, 8, 6))
    b = a + noise * RNG.random(a.shape)
    assert ssim(a, b, data_range=1.0) == pytest.approx(brute_force(a, b, 1.0).mean(), rel=1e-9)
    assert ssim(a, b, data_range=2.0, sigma=0.8) == pytest.approx(brute_force(a, b, 2.0, 0.8).mean(), rel=1e-9)


def test_ssim_of_an_array_with_itself_and_its_opposite():
    a = RNG.standard_normal((8, 8, 8))
    assert ssim(a, a, data_range=1.0) == pytest.approx(1)
    assert ssim(9 + a, 9 - a, data_range=1.0) < -0.9  # means agree, all else is opposed


def test_entropy_of_a_histogram():
    values = np.repeat([0.0, 1.0, 2.0, 10.0], [4, 2, 1, 1])
    share = np.array([0.5, 0.25, 0.125, 0.125])
    assert histogram_entropy(values) == pytest.approx(-(share * np.log(share)).sum())
    assert histogram_entropy(3 * values) == pytest.approx(histogram_entropy(values))
    # evenly spread over all bins
    assert histogram_entropy(np.linspace(0, 1, 10_000), bins=50) == pytest.approx(np.log(50), rel=1e-3)
    assert histogram_entropy(np.ones(9)) == 0
    assert np.isnan(histogram_entropy(np.array([1.0, np.nan])))


def test_maps_of_two_instances_are_compared_where_either_is_not_zero():
    one = SaliencyMap(RNG.standard_normal((3, 4, 5, 2)), (1, 2, 0))
    other = SaliencyMap(RNG.standard_normal((4, 2, 3, 2)), (2, 3, 4))
    a, b = np.zeros((2, 9, 9, 9, 2))
    a[1:4, 2:6, 0:5], b[2:6, 3:5, 4:7] = one.values, other.values
    pairs = [(p, q) for p, q in zip(a.ravel(), b.ravel(), strict=True) if p or q]
    assert instance_similarity(one, other) == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    assert instance_similarity(one, one) == pytest.approx(1)
    zero = one._replace(values=one.values * 0)
    assert np.isnan(instance_similarity(zero, zero))
