"""Lesion-wise measures: which lesions were found, which were missed, which are not there, and a row for each of them.

The rates are the paper's: TP and FP count predicted lesions, FN reference lesions, so that TPR and FNR add up to 1. Where one
prediction covers several reference lesions, or several predictions one of them, TP is not the number of reference lesions found:
`lesion_detection_rate` counts on the side of the reference alone.
"""

from typing import Any

import numpy as np

from xaiseg.imaging import Grid
from xaiseg.instances import Matching, instances_of
from xaiseg.metrics.voxels import ratio

LESION_ROW = {
    "mask": "Which mask the lesion is of: predicted or reference",
    "lesion": "Its number in that mask, by the first voxel in C order of the array as stored",
    "group": "predicted: TP or FP; reference: TP (found) or FN, by the matching rule",
    "voxels": "Voxels of the lesion",
    "volume_mm3": "Volume in mm³",
    "centroid_x_mm": "Centroid in world coordinates, to the right, mm",
    "centroid_y_mm": "Centroid in world coordinates, to the front, mm",
    "centroid_z_mm": "Centroid in world coordinates, upward, mm",
    "partner": "Number of the lesion of the other mask with the largest intersection over union; n/a where none overlaps",
    "overlap": "Voxels shared with the other mask",
    "iou": "Intersection over union with the partner",
}


def lesion_rates(true: Any, false: Any, missed: Any) -> dict[str, Any]:
    """TPR, FNR, PPV, FDR and F1 from counts of lesions, elementwise for arrays; NaN for a rate without a denominator.

    `TPR = TP/(TP+FN)`, `FNR = FN/(TP+FN)`, `PPV = TP/(TP+FP)`, `FDR = FP/(TP+FP)`, `F1 = 2TP/(2TP+FP+FN)`.

    The paper's U-Net, of 3050 TP, 1818 FP and 789 FN, has 79, 37 and 20 %:

    >>> rates = lesion_rates(3050, 1818, 789)
    >>> [round(float(rates[name]), 3) for name in ("lesion_tpr", "lesion_fdr", "lesion_fnr")]
    [0.794, 0.373, 0.206]
    """
    return {
        "lesion_tpr": ratio(true, true + missed),
        "lesion_fnr": ratio(missed, true + missed),
        "lesion_ppv": ratio(true, true + false),
        "lesion_fdr": ratio(false, true + false),
        "lesion_f1": ratio(2 * true, 2 * true + false + missed),
    }


def lesion_measures(matching: Matching) -> dict[str, float]:
    """Counts and rates of one scan: `lesions_predicted`, `lesions_reference`, `lesions_found`, `TP`, `FP`, `FN` and the rates."""
    counts = matching.counts
    reference = len(matching.reference)
    rates = lesion_rates(counts["TP"], counts["FP"], counts["FN"])
    return {
        "lesions_predicted": len(matching.predicted),
        "lesions_reference": reference,
        "lesions_found": reference - counts["FN"],
        **counts,
        **{name: float(value) for name, value in rates.items()},
        "lesion_detection_rate": float(ratio(reference - counts["FN"], reference)),
    }


def lesion_rows(predicted: np.ndarray, reference: np.ndarray, matching: Matching, grid: Grid) -> list[dict[str, Any]]:
    """The columns of `LESION_ROW` for every lesion of two label maps `(X, Y, Z)` on `grid`, the predicted ones first."""
    rows = []
    sides = (("predicted", predicted, matching.predicted), ("reference", reference, matching.reference))
    for mask, labels, matches in sides:
        for label, voxels in instances_of(labels):
            match, centroid = matches[label], grid.to_world(voxels.mean(0))
            rows.append(
                {
                    "mask": mask,
                    "lesion": label,
                    "group": match.group,
                    "voxels": len(voxels),
                    "volume_mm3": len(voxels) * grid.voxel_volume,
                    **{f"centroid_{axis}_mm": float(c) for axis, c in zip("xyz", centroid, strict=True)},
                    "partner": match.partner or None,
                    "overlap": match.overlap,
                    "iou": match.iou,
                }
            )
    return rows
