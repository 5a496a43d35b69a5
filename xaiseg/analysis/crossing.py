"""From where on a curve stays above a level, and the interval of that place over resampled patients."""

from collections.abc import Sequence

import numpy as np

from xaiseg.metrics.bootstrap import Interval, bootstrap_interval, resample_weights, sum_by_patient

_FAR = 1e12  # stands for "not within the steps" while quantiles are taken: any mean with it lies beyond the last step


def crossing(places: np.ndarray, curve: np.ndarray, level: float | np.ndarray) -> np.ndarray:
    """From which place `(…)` on a curve `(…, K)` over rising `places` `(K,)` stays at `level` or above; NaN where it ends below.

    Between the last step below and the next the curve is taken for a line. A curve that is never below gives the first place: the
    true one may lie before it. Curves need not rise: what was reached and lost again does not count.

    >>> crossing(np.array([0.0, 1, 2, 3]), np.array([0.0, 0.4, 0.8, 1.0]), 0.5).round(3).tolist()
    1.25
    >>> crossing(np.array([0.0, 1, 2, 3]), np.array([0.9, 0.2, 0.4, 1.0]), 0.7).round(3).tolist()
    2.5
    """
    wanted = np.asarray(level)[..., None]
    below = curve < wanted
    ever, last = below.any(-1), curve.shape[-1] - 1 - below[..., ::-1].argmax(-1)
    following = np.minimum(last + 1, curve.shape[-1] - 1)
    low, high = (np.take_along_axis(curve, at[..., None], -1)[..., 0] for at in (last, following))
    rise = np.where(high > low, high - low, 1.0)
    found = places[last] + (wanted[..., 0] - low) / rise * (places[following] - places[last])
    return np.where(ever, np.where(below[..., -1], np.nan, found), places[0])


def mean_intervals(
    values: np.ndarray, patients: Sequence[str], *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> list[Interval]:
    """Of each column of `values` `(lesions, K)` the mean over all lesions, with intervals from resampling their patients."""
    sums, weights = _resampled(values, patients, resamples, seed)
    return [
        bootstrap_interval(lambda s, k=k: s[..., k] / s[..., -1], sums, weights, level)  # type: ignore[misc]
        for k in range(values.shape[1])
    ]


def crossing_interval(
    places: np.ndarray,
    values: np.ndarray,
    patients: Sequence[str],
    at: float,
    *,
    relative: bool = False,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """From where on the mean over lesions is at least `at`, see `crossing`, with its percentile interval over resampled patients.

    values: `(lesions, K)` over the places, and with `relative` a last column more, that of which the mean is multiplied by `at`.
    Returns estimate, low, high. The estimate is NaN where `at` is not reached. An end of the interval is infinite where the
    resamples there do not reach it: all that is known is that it lies beyond the last place. NaN ends for fewer than two patients.
    """
    sums, weights = _resampled(values, patients, resamples, seed)
    count = len(places)

    def place(s: np.ndarray) -> np.ndarray:
        mean = s[..., :-1] / s[..., -1:]
        found = crossing(places, mean[..., :count], at * mean[..., count] if relative else at)
        return np.where(np.isnan(found), _FAR, found)

    found = bootstrap_interval(place, sums, weights, level)
    last = float(places[-1])
    low, high = (np.inf if end > last else end for end in (found.low, found.high))
    return (found.estimate if found.estimate <= last else np.nan), float(low), float(high)


def _resampled(values: np.ndarray, patients: Sequence[str], resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    sums = sum_by_patient(np.column_stack([values, np.ones(len(values))]), patients)
    return sums, resample_weights(np.random.default_rng(seed), len(sums), resamples)
