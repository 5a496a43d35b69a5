"""Lesion-wise measures, worked out by hand and by loops over lesions."""

from itertools import pairwise

import numpy as np
import pytest

from xaiseg.imaging import Grid
from xaiseg.instances import label_components, match_instances
from xaiseg.metrics import lesion_measures, lesion_rates, lesion_rows
from xaiseg.metrics.lesions import LESION_ROW

AFFINE = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -4], [0, 0, 3, 7], [0, 0, 0, 1]])
#                      0  1  2  3  4  5  6  7  8  9
PREDICTED = np.array([[[1, 1, 1, 1, 0, 2, 0, 3, 0, 0]]])
REFERENCE = np.array([[[1, 0, 2, 2, 2, 0, 0, 0, 0, 3]]])  # two found by one prediction, one missed


def test_counts_and_rates_of_a_scan():
    measures = lesion_measures(match_instances(PREDICTED, REFERENCE))
    assert measures == pytest.approx(
        {
            "lesions_predicted": 3, "lesions_reference": 3, "lesions_found": 2, "TP": 1, "FP": 2, "FN": 1,
            "lesion_tpr": 1 / 2, "lesion_fnr": 1 / 2, "lesion_ppv": 1 / 3, "lesion_fdr": 2 / 3, "lesion_f1": 2 / 5,
            "lesion_detection_rate": 2 / 3,
        }
    )  # fmt: skip


def test_the_rule_changes_what_is_found():
    """IoU of prediction 1 is 1/4 with reference 1, 2/5 with reference 2."""
    measures = lesion_measures(match_instances(PREDICTED, REFERENCE, "iou", 0.3))
    assert (measures["TP"], measures["FP"], measures["FN"], measures["lesions_found"]) == (1, 2, 2, 1)


def test_rates_take_arrays():
    counts = np.random.default_rng(0).integers(0, 3, (3, 20))
    together = lesion_rates(*counts)
    for n, one in enumerate(counts.T):
        assert {k: v[n] for k, v in together.items()} == pytest.approx(lesion_rates(*one), nan_ok=True)
    assert np.isnan(together["lesion_tpr"]).any()
    np.testing.assert_allclose(
        together["lesion_tpr"] + together["lesion_fnr"], np.where(counts[0] + counts[2], 1, np.nan)
    )


def test_every_lesion_of_both_masks_has_a_row():
    """Sizes, places and overlaps from the masks of single lesions."""
    rng = np.random.default_rng(1)
    labels = [label_components(rng.random((7, 6, 5)) < 0.15) for _ in range(2)]
    matching = match_instances(*labels)
    rows = lesion_rows(*labels, matching, Grid((7, 6, 5), AFFINE))
    assert len(rows) == labels[0].max() + labels[1].max()
    assert [row["mask"] for row in rows] == ["predicted"] * labels[0].max() + ["reference"] * labels[1].max()
    for row in rows:
        own, other = labels if row["mask"] == "predicted" else labels[::-1]
        mine = own == row["lesion"]
        x, y, z = np.argwhere(mine).mean(0)
        assert list(row) == list(LESION_ROW)
        assert row["voxels"] == mine.sum()
        assert row["volume_mm3"] == pytest.approx(9.0 * mine.sum())  # 2 · 1.5 · 3 mm
        place = [row[f"centroid_{axis}_mm"] for axis in "xyz"]
        assert place == pytest.approx([10 - 2 * y, -4 + 1.5 * x, 7 + 3 * z])
        assert row["overlap"] == (mine & (other > 0)).sum()
        assert row["group"] == ("TP" if row["overlap"] else {"predicted": "FP", "reference": "FN"}[row["mask"]])
        ious = {n: (mine & (other == n)).sum() / (mine | (other == n)).sum() for n in range(1, other.max() + 1)}
        assert row["iou"] == pytest.approx(max(ious.values()))
        assert row["partner"] is None if not row["overlap"] else ious[row["partner"]] == pytest.approx(row["iou"])
    assert {row["group"] for row in rows} == {"TP", "FP", "FN"}
    for a, b in pairwise(row for row in rows if row["mask"] == "reference"):
        assert a["lesion"] < b["lesion"]
