"""Comparisons that hold when lesions of one patient are alike: patients, not lesions, are what was sampled.

Lesions of a patient share scanner, disease and anatomy. A test that takes them for independent finds differences between groups
wherever one group comes from other patients than the other. Here a patient is resampled, left out, or has its signs changed, with
all lesions.
"""

import warnings
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import stats

from xaiseg.metrics.bootstrap import resample_weights

_BLOCK = 4_000_000  # comparisons of two lesions held at once
_EXACT = 14  # patients up to which all 2^P changes of sign are tried


class Effect(NamedTuple):
    """Cliff's delta of two groups with its 95 % interval over patients, and the p-value of the clustered test; NaN: none."""

    delta: float
    low: float
    high: float
    p: float


_FEWEST_PATIENTS = 6  # of a mixed model, whose Wald test takes a normal distribution for granted


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values (1979) of one family `(n,)`; NaN stays NaN and does not count.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = (len(order) - np.arange(len(order))) * p[order]
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def pair_signs(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray, patients: int) -> np.ndarray:
    """`A[p, q] = Σ sign(a_i - b_j)` over lesions `i` of patient `p` and `j` of patient `q`, `(patients, patients)`.

    of_a, of_b: the patient of each value, 0 … patients - 1.
    """
    signs = np.zeros((patients, patients))
    by_a, by_b = np.argsort(of_a, kind="stable"), np.argsort(of_b, kind="stable")
    a, of_a, b = a[by_a], of_a[by_a], b[by_b]
    columns, starts = np.unique(of_b[by_b], return_index=True)
    step = max(1, _BLOCK // max(len(b), 1))
    for low, high in pairwise([*range(0, len(a), step), len(a)]):
        compared = np.sign(a[low:high, None] - b)
        np.add.at(signs, (of_a[low:high, None], columns), np.add.reduceat(compared, starts, axis=1))
    return signs


def clustered_effect(
    a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray, resamples: int = 2000, seed: int = 0
) -> Effect:
    """Cliff's delta `P(a > b) - P(a < b)`, which is the rank-biserial correlation, of values of two groups of lesions.

    Interval: percentiles of delta over resampled patients, each with all lesions of both groups. Test of delta = 0: delta by its
    jackknife standard error, leaving out each patient in turn, against Student's t with one degree of freedom less than patients
    (nearer to its nominal rate than the resamples' spread where patients are few, see the tests); never below `2^(1-P)`, the
    least that P patients can show when the groups are exchanged within each of them. No interval for fewer than two patients, and
    no test where a group is of one patient.

    of_a, of_b: integers `(n,)`, the patient of each value.

    >>> clustered_effect(np.array([2.0, 3]), np.array([1.0, 2]), np.array([0, 0]), np.array([0, 0])).delta
    0.75
    """
    if not len(a) or not len(b):
        return Effect(np.nan, np.nan, np.nan, np.nan)
    names, place = np.unique(np.concatenate([of_a, of_b]), return_inverse=True)
    of_a, of_b = place[: len(of_a)], place[len(of_a) :]
    count = len(names)
    signs = pair_signs(a, b, of_a, of_b, count)
    delta = float(signs.sum() / (len(a) * len(b)))
    if count < 2:
        return Effect(delta, np.nan, np.nan, np.nan)
    n_a, n_b = np.bincount(of_a, minlength=count), np.bincount(of_b, minlength=count)
    weights = resample_weights(np.random.default_rng(seed), count, resamples)
    pairs = (weights @ n_a) * (weights @ n_b)
    drawn, pairs = weights[pairs > 0], pairs[pairs > 0]
    deltas = ((drawn @ signs) * drawn).sum(1) / pairs
    low, high = np.quantile(deltas, [0.025, 0.975]) if len(deltas) else (np.nan, np.nan)
    return Effect(delta, float(low), float(high), _jackknife_p(delta, signs, n_a, n_b))


def _jackknife_p(delta: float, signs: np.ndarray, n_a: np.ndarray, n_b: np.ndarray) -> float:
    """The two-sided p-value of delta = 0 from the sums of `pair_signs` and the lesions of each patient, `(patients,)`."""
    count = len(n_a)
    pairs = (n_a.sum() - n_a) * (n_b.sum() - n_b)
    if not pairs.all():
        return np.nan
    without = (signs.sum() - signs.sum(0) - signs.sum(1) + np.diag(signs)) / pairs
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    # without error the groups are separated, or alike, whoever is left out
    p = 2 * stats.t.sf(abs(delta) / error, count - 1) if error > 0 else float(delta == 0)
    return float(max(p, 2.0 ** (1 - count)))


def has_mixed_models() -> bool:
    """Whether statsmodels is installed (extra `analysis`)."""
    return find_spec("statsmodels") is not None


def mixed_model_p(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> float:
    """p-value of the group in a linear mixed model of ranks with a random intercept for each patient (REML, Wald test).

    NaN for fewer than six patients, of whose spread it knows too little, or where the model cannot be fitted. Needs statsmodels.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM

    patients = np.concatenate([of_a, of_b])
    if len(np.unique(patients)) < _FEWEST_PATIENTS:
        return np.nan
    ranks = stats.rankdata(np.concatenate([a, b])) / len(patients)
    group = np.repeat([1.0, 0.0], [len(a), len(b)])
    with warnings.catch_warnings():
        # a variance between patients of zero lies on the border of what is allowed, and is no fault
        warnings.simplefilter("ignore")
        try:
            fitted = MixedLM(ranks, np.stack([np.ones_like(group), group], 1), patients).fit(reml=True)
            return float(fitted.pvalues[1])
        except (np.linalg.LinAlgError, ValueError):
            return np.nan


def clustered_signed_rank(differences: np.ndarray, patients: np.ndarray) -> float:
    """p-value of the signed-rank test of paired differences `(n,)` with the signs of a patient changed together.

    Rosner, Glynn and Lee, Biometrics 2006: `T = Σ_p S_p` with `S_p` the sum of signed ranks of a patient; under no difference each
    `S_p` is as likely as `-S_p`. All changes of sign are tried for up to 14 patients; beyond, `T/√ΣS_p²` is standard normal.
    Differences of zero are left out. NaN where none is left, or all are of one patient.
    """
    known = differences != 0
    values, patients = differences[known], patients[known]
    names, place = np.unique(patients, return_inverse=True)
    if len(names) < 2:
        return np.nan
    sums = np.bincount(place, np.sign(values) * stats.rankdata(np.abs(values)))
    total = abs(sums.sum())
    if len(names) <= _EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(names))[:, None] >> np.arange(len(names)) & 1)
        return float((np.abs(signs @ sums) >= total - 1e-9).mean())
    return float(2 * stats.norm.sf(total / np.sqrt((sums**2).sum())))


def clustered_median(
    values: np.ndarray, patients: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The median of values `(n,)` and its 95 % percentile interval over resampled patients; NaN for fewer than two of them."""
    if not len(values):
        return np.nan, np.nan, np.nan
    names, place = np.unique(patients, return_inverse=True)
    median = float(np.median(values))
    if len(names) < 2:
        return median, np.nan, np.nan
    weights = resample_weights(np.random.default_rng(seed), len(names), resamples)
    order = np.argsort(values, kind="stable")
    step = max(1, _BLOCK // len(values))
    medians = np.concatenate(
        [_weighted_medians(values[order], w[:, place[order]]) for w in np.split(weights, range(step, resamples, step))]
    )
    low, high = np.quantile(medians, [0.025, 0.975])
    return median, float(low), float(high)


def _weighted_medians(ordered: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Medians of values that occur `weights` `(r, n)` times; every row holds at least one."""
    reached = weights.cumsum(1)
    half = reached[:, -1:] / 2
    lower, upper = (reached >= half).argmax(1), (reached > half).argmax(1)
    return (ordered[lower] + ordered[upper]) / 2
