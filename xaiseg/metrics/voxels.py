"""Voxel-wise measures of two masks, from four counts."""

from typing import Any, NamedTuple

import numpy as np

R = 0.001  # the lesion load that nDSC refers to, of the paper's metric (arXiv 2302.05432)


class VoxelCounts(NamedTuple):
    """Voxels of both masks (`true`), of the prediction only (`false`), of the reference only (`missed`), and `V` in all."""

    true: int
    false: int
    missed: int
    total: int


def count_voxels(predicted: np.ndarray, reference: np.ndarray, total: int | None = None) -> VoxelCounts:
    """Compare two boolean masks `(X, Y, Z)`. `total` is `V` where it is not the whole array.

    Raises ValueError for masks of different shapes.

    >>> count_voxels(np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool))
    VoxelCounts(true=1, false=1, missed=1, total=4)
    """
    if predicted.shape != reference.shape:
        raise ValueError(f"masks of shapes {predicted.shape} and {reference.shape}, expected one shape")
    true = int((predicted & reference).sum())
    false, missed = int(predicted.sum()) - true, int(reference.sum()) - true
    return VoxelCounts(true, false, missed, predicted.size if total is None else total)


def voxel_measures(counts: VoxelCounts, r: float = R) -> dict[str, float]:
    """nDSC, Dice, and the rates of a confusion matrix; NaN for a rate without a denominator.

    `κ = (1-r)·|G| / (r·(V-|G|))`, 1 where the reference `G` is empty or fills `V`; `nDSC = 2TP / (κ·FP + 2TP + FN)`. nDSC and
    Dice are 1 where both masks are empty. `specificity = TN / (TN + FP)` depends on `V` as nDSC does.
    """
    true, false, missed, total = counts
    reference, background = true + missed, total - true - missed
    kappa = (1 - r) * reference / (r * background) if reference and background else 1.0
    found_any = true + false + missed > 0
    return {
        "ndsc": 2 * true / (kappa * false + 2 * true + missed) if found_any else 1.0,
        "dice": 2 * true / (false + 2 * true + missed) if found_any else 1.0,
        "voxel_tpr": float(ratio(true, reference)),
        "voxel_ppv": float(ratio(true, true + false)),
        "voxel_fdr": float(ratio(false, true + false)),
        "voxel_fnr": float(ratio(missed, reference)),
        "specificity": float(ratio(background - false, background)),
    }


def dice(predicted: np.ndarray, reference: np.ndarray) -> float:
    """`2TP / (FP + 2TP + FN)` of two boolean masks; 1 where both are empty."""
    return voxel_measures(count_voxels(predicted, reference))["dice"]


def normalised_dice(predicted: np.ndarray, reference: np.ndarray, r: float = R) -> float:
    """nDSC of two boolean masks, see `voxel_measures`: Dice with false positives scaled to a lesion load of `r`.

    `V` counts all voxels of the array, so the value depends on the field of view.
    """
    return voxel_measures(count_voxels(predicted, reference), r)["ndsc"]


def ratio(numerator: Any, denominator: Any) -> Any:
    """`numerator / denominator`, elementwise for arrays, NaN where the denominator is 0.

    >>> ratio(3, 4), ratio(np.array([1, 1]), np.array([2, 0]))
    (np.float64(0.75), array([0.5, nan]))
    """
    above, below = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)[()]
