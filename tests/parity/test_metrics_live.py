"""Beside MONAI's metrics: Dice, surface distances and the rates of a confusion matrix, on random and degenerate masks."""

import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch and MONAI deprecate while they are imported
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")
    from monai.metrics import ConfusionMatrixMetric, DiceMetric, HausdorffDistanceMetric, SurfaceDistanceMetric

from xaiseg.imaging import Grid
from xaiseg.metrics import evaluate_case

pytestmark = pytest.mark.parity

SHAPE = (14, 12, 9)
SPACING = (0.5, 1.25, 3.0)
GRID = Grid(SHAPE, np.diag([*SPACING, 1]))
RATES = {
    "voxel_tpr": "sensitivity",
    "voxel_ppv": "precision",
    "voxel_fdr": "false discovery rate",
    "voxel_fnr": "miss rate",
    "specificity": "specificity",
}


def masks(name):
    rng = np.random.default_rng(7)
    one, other = np.zeros((2, *SHAPE), bool)
    if name.startswith("random"):
        one, other = (rng.random(SHAPE) < float(name.split()[1]) for _ in range(2))
    elif name == "far apart":
        one[0, 0, 0] = other[-1, -1, -1] = True
    elif name == "one inside the other":
        one[2:9, 2:9, 2:7] = other[4:6, 4:6, 4:5] = True
    elif name == "the same":
        one[3:6, 2:5, 1:4] = other[3:6, 2:5, 1:4] = True
    elif name == "everything":
        one[:] = other[5:, 5:, 5:] = True
    elif name == "prediction empty":
        other[3:6, 2:5, 1:4] = True
    elif name == "reference empty":
        one[3:6, 2:5, 1:4] = True
    return one, other


def monai(metric, predicted, reference, **options):
    one, other = (torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (predicted, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty masks, which are meant
        metric(one, other, **options)
        found = metric.aggregate()
    return float(found[0] if isinstance(found, list) else found)


KINDS = ["random 0.02", "random 0.3", "random 0.95", "far apart", "one inside the other", "the same", "everything"]


@pytest.mark.parametrize("kind", KINDS)
def test_surface_distances(kind):
    predicted, reference = masks(kind)
    measures, _ = evaluate_case(predicted, reference, GRID)
    hausdorff = HausdorffDistanceMetric(include_background=True, percentile=95)
    mean = SurfaceDistanceMetric(include_background=True, symmetric=True)
    # MONAI rounds distances to float32
    assert measures["hausdorff95_mm"] == pytest.approx(
        monai(hausdorff, predicted, reference, spacing=SPACING), rel=1e-6
    )
    assert measures["mean_surface_distance_mm"] == pytest.approx(
        monai(mean, predicted, reference, spacing=SPACING), rel=1e-6
    )


@pytest.mark.parametrize("kind", [*KINDS, "reference empty", "prediction empty", "both empty"])
def test_dice(kind):
    """With `ignore_empty=False` MONAI too has 1 for two empty masks, and 0 for one."""
    predicted, reference = masks(kind)
    expected = monai(DiceMetric(include_background=True, ignore_empty=False), predicted, reference)
    assert evaluate_case(predicted, reference, GRID)[0]["dice"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "reference empty", "prediction empty", "both empty"])
@pytest.mark.parametrize("name", RATES)
def test_rates_of_the_confusion_matrix(name, kind):
    """MONAI's aggregate leaves a rate without denominator out, and has 0 for the mean of nothing: those are n/a here."""
    predicted, reference = masks(kind)
    own = evaluate_case(predicted, reference, GRID)[0][name]
    metric = ConfusionMatrixMetric(include_background=True, metric_name=RATES[name])
    expected = monai(metric, predicted, reference)
    if np.isnan(own):
        denominators = {"voxel_ppv": predicted, "voxel_fdr": predicted, "specificity": ~reference}
        assert not denominators.get(name, reference).any()
        assert expected == 0 or np.isnan(expected)
    else:
        assert own == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["reference empty", "prediction empty", "both empty"])
def test_where_monai_has_no_distance_either(kind):
    predicted, reference = masks(kind)
    metric = SurfaceDistanceMetric(include_background=True, symmetric=True)
    expected = monai(metric, predicted, reference, spacing=SPACING)
    # of nothing MONAI's mean is infinite, or 0 as an aggregate of NaN
    assert expected == 0 or not np.isfinite(expected)
    assert np.isnan(evaluate_case(predicted, reference, GRID)[0]["mean_surface_distance_mm"])
