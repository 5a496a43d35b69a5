"""Voxel-wise agreement of two binary masks."""

import numpy as np

_R = 0.001


def dice(predicted: np.ndarray, reference: np.ndarray) -> float:
    """`2TP / (FP + 2TP + FN)`; 1 where both masks are empty."""
    total = int(predicted.sum()) + int(reference.sum())
    return 2 * int((predicted & reference).sum()) / total if total else 1.0


def normalised_dice(predicted: np.ndarray, reference: np.ndarray, r: float = _R) -> float:
    """nDSC (arXiv 2302.05432): Dice with false positives scaled to a lesion load of `r`.

    `κ = (1-r)·|G| / (r·(V-|G|))`, 1 if the reference `G` is empty; `nDSC = 2TP / (κ·FP + 2TP + FN)`, 1 if both masks are empty.
    `V` counts all voxels of the array, so the value depends on the field of view.
    """
    positive = int(reference.sum())
    true = int((predicted & reference).sum())
    false = int(predicted.sum()) - true
    kappa = (1 - r) * positive / (r * (reference.size - positive)) if 0 < positive < reference.size else 1.0
    denominator = kappa * false + true + positive
    return 2 * true / denominator if denominator else 1.0
