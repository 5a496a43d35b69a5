"""One scan to a row of all measures, and the rows of a cohort to a summary.

What a measure is where a mask is empty ("n/a": not defined; it is left out of means, and how often is written beside them):

| measure | both empty | prediction empty | reference empty |
|---|---|---|---|
| ndsc, dice | 1 | 0 | 0 |
| voxel_tpr, lesion_tpr, lesion_detection_rate | n/a | 0 | n/a |
| voxel_fnr, lesion_fnr | n/a | 1 | n/a |
| voxel_ppv, lesion_ppv | n/a | n/a | 0 |
| voxel_fdr, lesion_fdr | n/a | n/a | 1 |
| lesion_f1 | n/a | 0 | 0 |
| specificity | 1 | 1 | (V - predicted) / V |
| volume_difference_ml, count_difference | 0 | -reference | predicted |
| absolute_volume_difference_ml | 0 | reference | predicted |
| relative_volume_difference | n/a | -1 | n/a |
| mean_surface_distance_mm, hausdorff95_mm | n/a | n/a | n/a |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from xaiseg.imaging import Grid
from xaiseg.instances import label_components, match_instances
from xaiseg.metrics.agreement import AGREEMENT, moments
from xaiseg.metrics.bootstrap import Interval, Statistic, bootstrap_interval, resample_weights, sum_by_patient
from xaiseg.metrics.lesions import lesion_measures, lesion_rates, lesion_rows
from xaiseg.metrics.surface import surface_distances
from xaiseg.metrics.voxels import R, count_voxels, ratio, voxel_measures

MEASURES = {
    "ndsc": "Normalised Dice (arXiv 2302.05432): 2TP / (κ·FP + 2TP + FN), κ = (1-r)·|G| / (r·(V-|G|)), 1 for an empty reference",
    "dice": "Dice: 2TP / (FP + 2TP + FN), of voxels",
    "voxel_tpr": "Voxel sensitivity: TP / (TP + FN)",
    "voxel_ppv": "Voxel precision: TP / (TP + FP)",
    "voxel_fdr": "Voxel false discovery rate: FP / (TP + FP)",
    "voxel_fnr": "Voxel false negative rate: FN / (TP + FN)",
    "specificity": "Voxel specificity: TN / (TN + FP), TN within V",
    "lesions_predicted": "Predicted lesions",
    "lesions_reference": "Reference lesions",
    "lesions_found": "Reference lesions that the prediction found, by the matching rule",
    "TP": "Predicted lesions that match the reference",
    "FP": "Predicted lesions that do not",
    "FN": "Reference lesions that were not found",
    "lesion_tpr": "Lesion true positive rate: TP / (TP + FN)",
    "lesion_fnr": "Lesion false negative rate: FN / (TP + FN)",
    "lesion_ppv": "Lesion precision: TP / (TP + FP)",
    "lesion_fdr": "Lesion false discovery rate: FP / (TP + FP)",
    "lesion_f1": "Lesion F1: 2TP / (2TP + FP + FN)",
    "lesion_detection_rate": "Reference lesions found / reference lesions",
    "predicted_volume_ml": "Predicted lesion volume in mL",
    "reference_volume_ml": "Reference lesion volume in mL",
    "volume_difference_ml": "Predicted minus reference volume in mL",
    "absolute_volume_difference_ml": "Size of the volume difference in mL",
    "relative_volume_difference": "Volume difference / reference volume",
    "count_difference": "Predicted minus reference number of lesions",
    "mean_surface_distance_mm": "Mean symmetric surface distance in mm, over the surface voxels of both masks",
    "hausdorff95_mm": "95 % Hausdorff distance in mm: the larger of the 95th percentiles of both directions",
}
SUMMARY = {
    "measure": "A column of cases.tsv, or a measure of agreement of predicted with reference volume or count",
    "over": "scans: mean over scans; lesions: rate of all lesions together; cohort: agreement over scans",
    "estimate": "The mean, the pooled rate or the agreement",
    "median": "Median over scans",
    "sd": "Standard deviation over scans (of a sample)",
    "low": "Lower end of the 95 % percentile interval of the estimate, from resampled patients",
    "high": "Upper end of that interval",
    "bca_low": "Lower end of the 95 % BCa interval (bias-corrected and accelerated)",
    "bca_high": "Upper end of that interval",
    "n": "Scans with a value; for pooled rates the lesions that count",
    "undefined": "Scans without a value (n/a), which are left out",
    "patients": "Patients resampled",
}
_POOLED = {
    # the lesions that count for each rate
    "lesion_tpr": ("TP", "FN"),
    "lesion_fnr": ("TP", "FN"),
    "lesion_ppv": ("TP", "FP"),
    "lesion_fdr": ("TP", "FP"),
    "lesion_f1": ("TP", "FP", "FN"),
}
_COMPARED = {
    "volume": ("predicted_volume_ml", "reference_volume_ml"),
    "count": ("lesions_predicted", "lesions_reference"),
}


@dataclass(frozen=True)
class EvaluationSettings:
    """How masks are compared.

    connectivity: 6, 18 or 26 neighbours make lesions of both masks. rule, iou: see `xaiseg.instances.match_instances`.
    min_voxels: smaller predicted lesions are removed before anything is measured; the reference stays as it is.
    r: the lesion load that nDSC refers to.
    """

    connectivity: int = 18
    rule: str = "overlap"
    iou: float = 0.25
    min_voxels: int = 1
    r: float = R


class CaseEvaluation(NamedTuple):
    """measures: a value for each name of `MEASURES`. lesions: the rows of `lesion_rows`."""

    measures: dict[str, float]
    lesions: list[dict[str, Any]]


def evaluate_case(
    predicted: np.ndarray,
    reference: np.ndarray,
    grid: Grid,
    settings: EvaluationSettings | None = None,
    brain: np.ndarray | None = None,
) -> CaseEvaluation:
    """Compare the masks of one scan, boolean `(X, Y, Z)` on `grid`; the module's table tells what empty masks give.

    `brain`: the voxels that `V` counts in nDSC and specificity, in place of the whole array; those of both masks belong to it.

    Raises ValueError for masks of different shapes, and for a rule or connectivity that does not exist.

    >>> reference = np.zeros((8, 8, 8), bool)
    >>> reference[2:4, 2:4, 2:4] = True
    >>> measures, lesions = evaluate_case(reference, reference, Grid((8, 8, 8), np.eye(4)))
    >>> measures["dice"], measures["lesion_f1"], measures["reference_volume_ml"], len(lesions)
    (1.0, 1.0, 0.008, 2)
    """
    settings = settings or EvaluationSettings()
    labels, reference_labels, box = label_both(predicted, reference, settings.connectivity, settings.min_voxels)
    kept = np.zeros(predicted.shape, bool)
    kept[box] = labels > 0
    matching = match_instances(labels, reference_labels, settings.rule, settings.iou)
    lesions = lesion_measures(matching)
    volumes = [int(mask.sum()) * grid.voxel_volume / 1000 for mask in (kept, reference)]
    distances = surface_distances(kept, reference, grid.spacing)
    measures = {
        **voxel_measures(count_voxels(kept, reference, field_of_view(kept, reference, brain)), settings.r),
        **lesions,
        "predicted_volume_ml": volumes[0],
        "reference_volume_ml": volumes[1],
        "volume_difference_ml": volumes[0] - volumes[1],
        "absolute_volume_difference_ml": abs(volumes[0] - volumes[1]),
        "relative_volume_difference": float(ratio(volumes[0] - volumes[1], volumes[1])),
        "count_difference": lesions["lesions_predicted"] - lesions["lesions_reference"],
        "mean_surface_distance_mm": distances.mean,
        "hausdorff95_mm": distances.hausdorff95,
    }
    start = (box[0].start, box[1].start, box[2].start)
    return CaseEvaluation(measures, lesion_rows(labels, reference_labels, matching, grid.crop(start, labels.shape)))


def label_both(
    predicted: np.ndarray, reference: np.ndarray, connectivity: int, min_voxels: int
) -> tuple[np.ndarray, np.ndarray, tuple[slice, ...]]:
    """Label maps of the lesions of both masks in the smallest box that holds them, and that box (one voxel if both are empty)."""
    if predicted.shape != reference.shape:
        raise ValueError(f"masks of shapes {predicted.shape} and {reference.shape}, expected one shape")
    found = ndimage.find_objects((predicted | reference).astype(np.int8))
    box = found[0] if found else (slice(0, 1),) * predicted.ndim
    labels = label_components(predicted[box], connectivity, min_voxels)
    return labels, label_components(reference[box], connectivity), box


def field_of_view(predicted: np.ndarray, reference: np.ndarray, brain: np.ndarray | None) -> int:
    """`V`: all voxels of the array, or those of the brain and of both masks."""
    return predicted.size if brain is None else int((brain | predicted | reference).sum())


def summarise(
    rows: Sequence[Mapping[str, Any]], patients: Sequence[str], resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Summarise a cohort: the columns of `SUMMARY` for each measure over scans, lesion rates pooled, and agreement.

    Args:
        rows: measures of each scan, from `evaluate_case`.
        patients: of each scan. All scans of a patient are resampled together.
        resamples, seed: of the bootstrap; all measures see the same resamples.
    """
    count = len(set(patients))
    weights = resample_weights(np.random.default_rng(seed), count, resamples)

    def interval(statistic: Statistic, values: np.ndarray) -> Interval:
        return bootstrap_interval(statistic, sum_by_patient(values, patients), weights)

    def row(measure: str, over: str, found: Interval, n: int, **more: Any) -> dict[str, Any]:
        return {"measure": measure, "over": over, **found._asdict(), "n": n, "patients": count, **more}

    table = {name: np.array([scan[name] for scan in rows], np.float64) for name in MEASURES}
    summary = []
    for name, values in table.items():
        known = ~np.isnan(values)
        found = interval(_mean, np.stack([np.where(known, values, 0), known.astype(np.float64)], -1))
        median = float(np.median(values[known])) if known.any() else np.nan
        sd = float(values[known].std(ddof=1)) if known.sum() > 1 else np.nan
        more = {"median": median, "sd": sd, "undefined": int((~known).sum())}
        summary.append(row(name, "scans", found, int(known.sum()), **more))
    counts = np.stack([table[name] for name in ("TP", "FP", "FN")], -1)
    for name, parts in _POOLED.items():
        found = interval(partial(_pooled, name), counts)
        summary.append(row(name, "lesions", found, int(sum(table[part].sum() for part in parts))))
    lesions = np.stack([table["lesions_found"], table["lesions_reference"]], -1)
    total = int(table["lesions_reference"].sum())
    summary.append(row("lesion_detection_rate", "lesions", interval(_mean, lesions), total))
    for what, (predicted, reference) in _COMPARED.items():
        values = moments(table[predicted], table[reference])
        for name, (statistic, _) in AGREEMENT.items():
            summary.append(row(f"{what}_{name}", "cohort", interval(statistic, values), len(rows)))
    return summary


def describe_agreement() -> dict[str, str]:
    """What the rows `over` the cohort are, by name of the measure."""
    units = {"volume": "lesion volume in mL", "count": "number of lesions"}
    return {f"{what}_{name}": f"{text}; {units[what]}" for what in _COMPARED for name, (_, text) in AGREEMENT.items()}


def _pooled(name: str, sums: np.ndarray) -> np.ndarray:
    """A lesion rate from sums of TP, FP and FN."""
    return lesion_rates(sums[..., 0], sums[..., 1], sums[..., 2])[name]


def _mean(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0], sums[..., 1])
