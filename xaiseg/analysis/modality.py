"""Which channel does the network rely on? Peaks and masses of the channels of one lesion, compared within the lesion."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from xaiseg.analysis.clustered import clustered_median, clustered_signed_rank, holm
from xaiseg.analysis.groups import FEWEST
from xaiseg.analysis.run_tables import MapKind, present

ALL = "all"
MODALITY_COLUMNS = {
    "method": "Key of the method, as in lesions.tsv",
    "group": "Group of the lesions; all: TP and FP, what the network calls lesion (without a reference every lesion)",
    "quantity": "peak: largest value of the map; mass: sum of |values|",
    "channel_a": "One channel",
    "channel_b": "The other channel",
    "n": "Lesions with a value of both",
    "patients": "Patients that these lesions are of",
    "median_a": "Median of channel a over lesions",
    "median_b": "Median of channel b over lesions",
    "ratio": "Median over lesions of a / b, where both are above 0",
    "ratio_low": "Lower end of its 95 % interval over resampled patients",
    "ratio_high": "Upper end of that interval",
    "undefined": "Lesions without a ratio, for want of two values above 0",
    "larger_a": "Fraction of lesions in which a is larger than b",
    "p_naive": "Wilcoxon's signed-rank test of a - b, which takes lesions for independent",
    "p_naive_holm": "p_naive after Holm, over all pairs of channels and groups of a method and quantity",
    "p_clustered": "Signed-rank test with the signs of a patient's lesions changed together (Rosner, Glynn and Lee 2006)",
    "p_clustered_holm": "p_clustered after Holm, as p_naive_holm",
}
SHARE_COLUMNS = {
    "method": "Key of the method, as in lesions.tsv",
    "group": "Group of the lesions; all: as in modality.tsv",
    "channel": "Channel of the map",
    "n": "Lesions whose map is not zero everywhere",
    "patients": "Patients that these lesions are of",
    "share": "Median over lesions of the channel's part of the sum of |values| over all channels",
    "low": "Lower end of its 95 % interval over resampled patients",
    "high": "Upper end of that interval",
}
LESION_COLUMNS = {
    "case": "Case",
    "patient": "Whose scan it is",
    "lesion": "Number of the lesion, as in lesions.tsv of its run",
    "group": "Group of the lesion",
    "method": "Key of the method, as in lesions.tsv",
    "channel_a": "One channel",
    "channel_b": "The other channel",
    "peak_ratio": "Peak of a / peak of b; n/a unless both are above 0",
    "mass_ratio": "Sum of |values| of a / that of b",
    "mass_share": "Part of a in the sum of |values| over all channels",
}


def compare_channels(
    lesions: Mapping[str, np.ndarray], methods: Sequence[MapKind], resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """The columns of `MODALITY_COLUMNS` for every pair of channels, quantity and group.

    Methods whose maps have one channel are passed over. A test of fewer than three lesions is None, and the clustered one where
    all lesions are of one patient.
    """
    rows: list[dict[str, Any]] = []
    for method in methods:
        for quantity in ("peak", "mass"):
            family = []
            for group, where in _parts(lesions["group"]):
                for pair in combinations(method.channels, 2):
                    a, b = (_quantity(lesions, method, channel, quantity)[where] for channel in pair)
                    row: dict[str, Any] = {"method": method.key, "group": group, "quantity": quantity}
                    row |= {"channel_a": pair[0], "channel_b": pair[1]}
                    family.append(row | _paired(a, b, lesions["patient"][where], resamples, seed))
            for test in ("p_naive", "p_clustered"):
                adjusted = holm(np.array([row.get(test, np.nan) for row in family], float))
                for row, value in zip(family, adjusted, strict=True):
                    row[f"{test}_holm"] = float(value)
            rows += family
    return rows


def mass_shares(
    lesions: Mapping[str, np.ndarray], methods: Sequence[MapKind], resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """The columns of `SHARE_COLUMNS` for every method with several channels, group and channel."""
    rows: list[dict[str, Any]] = []
    for method in methods:
        if len(method.channels) < 2:
            continue
        for group, where in _parts(lesions["group"]):
            for channel, share in _shares(lesions, method).items():
                known = where & np.isfinite(share)
                patients = lesions["patient"][known]
                median, low, high = clustered_median(share[known], patients, resamples, seed)
                row: dict[str, Any] = {"method": method.key, "group": group, "channel": channel, "n": int(known.sum())}
                rows.append(row | {"patients": len(set(patients)), "share": median, "low": low, "high": high})
    return rows


def lesion_ratios(lesions: Mapping[str, np.ndarray], methods: Sequence[MapKind]) -> Iterator[dict[str, Any]]:
    """The columns of `LESION_COLUMNS` for every lesion, method and pair of channels."""
    for method in methods:
        shares = _shares(lesions, method)
        for a, b in combinations(method.channels, 2):
            peaks, masses = (
                _ratio(_quantity(lesions, method, a, q), _quantity(lesions, method, b, q)) for q in ("peak", "mass")
            )
            for n in range(len(lesions["lesion"])):
                row: dict[str, Any] = {name: lesions[name][n] for name in ("case", "patient", "group")}
                row |= {"lesion": int(lesions["lesion"][n]), "method": method.key, "channel_a": a, "channel_b": b}
                yield row | {"peak_ratio": peaks[n], "mass_ratio": masses[n], "mass_share": shares[a][n]}


def _parts(groups: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each group, and before them what the network calls lesion."""
    names = present(groups)
    called = [group for group in ("TP", "FP") if group in names]
    if len(called) == 2 or len(names) == 1:
        yield ALL, np.isin(groups, called or names)
    for name in names:
        yield name, groups == name


def _quantity(lesions: Mapping[str, np.ndarray], method: MapKind, channel: str, quantity: str) -> np.ndarray:
    if quantity == "peak":
        return lesions[method.column(channel, "peak")]
    return lesions[method.column(channel, "positive_mass")] - lesions[method.column(channel, "negative_mass")]


def _shares(lesions: Mapping[str, np.ndarray], method: MapKind) -> dict[str, np.ndarray]:
    masses = np.stack([_quantity(lesions, method, channel, "mass") for channel in method.channels])
    total = masses.sum(0)
    shares = np.divide(masses, total, out=np.full_like(masses, np.nan), where=total > 0)
    return dict(zip(method.channels, shares, strict=True))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a / b` where both are above 0, else NaN: a signed peak of 0 or below is no multiple of another."""
    return np.divide(a, b, out=np.full(len(a), np.nan), where=(a > 0) & (b > 0))


def _paired(a: np.ndarray, b: np.ndarray, patients: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    known = np.isfinite(a) & np.isfinite(b)
    a, b, patients = a[known], b[known], patients[known]
    row: dict[str, Any] = {"n": len(a), "patients": len(set(patients))}
    if not len(a):
        return row
    ratios = _ratio(a, b)
    defined = np.isfinite(ratios)
    ratio, low, high = clustered_median(ratios[defined], patients[defined], resamples, seed)
    row |= {"median_a": np.median(a), "median_b": np.median(b), "ratio": ratio, "ratio_low": low, "ratio_high": high}
    row |= {"undefined": int((~defined).sum()), "larger_a": float((a > b).mean())}
    if len(a) < FEWEST or not (a != b).any():
        return row
    row["p_naive"] = float(stats.wilcoxon(a, b, method="approx").pvalue)
    return row | {"p_clustered": clustered_signed_rank(a - b, patients)}
