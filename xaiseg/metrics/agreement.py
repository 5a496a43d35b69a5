"""How well a predicted number (lesion volume, lesion count) agrees with the reference over a cohort.

All measures are functions of sums over scans, `(n, Σx, Σy, Σx², Σy², Σxy, Σ(x-y)²)`, as the bootstrap wants
them; x is predicted, y the reference.
"""

import numpy as np

from xaiseg.metrics.bootstrap import Statistic
from xaiseg.metrics.voxels import ratio

_LIMIT = 1.96  # standard deviations on each side of the bias that hold 95 % of the differences (Bland and Altman 1986)


def moments(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The terms of the sums, `(scans, 7)`.

    Both are shifted by one constant, on which no measure depends: squares of large volumes would swallow their differences.
    """
    shift = float(np.concatenate([predicted, reference]).mean()) if len(predicted) else 0.0
    x, y = predicted - shift, reference - shift
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y, (x - y) ** 2], axis=-1)


def pearson(sums: np.ndarray) -> np.ndarray:
    """Pearson's correlation; NaN where either side does not vary."""
    variance_x, variance_y, covariance = _spread(sums)
    return ratio(covariance, np.sqrt(np.maximum(variance_x * variance_y, 0)))


def bias(sums: np.ndarray) -> np.ndarray:
    """Mean of predicted minus reference."""
    return ratio(sums[..., 1] - sums[..., 2], sums[..., 0])


def lower_limit(sums: np.ndarray) -> np.ndarray:
    """Lower 95 % limit of agreement: bias - 1.96 standard deviations of the differences; NaN for one scan."""
    return bias(sums) - _LIMIT * np.sqrt(_difference_variance(sums))


def upper_limit(sums: np.ndarray) -> np.ndarray:
    """Upper 95 % limit of agreement: bias + 1.96 standard deviations of the differences; NaN for one scan."""
    return bias(sums) + _LIMIT * np.sqrt(_difference_variance(sums))


def icc(sums: np.ndarray) -> np.ndarray:
    """ICC(2,1): two-way random effects, absolute agreement, single measurement (Shrout and Fleiss 1979).

    `(MSR - MSE) / (MSR + MSE + 2·(MSC - MSE)/n)` for two raters, the prediction and the reference.
    """
    variance_x, variance_y, covariance = _spread(sums)
    between = (variance_x + variance_y + 2 * covariance) / 2  # MSR = 2·var((x + y)/2)
    error = _difference_variance(sums) / 2  # MSE = var(x - y)/2
    raters = sums[..., 0] * bias(sums) ** 2 / 2  # MSC
    return ratio(between - error, between + error + 2 * ratio(raters - error, sums[..., 0]))


AGREEMENT: dict[str, tuple[Statistic, str]] = {
    "pearson": (pearson, "Pearson correlation of predicted and reference"),
    "bias": (bias, "Bland-Altman bias: mean of predicted minus reference"),
    "lower_limit": (
        lower_limit,
        "Bland-Altman lower 95 % limit: bias minus 1.96 standard deviations of the differences",
    ),
    "upper_limit": (
        upper_limit,
        "Bland-Altman upper 95 % limit: bias plus 1.96 standard deviations of the differences",
    ),
    "icc": (icc, "ICC(2,1): two-way random effects, absolute agreement, single measurement"),
}


def _spread(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Variances of x and y and their covariance, of a sample; NaN for one scan."""
    n, x, y, xx, yy, xy, _ = np.moveaxis(sums, -1, 0)
    return _covariance(n, x, x, xx), _covariance(n, y, y, yy), _covariance(n, x, y, xy)


def _difference_variance(sums: np.ndarray) -> np.ndarray:
    """Variance of x - y, of a sample. From their own squares: the variances of x and y would cancel where both agree."""
    n, x, y, *_, squares = np.moveaxis(sums, -1, 0)
    return np.maximum(_covariance(n, x - y, x - y, squares), 0)


def _covariance(n: np.ndarray, a: np.ndarray, b: np.ndarray, product: np.ndarray) -> np.ndarray:
    value = product - ratio(a * b, n)
    # What cancels to within rounding is zero: else a constant side would have a correlation, of noise.
    return ratio(np.where(np.abs(value) <= 1e-12 * np.abs(product), 0.0, value), n - 1)
