"""A case's row, the written table of empty masks cell by cell, and the summary of a cohort."""

import re
from pathlib import Path

import numpy as np
import pytest

from xaiseg.imaging import Grid
from xaiseg.instances import label_components, match_instances
from xaiseg.metrics import EvaluationSettings, evaluate_case, evaluation, normalised_dice, summarise, surface_distances
from xaiseg.metrics.evaluation import MEASURES, SUMMARY, describe_agreement

SHAPE = (10, 9, 8)
GRID = Grid(SHAPE, np.diag([2.0, 1, 0.5, 1]))  # voxels of 1 mm³
README = Path(__file__).resolve().parents[2] / "README.md"
NOTHING = np.zeros(SHAPE, bool)
MASK = NOTHING.copy()
MASK[2:4, 3:5, 1:4] = MASK[7, 7, 7] = True  # 13 voxels, 2 lesions
V, VOXELS, LESIONS = 720, 13, 2
PAIRS = {
    "both empty": (NOTHING, NOTHING),
    "prediction empty": (NOTHING, MASK),
    "reference empty": (MASK, NOTHING),
}


def written_table():
    """The lines of the docstring's table as (measure, column, cell)."""
    lines = re.findall(r"^\|(.*)\|$", evaluation.__doc__, re.MULTILINE)
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    for measures, *cells in rows:
        for measure in measures.split(", "):
            yield from ((measure, column, cell) for column, cell in zip(header[1:], cells, strict=True))


def meant(measure, cell):
    """What a cell of the table stands for, for these masks."""
    size = LESIONS if measure == "count_difference" else VOXELS / 1000
    words = {"n/a": np.nan, "reference": size, "predicted": size, "-reference": -size}
    return words[cell] if cell in words else (V - VOXELS) / V if cell.startswith("(V") else float(cell)


@pytest.mark.parametrize(("measure", "column", "cell"), list(written_table()))
def test_empty_masks_are_what_the_table_says(measure, column, cell):
    measures, _ = evaluate_case(*PAIRS[column], GRID)
    assert measures[measure] == pytest.approx(meant(measure, cell), nan_ok=True)


def test_the_table_is_complete_and_in_the_readme():
    counts = {"lesions_predicted", "lesions_reference", "lesions_found", "TP", "FP", "FN"}
    told = {measure for measure, _, _ in written_table()} | counts | {"predicted_volume_ml", "reference_volume_ml"}
    assert told == set(MEASURES)
    lines = [line for line in evaluation.__doc__.splitlines() if line.startswith("|")]
    assert "\n".join(lines) in README.read_text()


@pytest.mark.parametrize("settings", [(18, "overlap", 1), (6, "iou", 1), (26, "overlap", 4)])
def test_a_row_is_made_of_the_measures_of_whole_arrays(settings):
    connectivity, rule, least = settings
    rng = np.random.default_rng(0)
    predicted, reference = (rng.random(SHAPE) < d for d in (0.12, 0.1))
    measures, lesions = evaluate_case(
        predicted, reference, GRID, EvaluationSettings(connectivity, rule, 0.25, least, 0.01)
    )
    labels = label_components(predicted, connectivity, least)
    truth = label_components(reference, connectivity)
    kept = labels > 0
    assert list(measures) == list(MEASURES)
    assert measures["ndsc"] == pytest.approx(normalised_dice(kept, reference, 0.01))
    counts = match_instances(labels, truth, rule, 0.25).counts
    assert {name: measures[name] for name in counts} == counts
    assert measures["predicted_volume_ml"] == pytest.approx(kept.sum() / 1000)
    assert measures["relative_volume_difference"] == pytest.approx(kept.sum() / reference.sum() - 1)
    assert measures["count_difference"] == labels.max() - truth.max()
    distances = surface_distances(kept, reference, (2, 1, 0.5))
    assert (measures["mean_surface_distance_mm"], measures["hausdorff95_mm"]) == pytest.approx(distances)
    for lesion in lesions:
        whole = labels if lesion["mask"] == "predicted" else truth
        place = np.argwhere(whole == lesion["lesion"]).mean(0) * (2, 1, 0.5)
        assert [lesion[f"centroid_{axis}_mm"] for axis in "xyz"] == pytest.approx(place)
        assert lesion["voxels"] == (whole == lesion["lesion"]).sum()


def test_the_brain_in_place_of_the_array():
    """V is the brain and what either mask has beyond it; Dice does not see V."""
    rng = np.random.default_rng(1)
    brain = NOTHING.copy()
    brain[1:9, 1:8, 1:7] = True
    predicted, reference = (rng.random(SHAPE) < 0.05 for _ in range(2))
    inside = brain | predicted | reference
    assert (inside != brain).any()
    (whole, _), (narrow, _) = (evaluate_case(predicted, reference, GRID, None, b) for b in (None, brain))
    assert narrow["ndsc"] == pytest.approx(normalised_dice(predicted[inside], reference[inside]))
    false = (predicted & ~reference).sum()
    assert narrow["specificity"] == pytest.approx(1 - false / (inside.sum() - reference.sum()))
    assert {name for name in MEASURES if whole[name] != narrow[name]} == {"ndsc", "specificity"}


def cohort(scans=12, seed=0):
    """Rows of random scans, four of them without any reference, of patients with two scans each."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(scans):
        predicted, reference = rng.random(SHAPE) < 0.05, rng.random(SHAPE) < (0.05 if n % 3 else 0)
        rows.append(evaluate_case(predicted, reference, GRID).measures)
    return rows, [str(n // 2) for n in range(scans)]


def test_means_leave_out_what_is_not_defined_and_say_so():
    rows, patients = cohort()
    summary = {(row["measure"], row["over"]): row for row in summarise(rows, patients, 200)}
    for name in MEASURES:
        values = np.array([row[name] for row in rows], float)
        values, row = values[~np.isnan(values)], summary[name, "scans"]
        assert set(row) == set(SUMMARY)
        assert (row["n"], row["undefined"]) == (len(values), 12 - len(values))
        expected = values.mean(), np.median(values), values.std(ddof=1)
        assert (row["estimate"], row["median"], row["sd"]) == pytest.approx(expected)
        assert row["low"] <= row["estimate"] <= row["high"]
        assert row["patients"] == 6
    assert summary["lesion_tpr", "scans"]["undefined"] == 4
    assert summary["dice", "scans"]["undefined"] == 0


def test_pooled_rates_count_lesions_and_resample_patients():
    rows, patients = cohort()
    summary = {(row["measure"], row["over"]): row for row in summarise(rows, patients, 300, seed=5)}
    tp, fp, fn, found, total = (
        np.array([row[name] for row in rows]).reshape(6, 2).sum(1)
        for name in ("TP", "FP", "FN", "lesions_found", "lesions_reference")
    )
    drawn = np.random.default_rng(5).integers(0, 6, (300, 6))
    expected = {
        "lesion_tpr": (tp, tp + fn),
        "lesion_fnr": (fn, tp + fn),
        "lesion_ppv": (tp, tp + fp),
        "lesion_fdr": (fp, tp + fp),
        "lesion_f1": (2 * tp, 2 * tp + fp + fn),
        "lesion_detection_rate": (found, total),
    }
    for name, (above, below) in expected.items():
        row = summary[name, "lesions"]
        assert row["estimate"] == pytest.approx(above.sum() / below.sum())
        resampled = [above[i].sum() / below[i].sum() for i in drawn]
        assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])))
    assert summary["lesion_tpr", "lesions"]["n"] == (tp + fn).sum()
    assert summary["lesion_tpr", "lesions"]["estimate"] != pytest.approx(
        summary["lesion_tpr", "scans"]["estimate"], rel=1e-3
    )


def test_agreement_of_volume_and_count():
    rows, patients = cohort()
    summary = {row["measure"]: row for row in summarise(rows, patients, 100) if row["over"] == "cohort"}
    assert set(summary) == set(describe_agreement())
    for what, names in (
        ("volume", ("predicted_volume_ml", "reference_volume_ml")),
        ("count", ("lesions_predicted", "lesions_reference")),
    ):
        x, y = (np.array([row[name] for row in rows]) for name in names)
        assert summary[f"{what}_pearson"]["estimate"] == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert summary[f"{what}_bias"]["estimate"] == pytest.approx((x - y).mean())
        assert summary[f"{what}_upper_limit"]["estimate"] == pytest.approx((x - y).mean() + 1.96 * (x - y).std(ddof=1))


def test_order_of_scans_does_not_matter_and_the_seed_does():
    rows, patients = cohort()
    first = summarise(rows, patients, 100)
    again = summarise(rows[::-1], patients[::-1], 100)
    for one, other in zip(first, again, strict=True):
        assert one == pytest.approx(other, nan_ok=True)
    assert [r["low"] for r in summarise(rows, patients, 100, seed=1)] != [r["low"] for r in first]


def test_one_scan():
    summary = summarise([evaluate_case(MASK, MASK, GRID).measures], ["a"])
    (dice,) = (row for row in summary if row["measure"] == "dice")
    assert dice["estimate"] == dice["median"] == 1
    assert np.isnan([dice["sd"], dice["low"], dice["high"]]).all()
