"""Bootstrap intervals over patients: scans, and lesions, of one patient are alike, so patients are what is resampled.

Every statistic here is a function of sums over scans: a mean of a sum and a count, a pooled rate of sums of lesions, a correlation
of sums of products. A resample is then a weight for each patient, its sums are one product of matrices, and all statistics see the
same resamples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

Statistic = Callable[[np.ndarray], np.ndarray]
"""From sums `(…, k)` to values `(…)`; NaN where there is none."""


class Interval(NamedTuple):
    """A statistic of all patients with its percentile and BCa intervals; NaN where there is none."""

    estimate: float
    low: float
    high: float
    bca_low: float
    bca_high: float


def resample_weights(rng: np.random.Generator, patients: int, resamples: int) -> np.ndarray:
    """How often each patient is drawn, with replacement, in each resample: `(resamples, patients)`, rows add up to `patients`."""
    drawn = rng.integers(0, patients, (resamples, patients))
    rows = np.arange(resamples)[:, None] * patients
    counts = np.bincount((drawn + rows).ravel(), minlength=resamples * patients)
    return counts.reshape(resamples, patients).astype(np.float64)


def sum_by_patient(values: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Rows `(scans, k)` added up for each patient, `(patients, k)`, in order of the patients' names."""
    names, place = np.unique(np.asarray(patients, str), return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, place, values)
    return sums


def bootstrap_interval(statistic: Statistic, sums: np.ndarray, weights: np.ndarray, level: float = 0.95) -> Interval:
    """The statistic of all patients and its interval from their resamples.

    The percentile interval lies between quantiles of the resampled statistic. BCa (Efron 1987) moves these quantiles by the median
    bias `z` of the resamples and by the acceleration `a`, from leaving out each patient in turn. Resamples without a value are left
    out. Both intervals are NaN for fewer than two patients; BCa also where all resamples lie on one side of the estimate.

    Args:
        sums: `(patients, k)`, see `sum_by_patient`.
        weights: `(resamples, patients)`, see `resample_weights`.
        level: probability that the interval holds the true value.

    >>> sums = sum_by_patient(np.array([[1.0, 1], [2, 1], [6, 1]]), ["a", "a", "b"])
    >>> mean = lambda s: s[..., 0] / s[..., 1]
    >>> bootstrap_interval(mean, sums, resample_weights(np.random.default_rng(0), 2, 100))[:3]
    (3.0, 1.5, 6.0)
    """
    estimate = float(statistic(sums.sum(0)))
    nothing = (np.nan, np.nan)
    if len(sums) < 2 or not np.isfinite(estimate):
        return Interval(estimate, *nothing, *nothing)
    values = statistic(weights @ sums)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Interval(estimate, *nothing, *nothing)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(values, tails)
    moved = _bca_tails(tails, estimate, values, statistic(sums.sum(0) - sums))
    bca_low, bca_high = nothing if moved is None else np.quantile(values, moved)
    return Interval(estimate, float(low), float(high), float(bca_low), float(bca_high))


def _bca_tails(tails: np.ndarray, estimate: float, values: np.ndarray, without: np.ndarray) -> np.ndarray | None:
    """The quantiles that BCa takes in place of `tails`; None where they are not defined. `without` each patient in turn."""
    below = ((values < estimate).mean() + (values <= estimate).mean()) / 2
    without = without[np.isfinite(without)]
    if not 0 < below < 1 or len(without) == 0:
        return None
    apart = without.mean() - without
    spread = (apart**2).sum() ** 1.5
    acceleration = (apart**3).sum() / (6 * spread) if spread > 0 else 0.0
    shift, z = ndtri(below), ndtri(below) + ndtri(tails)
    return ndtr(shift + z / (1 - acceleration * z))
