"""Matching of label maps, worked out by hand."""

import numpy as np
import pytest

from xaiseg.instances import Match, match_instances

#                      0  1  2  3  4  5  6  7  8  9 10 11
PREDICTED = np.array([[[1, 1, 1, 1, 0, 2, 2, 0, 5, 0, 0, 0]]])
REFERENCE = np.array([[[0, 1, 2, 2, 2, 0, 0, 0, 0, 0, 4, 4]]])
# prediction 1 (4 voxels) shares 1 with reference 1 (1 voxel, IoU 1/4) and 2 with reference 2 (3 voxels, IoU 2/5)


def test_one_shared_voxel_is_a_match():
    matching = match_instances(PREDICTED, REFERENCE)
    assert matching.predicted == {
        1: Match("TP", 2, 3, 2 / 5),
        2: Match("FP", 0, 0, 0.0),
        5: Match("FP", 0, 0, 0.0),
    }
    assert matching.reference == {
        1: Match("TP", 1, 1, 1 / 4),
        2: Match("TP", 1, 2, 2 / 5),
        4: Match("FN", 0, 0, 0.0),
    }
    assert matching.counts == {"TP": 1, "FP": 2, "FN": 1}
    assert (matching.rule, matching.threshold) == ("overlap", 0.0)


@pytest.mark.parametrize(
    ("threshold", "counts", "found"),
    [
        (0.25, {"TP": 1, "FP": 2, "FN": 1}, [1, 2]),  # the threshold itself is enough
        (0.3, {"TP": 1, "FP": 2, "FN": 2}, [2]),
        (0.5, {"TP": 0, "FP": 3, "FN": 3}, []),
    ],
)
def test_the_iou_rule_asks_for_more(threshold, counts, found):
    matching = match_instances(PREDICTED, REFERENCE, "iou", threshold)
    assert matching.counts == counts
    assert [label for label, m in matching.reference.items() if m.group == "TP"] == found
    assert (matching.rule, matching.threshold) == ("iou", threshold)
    # what it missed keeps its partner
    assert matching.reference[1].partner == 1


@pytest.mark.parametrize("rule", ["overlap", "iou"])
def test_empty_sides(rule):
    nothing = np.zeros_like(PREDICTED)
    assert match_instances(PREDICTED, nothing, rule).counts == {"TP": 0, "FP": 3, "FN": 0}
    assert match_instances(nothing, REFERENCE, rule).counts == {"TP": 0, "FP": 0, "FN": 3}
    assert match_instances(nothing, nothing, rule).counts == {"TP": 0, "FP": 0, "FN": 0}


def test_a_perfect_prediction():
    matching = match_instances(REFERENCE, REFERENCE, "iou", 1.0)
    assert matching.counts == {"TP": 3, "FP": 0, "FN": 0}
    assert all(m.iou == 1 and m.partner == label for label, m in matching.predicted.items())


def test_both_sides_agree_on_random_maps():
    """Overlap and IoU recomputed from masks, pair by pair."""
    rng = np.random.default_rng(0)
    p, r = (rng.integers(0, 5, (4, 5, 6)).astype(dtype) for dtype in (np.int32, np.uint8))
    matching = match_instances(p, r)
    for own, other, matches in ((p, r, matching.predicted), (r, p, matching.reference)):
        for label, match in matches.items():
            mine = own == label
            ious = {q: (mine & (other == q)).sum() / (mine | (other == q)).sum() for q in range(1, 5)}
            assert match.overlap == (mine & (other > 0)).sum()
            assert match.iou == pytest.approx(max(ious.values()))
            assert ious[match.partner] == pytest.approx(match.iou)


def test_what_cannot_be_matched():
    with pytest.raises(ValueError, match="rule is 'dice', known are overlap, iou"):
        match_instances(PREDICTED, REFERENCE, "dice")
    with pytest.raises(ValueError, match="label maps of shapes"):
        match_instances(PREDICTED, REFERENCE[..., 1:])
