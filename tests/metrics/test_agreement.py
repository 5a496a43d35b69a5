"""Agreement from sums against the textbook formulas on the numbers themselves."""

import numpy as np
import pytest

from xaiseg.metrics import bootstrap_interval, resample_weights
from xaiseg.metrics.agreement import AGREEMENT, bias, icc, lower_limit, moments, pearson, upper_limit


def test_correlation_and_limits():
    rng = np.random.default_rng(0)
    x, y = rng.gamma(2, 5, (2, 12))
    sums = moments(x, y).sum(0)
    apart = x - y
    assert pearson(sums) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert bias(sums) == pytest.approx(apart.mean())
    assert lower_limit(sums) == pytest.approx(apart.mean() - 1.96 * apart.std(ddof=1))
    assert upper_limit(sums) == pytest.approx(apart.mean() + 1.96 * apart.std(ddof=1))


def test_icc_from_the_sums_of_squares_of_an_analysis_of_variance():
    rng = np.random.default_rng(1)
    table = rng.normal(10, 4, (9, 1)) + rng.normal(0, 1, (9, 2)) + np.array([0.0, 2.5])
    n, k = table.shape
    grand, rows, columns = table.mean(), table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    msr = k * ((rows - grand) ** 2).sum() / (n - 1)
    msc = n * ((columns - grand) ** 2).sum() / (k - 1)
    mse = ((table - rows - columns + grand) ** 2).sum() / ((n - 1) * (k - 1))
    expected = (msr - mse) / (msr + (k - 1) * mse + k * (msc - mse) / n)
    assert icc(moments(*table.T).sum(0)) == pytest.approx(expected)


def test_icc_by_hand():
    """The first two raters of the example of Shrout and Fleiss 1979."""
    first, second = np.array([9.0, 6, 8, 7, 10, 6]), np.array([2.0, 1, 4, 1, 5, 2])
    # means of rows 5.5 3.5 6 4 7.5 4, squares 11.70833 apart: MSR = 2 · 11.70833 / 5; differences 7 5 4 6 5 4 of mean 31/6,
    # squares 6.83333 apart: MSE = 6.83333 / 5 / 2; MSC = 6 · (31/6)² / 2
    msr, mse, msc = 4.683333, 0.683333, 80.083333
    assert icc(moments(first, second).sum(0)) == pytest.approx((msr - mse) / (msr + mse + (msc - mse) / 3), rel=1e-6)


def test_a_large_common_volume_does_not_swallow_differences():
    x, y = 1e6 + np.array([1.0, 2, 4]), 1e6 + np.array([1.5, 2, 3])
    sums = moments(x, y).sum(0)
    assert pearson(sums) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert upper_limit(sums) - bias(sums) == pytest.approx(1.96 * (x - y).std(ddof=1))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([2.0, 2, 2], [1.0, 5, 7], {"pearson": np.nan}),  # a side that does not vary
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], {"pearson": np.nan, "bias": 0, "lower_limit": 0, "icc": np.nan}),
        ([3.0, 5], [3.0, 5], {"pearson": 1, "bias": 0, "upper_limit": 0, "icc": 1}),
        ([4.0], [3.0], {"pearson": np.nan, "bias": 1, "lower_limit": np.nan, "upper_limit": np.nan, "icc": np.nan}),
    ],
)
def test_degenerate_cohorts(x, y, expected):
    sums = moments(np.array(x), np.array(y)).sum(0)
    found = {name: float(AGREEMENT[name][0](sums)) for name in expected}
    assert found == pytest.approx(expected, nan_ok=True)


def test_resamples_are_weighted_sums():
    """A bootstrap by weights is the formula on the scans drawn."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(5, 2, (2, 6))
    weights = resample_weights(rng, 6, 40)
    values = [np.corrcoef(np.repeat(x, w), np.repeat(y, w))[0, 1] for w in weights.astype(int)]
    found = bootstrap_interval(pearson, moments(x, y), weights)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
