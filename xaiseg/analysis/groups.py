"""Do found, false and missed lesions, and normal tissue, differ in saliency? TP, FP, FN and TN side by side."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from xaiseg.analysis.clustered import clustered_effect, has_mixed_models, holm, mixed_model_p
from xaiseg.analysis.run_tables import GROUPS, MEASURES, MapKind, present

FEWEST = 3  # lesions of a group that are compared with another's; no U of fewer can be unusual
GROUP_COLUMNS = {
    "method": "Key of the method, as in lesions.tsv",
    "channel": "Channel of the map",
    "measure": "Figure of the map of a lesion, as in lesions.tsv",
    "group": "TP, FP, FN against the reference, TN regions of normal-appearing tissue; unlabelled without a reference",
    "n": "Lesions with a value",
    "undefined": "Lesions without one, which are left out",
    "patients": "Patients that these lesions are of",
    "median": "Median over lesions",
    "q1": "First quartile",
    "q3": "Third quartile",
}
COMPARISON_COLUMNS = {
    "method": "Key of the method, as in lesions.tsv",
    "channel": "Channel of the map",
    "measure": "Figure of the map of a lesion, as in lesions.tsv",
    "group_a": "One group",
    "group_b": "The other group",
    "n_a": "Lesions of group a with a value",
    "n_b": "Lesions of group b with a value",
    "patients": "Patients with a lesion of either group",
    "u": "Mann-Whitney U of group a",
    "p_naive": "Its two-sided p-value, which takes lesions for independent",
    "p_naive_holm": "p_naive after Holm, over all pairs of groups and channels of a method and measure",
    "cliffs_delta": "Cliff's delta, P(a > b) - P(a < b): the rank-biserial correlation",
    "delta_low": "Lower end of its 95 % percentile interval over resampled patients",
    "delta_high": "Upper end of that interval",
    "p_clustered": "p-value of delta = 0 by its jackknife standard error over patients, Student's t with patients - 1 degrees of "
    "freedom; at least 2^(1-patients); n/a where a group is of one patient",
    "p_clustered_holm": "p_clustered after Holm, as p_naive_holm",
    "p_mixed": "p-value of the group in a linear mixed model of ranks with a random intercept per patient (statsmodels)",
    "p_mixed_holm": "p_mixed after Holm, as p_naive_holm",
}
_TESTS = ("p_naive", "p_clustered", "p_mixed")


def describe_groups(lesions: Mapping[str, np.ndarray], methods: Sequence[MapKind]) -> list[dict[str, Any]]:
    """The columns of `GROUP_COLUMNS` for every method, channel, measure and group; lesions: see `run_tables.Run`."""
    rows = []
    for method, measure, channel, group in _cells(lesions, methods):
        where = lesions["group"] == group
        values = lesions[method.column(channel, measure)][where]
        known = np.isfinite(values)
        n = int(known.sum())
        q1, median, q3 = np.quantile(values[known], [0.25, 0.5, 0.75]) if n else (None, None, None)
        row = {"method": method.key, "channel": channel, "measure": measure, "group": group, "n": n}
        row |= {"undefined": len(values) - n, "patients": len(set(lesions["patient"][where][known]))}
        rows.append(row | {"median": median, "q1": q1, "q3": q3})
    return rows


def compare_groups(
    lesions: Mapping[str, np.ndarray], methods: Sequence[MapKind], resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """The columns of `COMPARISON_COLUMNS` for every pair of the groups TP, FP, FN and TN that are there.

    Where a group has fewer than three lesions with a value, tests and effect are None, and where all lesions are of one patient
    the clustered ones; the mixed model is None without statsmodels.
    """
    rows: list[dict[str, Any]] = []
    mixed = has_mixed_models()
    groups = [group for group in present(lesions["group"]) if group in GROUPS]
    for method in methods:
        for measure in MEASURES:
            family = [
                {"method": method.key, "channel": channel, "measure": measure}
                | _compare(lesions, method.column(channel, measure), pair, resamples, seed, mixed)
                for channel in method.channels
                for pair in combinations(groups, 2)
            ]
            for test in _TESTS:
                adjusted = holm(np.array([row.get(test, np.nan) for row in family], float))
                for row, value in zip(family, adjusted, strict=True):
                    row[f"{test}_holm"] = float(value)
            rows += family
    return rows


def _compare(
    lesions: Mapping[str, np.ndarray], column: str, pair: tuple[str, str], resamples: int, seed: int, mixed: bool
) -> dict[str, Any]:
    values, patients = lesions[column], lesions["patient"]
    sides = [np.flatnonzero((lesions["group"] == group) & np.isfinite(values)) for group in pair]
    (a, b), (of_a, of_b) = ([x[side] for side in sides] for x in (values, patients))
    count = len({*of_a, *of_b})
    row = {"group_a": pair[0], "group_b": pair[1], "n_a": len(a), "n_b": len(b), "patients": count}
    if min(len(a), len(b)) < FEWEST:
        return row
    naive = stats.mannwhitneyu(a, b, alternative="two-sided")
    effect = clustered_effect(a, b, of_a, of_b, resamples, seed)
    row |= {"u": float(naive.statistic), "p_naive": float(naive.pvalue)}
    row |= {"cliffs_delta": effect.delta, "delta_low": effect.low, "delta_high": effect.high, "p_clustered": effect.p}
    return row | ({"p_mixed": mixed_model_p(a, b, of_a, of_b)} if mixed else {})


def _cells(lesions: Mapping[str, np.ndarray], methods: Sequence[MapKind]) -> list[tuple[MapKind, str, str, str]]:
    groups = present(lesions["group"])
    return [
        (method, measure, channel, group)
        for method in methods
        for measure in MEASURES
        for channel in method.channels
        for group in groups
    ]
