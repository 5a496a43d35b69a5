"""Voxel-wise measures against loops over voxels, and nDSC against the function on masks."""

import numpy as np
import pytest

from xaiseg.metrics import VoxelCounts, count_voxels, dice, normalised_dice, voxel_measures


def counted(predicted, reference):
    """TP, FP, FN, TN by walking through the voxels."""
    cells = [0, 0, 0, 0]
    for place in np.ndindex(*predicted.shape):
        cells[{(1, 1): 0, (1, 0): 1, (0, 1): 2, (0, 0): 3}[int(predicted[place]), int(reference[place])]] += 1
    return cells


@pytest.mark.parametrize("density", [(0.1, 0.1), (0.5, 0.2), (0.02, 0.9), (1, 0.3), (0.3, 1)])
def test_every_measure_is_its_definition(density):
    rng = np.random.default_rng(0)
    predicted, reference = (rng.random((5, 6, 7)) < d for d in density)
    tp, fp, fn, tn = counted(predicted, reference)
    measures = voxel_measures(count_voxels(predicted, reference), r=0.01)
    expected = {"voxel_tpr": tp / (tp + fn), "voxel_ppv": tp / (tp + fp), "voxel_fdr": fp / (tp + fp)}
    expected |= {"voxel_fnr": fn / (tp + fn), "specificity": tn / (tn + fp) if tn + fp else np.nan}
    expected |= {"dice": dice(predicted, reference), "ndsc": normalised_dice(predicted, reference, 0.01)}
    assert measures == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_v_is_what_is_told():
    """V enters nDSC and specificity alone: κ = (1-r)·|G| / (r·(V-|G|)) with |G| = 5 and V = 105, TN = 105 - 5 - 3."""
    narrow, wide = voxel_measures(VoxelCounts(4, 3, 1, 105), 0.01), voxel_measures(VoxelCounts(4, 3, 1, 1005), 0.01)
    kappa = 0.99 * 5 / (0.01 * 100)
    assert narrow["ndsc"] == pytest.approx(8 / (kappa * 3 + 8 + 1))
    assert narrow["specificity"] == pytest.approx(97 / 100)
    assert {name for name in narrow if narrow[name] != wide[name]} == {"ndsc", "specificity"}


def test_masks_of_one_shape_only():
    with pytest.raises(ValueError, match="masks of shapes"):
        count_voxels(np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3), bool))
