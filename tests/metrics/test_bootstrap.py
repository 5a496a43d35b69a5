"""Intervals against scipy's on the same resamples, and their coverage on simulated patients."""

from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from xaiseg.metrics import bootstrap_interval, resample_weights, sum_by_patient


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def sums_of(scores, patients):
    return sum_by_patient(np.stack([scores, np.ones_like(scores)], -1), patients)


def test_sums_add_up_the_scans_of_a_patient():
    values = np.array([[1.0, 2], [3, 4], [10, 20], [5, 6]])
    np.testing.assert_array_equal(sum_by_patient(values, ["b", "a", "b", "c"]), [[3, 4], [11, 22], [5, 6]])


def test_a_resample_draws_as_many_patients_as_there_are():
    weights = resample_weights(np.random.default_rng(0), 7, 500)
    assert weights.shape == (500, 7)
    assert (weights.sum(1) == 7).all()
    # Each count is binomial (7, 1/7) with variance 6/7: 500 · 7 of them are within 10 % of it
    assert weights.var() == pytest.approx(6 / 7, rel=0.1)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_scipy_gives_the_same_intervals(method):
    """scipy draws the same patients from the same generator. A ratio of sums of skewed numbers, so that BCa moves."""
    rng = np.random.default_rng(4)
    sums = np.stack([rng.exponential(2, 15) ** 2, rng.integers(1, 5, 15)], -1)
    expected = stats.bootstrap(
        (np.arange(15),),
        lambda i, axis: mean(sums[i].sum(-2)),
        n_resamples=400,
        method=method,
        rng=np.random.default_rng(9),
    ).confidence_interval
    found = bootstrap_interval(mean, sums, resample_weights(np.random.default_rng(9), 15, 400))
    ends = (found.low, found.high) if method == "percentile" else (found.bca_low, found.bca_high)
    assert ends == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.estimate == pytest.approx(mean(sums.sum(0)))
    assert (found.low, found.high) != pytest.approx((found.bca_low, found.bca_high), rel=1e-2)


def test_coverage_over_patients_and_not_over_scans():
    """Scans of a patient are alike: 95 % intervals over 40 patients hold the mean in about 95 % of the cohorts, those that take
    scans for independent in far fewer.

    The variance of a mean of 160 scans, 4 a patient, is (1 + 0.25/4)/40 = 0.0266, and 1.25/160 = 0.0078 if scans were
    independent: those intervals are 0.54 times as long and hold the mean in 71 %.
    """
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40).astype(str), 4)
    scans = np.arange(160).astype(str)
    hits = {"patients": 0, "bca": 0, "scans": 0}
    cohorts = 300
    weights = {name: resample_weights(rng, n, 300) for name, n in (("patients", 40), ("scans", 160))}
    for _ in range(cohorts):
        scores = np.repeat(rng.standard_normal(40), 4) + 0.5 * rng.standard_normal(160)
        over_patients = bootstrap_interval(mean, sums_of(scores, patients), weights["patients"])
        over_scans = bootstrap_interval(mean, sums_of(scores, scans), weights["scans"])
        hits["patients"] += over_patients.low <= 0 <= over_patients.high
        hits["bca"] += over_patients.bca_low <= 0 <= over_patients.bca_high
        hits["scans"] += over_scans.low <= 0 <= over_scans.high
    # ± 4 standard errors of a share of 300 around the nominal share, and 2 % for what percentiles of 40 patients lack
    slack = 4 * np.sqrt(0.95 * 0.05 / cohorts) + 0.02
    assert abs(hits["patients"] / cohorts - 0.95) < slack
    assert abs(hits["bca"] / cohorts - 0.95) < slack
    naive = 2 * NormalDist().cdf(1.96 * np.sqrt(0.0078 / 0.0266)) - 1
    assert abs(hits["scans"] / cohorts - naive) < 4 * np.sqrt(naive * (1 - naive) / cohorts)


def test_where_there_is_no_interval():
    weights = resample_weights(np.random.default_rng(0), 1, 50)
    alone = bootstrap_interval(mean, sums_of(np.array([1.0, 3.0]), ["a", "a"]), weights)
    assert alone.estimate == 2
    assert np.isnan(alone[1:]).all()
    with np.errstate(invalid="ignore"):
        nothing = bootstrap_interval(mean, np.zeros((3, 2)), resample_weights(np.random.default_rng(0), 3, 50))
    assert np.isnan(nothing).all()


def test_all_patients_alike():
    weights = resample_weights(np.random.default_rng(0), 4, 50)
    found = bootstrap_interval(mean, sums_of(np.ones(4), list("abcd")), weights)
    assert found[:3] == (1, 1, 1)


def test_resamples_without_a_value_are_left_out():
    """One of two patients has no value: half of the resamples that hold the other have it, a quarter none."""
    sums = np.array([[3.0, 1], [0, 0]])
    weights = resample_weights(np.random.default_rng(0), 2, 50)
    assert (weights[:, 0] == 0).any()
    with np.errstate(invalid="ignore"):
        assert bootstrap_interval(mean, sums, weights)[:3] == (3, 3, 3)
