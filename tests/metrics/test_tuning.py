"""Tuning: every combination against a whole evaluation, the choice by hand."""

import numpy as np
import pytest
from scipy import ndimage

from xaiseg.errors import InputError
from xaiseg.imaging import Grid
from xaiseg.instances import label_components
from xaiseg.metrics import EvaluationSettings, TuningGrid, choose, evaluate_case, parse_tuning, tune_case

SHAPE = (12, 11, 10)
GRID = TuningGrid((0.3, 0.5, 0.7), (0, 3, 8))


def scan(seed):
    """Smooth probabilities away from the borders, a reference that they know something of, and a brain."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 0.8)
    inside = np.zeros(SHAPE, bool)
    inside[2:-2, 2:-3, 1:-2] = True
    probability = np.where(inside, 1 / (1 + np.exp(-6 * noise)), 0).astype(np.float32)
    reference = inside & (noise + 0.1 * rng.standard_normal(SHAPE) > 0.25)
    return probability, reference, rng.random(SHAPE) < 0.7


@pytest.mark.parametrize("with_brain", [False, True])
@pytest.mark.parametrize("rule", ["overlap", "iou"])
def test_every_combination_is_that_of_an_evaluation(rule, with_brain):
    probability, reference, brain = scan(0)
    view = brain if with_brain else None
    settings = EvaluationSettings(rule=rule, r=0.01)
    # Sizes that lesions have: whether the size itself is kept shows only there.
    sizes = np.unique(np.bincount(label_components(probability > 0.7).ravel())[1:])
    grid = TuningGrid(GRID.thresholds, (0, *sizes.tolist()))
    assert len(sizes) >= 3
    table = tune_case(probability, reference, grid, settings, view)
    for i, threshold in enumerate(grid.thresholds):
        for j, least in enumerate(grid.min_voxels):
            own = EvaluationSettings(rule=rule, r=0.01, min_voxels=least)
            measures, _ = evaluate_case(probability > threshold, reference, Grid(SHAPE, np.eye(4)), own, view)
            expected = [measures[name] for name in ("ndsc", "dice", "lesion_f1")]
            assert table[i, j] == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert len(np.unique(table)) > 9


def test_nothing_found_and_nothing_there():
    nothing = np.zeros(SHAPE)
    table = tune_case(nothing, nothing > 0, GRID, EvaluationSettings())
    assert (table[..., :2] == 1).all()
    assert np.isnan(table[..., 2]).all()


def test_the_choice_is_the_largest_mean():
    tables = [tune_case(*scan(seed)[:2], GRID, EvaluationSettings()) for seed in range(3)]
    for aim, column, name in (("ndsc", 0, "ndsc"), ("dice", 1, "dice"), ("f1", 2, "lesion_f1")):
        rows = choose(tables, GRID, aim)
        means = np.mean(tables, 0)[..., column].ravel()
        assert [row[name] for row in rows] == pytest.approx(means)
        assert [row["chosen"] for row in rows] == [int(n == means.argmax()) for n in range(9)]
        assert (rows[4]["threshold"], rows[4]["min_voxels"]) == (0.5, 3)


@pytest.mark.parametrize(
    ("thresholds", "best", "chosen"),
    [
        ((0.1, 0.2, 0.6), (1, 1, 0), 0.2),
        ((0.2, 0.55, 0.9), (1, 1, 1), 0.55),
        ((0.4, 0.6), (1, 1), 0.4),  # as near as each other: the smaller
        ((0.1, 0.5), (1 + 1e-13, 1), 0.5),  # rounding is no difference
        ((0.1, 0.5), (1 + 1e-6, 1), 0.1),
    ],
)
def test_ties_go_to_the_threshold_nearest_one_half(thresholds, best, chosen):
    table = np.repeat(np.array(best, float)[:, None, None], 3, axis=2)
    rows = choose([table], TuningGrid(thresholds, (3,)), "ndsc")
    assert [row["threshold"] for row in rows if row["chosen"]] == [chosen]


def test_among_sizes_the_smaller():
    rows = choose([np.ones((1, 3, 3))], TuningGrid((0.5,), (2, 4, 6)), "dice")
    assert [row["min_voxels"] for row in rows if row["chosen"]] == [2]


def test_scans_without_lesions_do_not_count_for_f1():
    tables = [np.full((1, 1, 3), np.nan), np.full((1, 1, 3), 0.5)]
    (row,) = choose(tables, TuningGrid((0.5,), (1,)), "f1")
    assert (row["lesion_f1"], row["lesion_f1_undefined"]) == (0.5, 1)
    with pytest.raises(InputError, match="no scan has lesions to tune for"):
        choose(tables[:1], TuningGrid((0.5,), (1,)), "f1")


def test_what_is_to_be_tried():
    grid = parse_tuning(["threshold=0.1:0.9:0.05", "min-voxels=10,0,3,3"])
    assert grid.thresholds == tuple(n / 100 for n in range(10, 95, 5))
    assert grid.min_voxels == (0, 3, 10)
    assert parse_tuning(["min-voxels=2:6:2"]) == TuningGrid((), (2, 4, 6))
    assert parse_tuning(["threshold=0.2:0.35:0.1"]).thresholds == (0.2, 0.3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=3"], "--tune size=3: expected threshold=… or min-voxels=…"),
        (["threshold"], "expected threshold=…"),
        (["threshold=0:1:0.1"], "between 0 and 1"),
        (["threshold=a"], "expected numbers"),
        (["threshold="], "expected numbers"),
        (["threshold=nan"], "expected numbers"),
        (["threshold=0.1:0.9"], "first:last:step"),
        (["threshold=0.1:0.9:0"], "positive step"),
        (["threshold=0.9:0.1:0.1"], "first:last:step"),
        (["threshold=0.1:0.9:0.0001"], "8001 values, expected at most 1000"),
        (["threshold=0.1:0.9:0.01", "min-voxels=0:19:1"], "1620 combinations"),
        (["min-voxels=1.5"], "whole and from 0"),
        (["min-voxels=-1"], "whole and from 0"),
        (["threshold=0.3", "threshold=0.5"], "given twice"),
    ],
)
def test_what_cannot_be_tried(words, message):
    with pytest.raises(InputError) as refused:
        parse_tuning(words)
    assert message in str(refused.value)
