"""`--fold all`: every case is evaluated once, as the model that has not seen it segments it."""

import csv
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from training.__main__ import main
from xaiseg.checkpoints import load_model
from xaiseg.cohort import Request, segment
from xaiseg.metrics import dice

TINY = ('options={"channels": [4, 8], "strides": [2], "norm": "batch"}', "patch=8,8,8", "window=16,16,16")
SHORT = (
    "steps=3",
    "validate_every=3",
    "thresholds=0.5",
    "min_voxels=1",
    "warmup=0",
    "margin=0",
    "augmentation.affine=0",
)


def rows(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.slow
def test_every_case_by_the_model_that_has_not_seen_it(bids, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, add = bids
    for name in ("sub-01", "sub-02_ses-1", "sub-02_ses-2", "sub-03"):
        add(name)
    out = tmp_path / "runs"
    command = ["--config", "ms_flair_t1w", "--data", str(folder), "--folds", "3", "--fold", "all", "--out", str(out)]
    command += [word for setting in (*TINY, *SHORT) for word in ("--set", setting)]
    assert main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"evaluation: {out / 'evaluation'}" in said
    assert "optimistic" not in said

    folds = {row["case"]: row["fold"] for row in rows(out / "fold-0" / "splits.tsv")}
    measured = {row["case"]: row for row in rows(out / "evaluation" / "cases.tsv")}
    assert sorted(measured) == sorted(folds) == ["sub-01", "sub-02_ses-1", "sub-02_ses-2", "sub-03"]
    assert folds["sub-02_ses-1"] == folds["sub-02_ses-2"]
    for case, fold in folds.items():
        model = load_model(out / f"fold-{fold}" / "model")
        assert case not in model.spec.source
        again = tmp_path / "again" / case
        segment(model, Request(folder, again, cases=(case,)), say=lambda _: None)
        (mask,) = again.rglob("*_mask.nii.gz")
        predicted = np.asarray(nib.load(mask).dataobj) > 0
        (reference,) = (folder / "derivatives").rglob(f"{case}_label-L_mask.nii.gz")
        expected = dice(predicted, np.asarray(nib.load(reference).dataobj) > 0)
        assert float(measured[case]["dice"]) == pytest.approx(expected, abs=1e-6)  # as the table rounds it

    states = sorted((path, path.stat().st_mtime_ns) for path in out.glob("fold-*/checkpoints/last/*"))
    assert main(command) == 0  # nothing is trained again
    assert sorted((path, path.stat().st_mtime_ns) for path in out.glob("fold-*/checkpoints/last/*")) == states


def test_what_was_chosen_on_the_held_out_is_said(bids, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, add = bids
    for name in ("sub-01", "sub-02"):
        add(name)
    command = ["--config", "ms_flair_t1w", "--data", str(folder), "--folds", "2", "--fold", "all"]
    command += ["--out", str(tmp_path / "runs")]
    command += [word for setting in (*TINY, *SHORT, "thresholds=0.3,0.5") for word in ("--set", setting)]
    assert main(command) == 0, capsys.readouterr().err
    assert "so the numbers are optimistic" in capsys.readouterr().out


@pytest.mark.slow
def test_folds_as_a_table_names_them(bids, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every fold of it is trained and evaluated; its patients are those of the evaluation."""
    folder, add = bids
    for name in ("sub-01", "sub-02", "sub-03"):
        add(name)
    lines = ["case\tpatient\tload\tfold", *(f"sub-0{n}\t0{n}\t1.0\t{n % 2}" for n in (1, 2, 3))]
    (tmp_path / "splits.tsv").write_text("\n".join(lines) + "\n")
    command = ["--config", "ms_flair_t1w", "--data", str(folder), "--splits", str(tmp_path / "splits.tsv")]
    command += ["--fold", "all", "--out", str(tmp_path / "runs")]
    command += [word for setting in (*TINY, *SHORT) for word in ("--set", setting)]
    assert main(command) == 0, capsys.readouterr().err
    measured = rows(tmp_path / "runs" / "evaluation" / "cases.tsv")
    assert [(row["case"], row["patient"]) for row in measured] == [("sub-02", "02"), ("sub-01", "01"), ("sub-03", "03")]


def test_stopped_while_it_evaluates(bids, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to save then, so the first signal ends it."""
    folder, add = bids
    for name in ("sub-01", "sub-02"):
        add(name)

    def evaluated(*_: object) -> Path:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("goes on")

    monkeypatch.setattr("training.__main__.evaluate_held_out", evaluated)
    monkeypatch.setattr("training.__main__._train", lambda *_: tmp_path)
    command = ["--config", "ms_flair_t1w", "--data", str(folder), "--folds", "2", "--fold", "all"]
    assert main([*command, "--out", str(tmp_path / "runs")]) == 128 + signal.SIGTERM
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("fold", ["-1", "abc", "1.5"])
def test_no_such_fold(fold: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--config", "unet_cpu", f"--fold={fold}", "--data", "x", "--out", "y"])
    assert f"argument --fold: '{fold}' is neither a number from 0 on nor 'all'" in capsys.readouterr().err


def test_without_folds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--config", "unet_cpu", "--fold", "all", "--data", str(tmp_path), "--out", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.startswith("error: --fold all: expected folds: give --folds K or --splits TSV")
