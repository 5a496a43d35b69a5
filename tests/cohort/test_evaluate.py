"""The `evaluate` command on tiny scans: what it finds, refuses, writes and says, recomputed from the files."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import RAS, SHAPE, blob, snapshot, stored, table, write_manifest

from xaiseg.cli import main
from xaiseg.cohort import evaluate as command
from xaiseg.imaging import Grid
from xaiseg.metrics import EvaluationSettings, evaluate_case, summarise
from xaiseg.metrics.evaluation import MEASURES

CASES = ("sub-01_ses-1", "sub-01_ses-2", "sub-02", "sub-03")
Run = Callable[..., Path]
Refused = Callable[..., str]


def truth(n: int) -> np.ndarray:
    """Two lesions; none in the last scan."""
    return (blob((8, 9, 8), 2.6) | blob((16 + n, 19, 13), 2.2)) & (n < 3)


def likelihood(n: int) -> np.ndarray:
    """Above 0.5 in the first lesion and in a false one, weaker at the second and in a speck; nothing in the last scan."""
    noise = np.random.default_rng(n).uniform(0, 0.1, SHAPE)
    parts = 0.8 * blob((8, 9, 8), 2.2) + 0.4 * blob((16 + n, 19, 13), 1.6) + 0.7 * blob((4, 22, 5), 1.2 + 0.4 * n)
    parts[20, 3, 15] = 0.85
    return (noise + np.minimum(parts, 0.89) * (n < 3)).astype(np.float32)


def save(path: Path, array: np.ndarray, codes: str = "RAS") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(stored(array.astype(np.uint8) if array.dtype == bool else array, codes), path)
    return path


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """References, masks and maps of four scans of three patients, as a manifest and as `segment` lays them out."""
    root = tmp_path_factory.mktemp("evaluate")
    for n, case in enumerate(CASES):
        save(root / f"{case}_reference.nii.gz", truth(n))
        save(root / f"{case}_map.nii.gz", likelihood(n))
        save(root / f"{case}_FLAIR.nii.gz", (likelihood(n) > 0.03).astype(np.float32))
        place = root.joinpath("out", *case.split("_"), "anat")
        save(place / f"{case}_space-orig_label-L_probseg.nii.gz", likelihood(n))
        save(place / f"{case}_space-orig_label-L_mask.nii.gz", likelihood(n) > 0.3)
    return root


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / "in"))


def manifest(folder: Path, *columns: str, cases: Sequence[str] = CASES, **cells: str) -> Path:
    names = {"reference": "reference", "prediction": "map", "FLAIR": "FLAIR"}
    lines = [{"case": case, **{c: f"{case}_{names[c]}.nii.gz" for c in columns}} for case in cases]
    lines[0] |= cells
    return write_manifest(folder / "cases.tsv", lines)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command, without its picture, into a folder that it returns."""
    monkeypatch.setattr(command, "evaluation_figure", lambda *_: _[-1].write_bytes(b"picture"))

    def call(source: Path, *options: str, name: str = "results") -> Path:
        assert main(["evaluate", str(source), str(tmp_path / name), "--bootstrap", "50", *options]) == 0
        return tmp_path / name

    return call


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command, which must refuse with one line, status 1 and an untouched disk; returns the line."""

    def call(source: Path, *options: str) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert main(["evaluate", str(source), str(tmp_path / "results"), *options]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("xaiseg: error: ")
        assert snapshot(tmp_path) == before
        return line.removeprefix("xaiseg: error: ")

    return call


def cells(row: dict[str, str], names: Sequence[str]) -> list[float]:
    return [np.nan if row[name] == "n/a" else float(row[name]) for name in names]


def expected_rows(threshold: float, **settings: float | str) -> list[dict[str, float]]:
    own = EvaluationSettings(**settings)  # type: ignore[arg-type]
    grid = Grid(SHAPE, RAS)
    return [evaluate_case(likelihood(n) > threshold, truth(n), grid, own).measures for n in range(4)]


def check_cases(out: Path, expected: list[dict[str, float]]) -> None:
    rows = table(out / "cases.tsv")
    assert [row["case"] for row in rows] == list(CASES)
    for row, measures in zip(rows, expected, strict=True):
        # tables have 7 digits
        assert cells(row, list(MEASURES)) == pytest.approx([measures[m] for m in MEASURES], rel=1e-6, nan_ok=True)


def test_masks_of_segment(pristine: Path, run: Run) -> None:
    out = run(manifest(pristine, "reference"), "--predictions", str(pristine / "out"))
    check_cases(out, expected_rows(0.3))
    assert json.loads((out / "evaluation.json").read_text())["settings"]["threshold"] is None
    rows = table(out / "cases.tsv")
    assert [row["subject"] for row in rows] == ["01", "01", "02", "03"]
    assert [row["session"] for row in rows] == ["1", "2", "n/a", "n/a"]
    assert [row["lesion_tpr"] for row in rows] == ["1", "1", "1", "n/a"]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--rule", "iou", "--iou", "0.6"], {"rule": "iou", "iou": 0.6}),
        (["--connectivity", "6", "--min-voxels", "5", "--r", "0.01"], {"connectivity": 6, "min_voxels": 5, "r": 0.01}),
    ],
)
def test_a_column_of_maps_at_one_half(
    options: list[str], settings: dict[str, float | str], pristine: Path, run: Run
) -> None:
    out = run(manifest(pristine, "reference", "prediction"), *options)
    check_cases(out, expected_rows(0.5, **settings))
    written = json.loads((out / "evaluation.json").read_text())["settings"]
    assert written | {k: v for k, v in settings.items() if k != "iou"} == written
    assert written["threshold"] == 0.5


def test_a_threshold_takes_the_maps_of_segment(pristine: Path, run: Run) -> None:
    out = run(manifest(pristine, "reference"), "--predictions", str(pristine / "out"), "--threshold", "0.2")
    check_cases(out, expected_rows(0.2))
    assert expected_rows(0.2) != expected_rows(0.3)


def test_every_file_its_columns_and_their_meaning(pristine: Path, run: Run) -> None:
    out = run(manifest(pristine, "reference", "prediction"))
    names = {"cases.tsv", "summary.tsv", "lesions.tsv", "evaluation.json", "evaluation.png", "dataset_description.json"}
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == names | {".bidsignore", "logs/run.json"}
    description = json.loads((out / "evaluation.json").read_text())
    for name in ("cases.tsv", "summary.tsv", "lesions.tsv"):
        assert list(table(out / name)[0]) == list(description["columns"][name])
    assert {"xaiseg", "numpy", "scipy"} <= set(description["versions"])
    assert description["files"]["sub-02"]["prediction"].endswith("sub-02_map.nii.gz")


def test_the_summary_resamples_patients(pristine: Path, run: Run) -> None:
    out = run(manifest(pristine, "reference", "prediction"), "--seed", "3")
    expected = summarise(expected_rows(0.5), ["01", "01", "02", "03"], 50, 3)
    rows = table(out / "summary.tsv")
    assert len(rows) == len(expected)
    for row, own in zip(rows, expected, strict=True):
        assert (row["measure"], row["over"], row["patients"]) == (own["measure"], own["over"], "3")
        names = ["estimate", "low", "high", "bca_low", "bca_high", "n"]
        assert cells(row, names) == pytest.approx([own[name] for name in names], rel=1e-6, nan_ok=True)


def test_every_lesion_is_listed_where_it_lies(pristine: Path, run: Run) -> None:
    out = run(manifest(pristine, "reference", "prediction"))
    rows = [row for row in table(out / "lesions.tsv") if row["case"] == "sub-02"]
    groups = [(row["mask"], row["group"]) for row in rows]
    assert sorted(groups) == [("predicted", "FP")] * 2 + [("predicted", "TP"), ("reference", "FN"), ("reference", "TP")]
    (found,) = (row for row in rows if row["group"] == "TP" and row["mask"] == "reference")
    assert cells(found, [f"centroid_{a}_mm" for a in "xyz"]) == pytest.approx([8 - 14, 4.5 - 17, 32 - 11])
    (hit,) = (row for row in rows if row["group"] == "TP" and row["mask"] == "predicted")
    assert (hit["partner"], hit["overlap"]) == (found["lesion"], str(blob((8, 9, 8), 2.2).sum()))
    assert {row["partner"] for row in rows if row["group"] in ("FP", "FN")} == {"n/a"}


def test_files_stored_in_another_order_of_axes(folder: Path, run: Run) -> None:
    """Both turned alike: the same measures, since spacing turns with them."""
    for n, case in enumerate(CASES):
        save(folder / f"{case}_reference.nii.gz", truth(n), "PIR")
        save(folder / f"{case}_map.nii.gz", likelihood(n), "PIR")
    check_cases(run(manifest(folder, "reference", "prediction")), expected_rows(0.5))


def test_the_brain_is_where_an_image_is_not_zero(pristine: Path, run: Run) -> None:
    out = run(manifest(pristine, "reference", "prediction", "FLAIR"), "--brain", "--channels", "FLAIR")
    rows = table(out / "cases.tsv")
    for n, row in enumerate(rows):
        predicted = likelihood(n) > 0.5
        brain = (likelihood(n) > 0.03) | truth(n)
        assert row["field_of_view"] == str(brain.sum())
        false = (predicted & ~truth(n)).sum()
        assert float(row["specificity"]) == pytest.approx(1 - false / (brain.sum() - truth(n).sum()), rel=1e-6)
    assert "voxels where any input image is not 0" in (out / "evaluation.json").read_text()


def test_a_bids_folder(folder: Path, run: Run) -> None:
    for n, case in enumerate(CASES):
        parts = case.split("_")
        for channel in ("FLAIR", "T1w"):
            save(folder.joinpath("bids", *parts, "anat", f"{case}_{channel}.nii.gz"), likelihood(n))
        manual = folder.joinpath("bids", "derivatives", "manual", *parts, "anat")
        save(manual / f"{case}_label-L_mask.nii.gz", truth(n))
    check_cases(run(folder / "bids", "--predictions", str(folder / "out")), expected_rows(0.3))


def test_tuning_uses_the_best_combination(pristine: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The second lesion needs a threshold below 0.4, the speck a size of 2 voxels."""
    grid = ["threshold=0.3:0.7:0.2", "min-voxels=0,2"]
    source = manifest(pristine, "reference")
    out = run(source, "--predictions", str(pristine / "out"), "--tune", *grid, "--tune-for", "f1")
    rows = table(out / "tuning.tsv")
    assert [(float(r["threshold"]), int(r["min_voxels"])) for r in rows] == [
        (t, m) for t in (0.3, 0.5, 0.7) for m in (0, 2)
    ]
    for row in rows:
        own = expected_rows(float(row["threshold"]), min_voxels=int(row["min_voxels"]))
        for name in ("ndsc", "dice", "lesion_f1"):
            assert float(row[name]) == pytest.approx(np.nanmean([r[name] for r in own]), rel=1e-6)
    (best,) = (row for row in rows if row["chosen"] == "1")
    assert (best["threshold"], best["min_voxels"]) == ("0.3", "2")
    check_cases(out, expected_rows(0.3, min_voxels=2))
    printed = capsys.readouterr().out
    assert "threshold 0.3, min-voxels 2" in printed
    assert "optimistic" in printed
    settings = json.loads((out / "evaluation.json").read_text())["settings"]
    assert (settings["threshold"], settings["min_voxels"]) == (0.3, 2)


def test_what_is_not_tuned_stays(pristine: Path, run: Run) -> None:
    source = manifest(pristine, "reference", "prediction")
    rows = table(run(source, "--threshold", "0.4", "--tune", "min-voxels=1,9") / "tuning.tsv")
    assert [row["threshold"] for row in rows] == ["0.4", "0.4"]


def test_the_terminal_has_a_summary(pristine: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(manifest(pristine, "reference", "prediction"))
    printed = capsys.readouterr().out
    assert printed.startswith("4 scans of 3 patients; 0 masks, 4 probability maps")
    assert "V: all voxels of the array" in printed
    (dice,) = (row for row in table(out / "summary.tsv") if row["measure"] == "dice")
    (line,) = (line for line in printed.splitlines() if line.startswith("Dice "))
    assert line.split()[1:3] == [f"{float(dice[name]):.3f}" for name in ("estimate", "median")]


def test_segment_and_evaluate_agree(native_model: Path, cohort: Path, run: Run, tmp_path: Path) -> None:
    assert main(["segment", str(cohort), str(tmp_path / "seg"), "--model", str(native_model)]) == 0
    out = run(cohort, "--predictions", str(tmp_path / "seg"))
    names = ("dice", "ndsc", "TP", "FP", "FN")
    for own, segmented in zip(table(out / "cases.tsv"), table(tmp_path / "seg" / "cases.tsv"), strict=True):
        assert [own[name] for name in names] == [segmented[name] for name in names]


def test_an_earlier_run_is_replaced_on_request(pristine: Path, run: Run, refused: Refused) -> None:
    source = manifest(pristine, "reference", "prediction")
    out = run(source, "--tune", "threshold=0.3,0.5")
    assert refused(source).startswith(f"{out}: is not empty")
    run(source, "--overwrite")
    assert not (out / "tuning.tsv").exists()


def test_nothing_is_left_of_a_run_that_fails(
    pristine: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = manifest(pristine, "reference", "prediction")
    run(source)
    before = snapshot(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "evaluation_figure", full)
    assert main(["evaluate", str(source), str(tmp_path / "results"), "--overwrite", "--bootstrap", "50"]) == 1
    assert snapshot(tmp_path) == before


def test_missing_prediction(folder: Path, refused: Refused) -> None:
    place = folder / "out" / "sub-02" / "anat" / "sub-02_space-orig_label-L_mask.nii.gz"
    place.unlink()
    options = ["--predictions", str(folder / "out")]
    source = manifest(folder, "reference")
    assert refused(source, *options).startswith(f"{place}: does not exist; expected a prediction for every case")
    (folder / "out" / "logs").mkdir()
    failed = {"cases": [{"case": "sub-02", "status": "failed", "message": "constant"}]}
    (folder / "out" / "logs" / "run.json").write_text(json.dumps(failed))
    assert "its segmentation failed: constant" in refused(source, *options)


def test_several_predictions(folder: Path, refused: Refused) -> None:
    mask = folder / "out" / "sub-02" / "anat" / "sub-02_space-orig_label-L_mask.nii.gz"
    shutil.copy(mask, mask.with_name("sub-02_space-MNI_label-L_mask.nii.gz"))
    line = refused(manifest(folder, "reference"), "--predictions", str(folder / "out"))
    assert line.startswith(f"{mask.parent}: 2 files for the prediction of sub-02")


def test_no_predictions_at_all(folder: Path, refused: Refused) -> None:
    source = manifest(folder, "reference")
    line = refused(source)
    assert line.startswith(f"{source}: no usable column 'prediction'")
    assert "--predictions DIR" in line
    assert refused(source, "--predictions", str(folder / "no")).startswith(f"--predictions {folder / 'no'}: no such")
    source = manifest(folder, "reference", "prediction", prediction="n/a")
    assert refused(source).startswith(f"{source}: case 'sub-01_ses-1' has no prediction")
    source = manifest(folder, "reference", "prediction", prediction="gone.nii")
    assert refused(source).startswith(f"{folder / 'gone.nii'}: does not exist")


def test_a_case_without_reference_and_no_case(folder: Path, refused: Refused) -> None:
    source = manifest(folder, "reference", "prediction", reference="n/a")
    assert refused(source).startswith("sub-01_ses-1: has no reference mask")
    assert "'sub-9': not in the input" in refused(source, "--cases", "sub-9")
    source.write_text("case\treference\tprediction\n")
    assert refused(source).startswith(f"{source}: lists no case")
    (folder / "empty").mkdir()
    assert refused(folder / "empty", "--predictions", str(folder / "out")).startswith(f"{folder / 'empty'}: no case")


@pytest.mark.parametrize("column", ["map", "FLAIR"])
def test_another_grid(column: str, folder: Path, refused: Refused) -> None:
    moved = RAS.copy()
    moved[0, 3] += 1
    path = folder / f"sub-02_{column}.nii.gz"
    nib.save(stored(likelihood(2), affine=moved), path)
    line = refused(manifest(folder, "reference", "prediction", "FLAIR"), "--brain", "--channels", "FLAIR")
    assert line.startswith(f"{path}: not on the grid of the reference {folder / 'sub-02_reference.nii.gz'}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, "to 1.5; expected a mask of 0 and 1"),
        (-0.25, "values from -0.25"),
        (2.0, "expected a mask of 0 and 1, or probabilities from 0 to 1"),
        (np.nan, "voxels not finite"),
        (np.inf, "voxels not finite"),
    ],
)
def test_values_that_are_no_probabilities(value: float, message: str, folder: Path, refused: Refused) -> None:
    values = likelihood(2)
    values[3, 4, 5] = value
    path = save(folder / "sub-02_map.nii.gz", values)
    line = refused(manifest(folder, "reference", "prediction"))
    assert line.startswith(f"{path}: ")
    assert message in line


def test_a_reference_that_is_no_mask(folder: Path, refused: Refused) -> None:
    path = save(folder / "sub-02_reference.nii.gz", likelihood(2))
    assert refused(manifest(folder, "reference", "prediction")).startswith(f"{path}: voxels without a valid label")


def test_tuning_needs_probabilities(folder: Path, refused: Refused) -> None:
    path = save(folder / "sub-01_ses-2_map.nii.gz", likelihood(1) > 0.3)
    source = manifest(folder, "reference", "prediction")
    line = refused(source, "--tune", "threshold=0.3,0.5")
    assert line.startswith(f"{path}: has only the values 0 and 1; expected probabilities")
    assert refused(source, "--tune", "threshold=2").startswith(
        "--tune threshold=2: expected thresholds between 0 and 1"
    )


def test_an_unknown_rule(pristine: Path, refused: Refused) -> None:
    line = refused(manifest(pristine, "reference", "prediction"), "--rule", "nearest")
    assert line.startswith("--rule nearest: expected one of overlap, iou")


def test_images_that_are_empty(folder: Path, refused: Refused) -> None:
    save(folder / "sub-02_FLAIR.nii.gz", np.zeros(SHAPE, np.float32))
    line = refused(manifest(folder, "reference", "prediction", "FLAIR"), "--brain", "--channels", "FLAIR")
    assert line.startswith("sub-02: all images are 0 everywhere")
