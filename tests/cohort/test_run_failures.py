"""A cohort in which something goes wrong on the way."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tiny import Explain, progress_free, snapshot, table, timeless, write_case, write_manifest

from xaiseg.cohort import records, run
from xaiseg.cohort.output import OutputFolder
from xaiseg.errors import InputError


@pytest.fixture
def broken_cohort(tmp_path: Path) -> Path:
    """Three cases, the second with a NaN voxel, which no header shows."""
    lines = [write_case(tmp_path / "in", f"sub-0{n}", seed=n) for n in (1, 2, 3)]
    spoil(tmp_path / "in" / "sub-02_T1w.nii.gz")
    return write_manifest(tmp_path / "in" / "cases.tsv", lines)


def spoil(path: Path) -> None:
    image = nib.load(path)
    data = np.asarray(image.dataobj).copy()
    data[5, 5, 5] = np.nan
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)


def test_a_failing_case_is_recorded_and_the_others_complete(
    explain: Explain, broken_cohort: Path, cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = explain("out", source=broken_cohort, status=1)
    (line,) = progress_free(capsys.readouterr().err)
    assert line.startswith("sub-02: failed: ")
    assert "sub-02_T1w.nii.gz: voxels not finite" in line
    rows = table(out / "cases.tsv")
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert rows[1]["message"] == line.removeprefix("sub-02: failed: ")
    assert [rows[n]["message"] for n in (0, 2)] == ["n/a", "n/a"]
    assert not [name for name in snapshot(out) if "sub-02" in name]

    whole = explain("whole", source=cohort)
    good = [row for row in timeless(table(whole / "lesions.tsv")) if row["case"] != "sub-02"]
    assert timeless(table(out / "lesions.tsv")) == good
    for file in out.rglob("*.nii.gz"):
        assert file.read_bytes() == (whole / file.relative_to(out)).read_bytes()


def test_a_case_that_fails_while_explained_leaves_no_file(
    explain: Explain, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, seen = run.load_scan, []

    def vanished(case: Any, *arguments: Any) -> Any:
        seen.append(case.name)
        if case.name == "sub-02" and seen.count("sub-02") == 2:
            raise InputError("sub-02_FLAIR.nii.gz: does not exist")
        return load(case, *arguments)

    monkeypatch.setattr(run, "load_scan", vanished)
    out = explain("out", source=cohort, status=1)
    assert [row["status"] for row in table(out / "cases.tsv")] == ["done", "failed", "done"]
    assert not [name for name in snapshot(out) if "sub-02" in name]
    assert "sub-02" not in (out / "lesions.tsv").read_text()


def test_no_case_left_is_one_error_and_no_output(
    explain: Explain, broken_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tmp_path)
    explain("out", "--cases", "sub-02", source=broken_cohort, status=1)
    (line,) = progress_free(capsys.readouterr().err)
    assert line.startswith("xaiseg: error: ")
    assert snapshot(tmp_path) == before


def test_a_full_disk_in_the_last_step_leaves_nothing(
    explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "summary_figure", full)
    before = snapshot(tmp_path)
    explain("out", status=1)
    (line,) = progress_free(capsys.readouterr().err)
    assert line.endswith("desc-smoothgrad_summary.png: cannot be written (No space left on device)")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("step", ["segment_scan", "explain_scan"])
def test_an_interrupted_run_leaves_nothing(
    step: str, explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, step, interrupted)
    before = snapshot(tmp_path)
    explain("out", status=130)
    assert progress_free(capsys.readouterr().err) == ["xaiseg: interrupted; nothing half-written was left"]
    assert snapshot(tmp_path) == before


def test_an_empty_case_among_others_is_no_failure(explain: Explain, tmp_path: Path) -> None:
    lines = [write_case(tmp_path / "in", f"sub-0{n}", seed=n) for n in (1, 2)]
    flair = tmp_path / "in" / "sub-02_FLAIR.nii.gz"
    image = nib.load(flair)
    noise = np.random.default_rng(0).normal(100, 6, image.shape).astype(np.float32)
    nib.save(nib.Nifti1Image(noise, image.affine, image.header), flair)
    out = explain("out", source=write_manifest(tmp_path / "in" / "cases.tsv", lines))
    rows = table(out / "cases.tsv")
    assert [row["status"] for row in rows] == ["done", "empty"]
    assert rows[1]["message"] == "no voxel above the threshold"
    assert {row["case"] for row in table(out / "lesions.tsv")} == {"sub-01"}


def test_results_of_a_killed_run_are_known_as_ours(tmp_path: Path) -> None:
    """Whatever happens after the start, the folder says who wrote it, so that its masks are never taken for a reference."""
    output = OutputFolder(tmp_path / "out")
    output.begin("somewhere")
    description = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert description["GeneratedBy"][0]["Name"] == "xaiseg"
    output.discard()
    assert not (tmp_path / "out").exists()


def test_an_interruption_just_after_a_file_was_written_leaves_nothing(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    output.begin("somewhere")

    def draw(path: Path) -> None:
        path.write_bytes(b"picture")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output.figure(tmp_path / "out" / "picture.png", draw)
    output.discard()
    assert not (tmp_path / "out").exists()
