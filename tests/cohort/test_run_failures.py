"""A cohort in which something goes wrong on the way."""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tiny import CASE, Explain, progress_free, snapshot, table, write_case, write_manifest

from xaiseg._types import Instance, SaliencyMap
from xaiseg.cohort import explaining, local, stages, tables
from xaiseg.cohort.folder import RunFolder
from xaiseg.cohort.journal import Journal
from xaiseg.cohort.output import OutputFolder
from xaiseg.cohort.session import Session
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


def written(out: Path) -> dict[str, bytes | None]:
    """The results, without the logs."""
    return {name: content for name, content in snapshot(out).items() if not name.startswith("logs")}


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
    (failure,) = table(out / "logs" / "failures.tsv")
    assert (failure["case"], failure["unit"], failure["lesion"]) == ("sub-02", "segmentation", "n/a")
    assert failure["message"] == rows[1]["message"]
    assert not [name for name in written(out) if "sub-02" in name]

    whole = explain("whole", source=cohort)
    good = [row for row in table(whole / "lesions.tsv") if row["case"] != "sub-02"]
    assert table(out / "lesions.tsv") == good
    for file in out.rglob("*.nii.gz"):
        assert file.read_bytes() == (whole / file.relative_to(out)).read_bytes()


def test_a_case_that_was_mended_is_all_that_is_done_again(
    explain: Explain, broken_cohort: Path, cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = explain("out", source=broken_cohort, status=1)
    shutil.copy(cohort.parent / "sub-02_T1w.nii.gz", broken_cohort.parent / "sub-02_T1w.nii.gz")
    capsys.readouterr()
    explain("out", source=broken_cohort)
    assert "plan: 1 case, 2 lesions; 4 units done before" in capsys.readouterr().out
    assert written(out) == written(explain("whole", source=cohort)) | {
        "dataset_description.json": (out / "dataset_description.json").read_bytes()  # names its source
    }
    assert table(out / "logs" / "failures.tsv") == []


def test_a_case_that_fails_while_explained_keeps_its_segmentation(
    explain: Explain, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, seen = local.load_scan, []

    def vanished(case: Any, *arguments: Any) -> Any:
        seen.append(case.name)
        if case.name == "sub-02" and seen.count("sub-02") == 2:
            raise InputError("sub-02_FLAIR.nii.gz: does not exist")
        return load(case, *arguments)

    monkeypatch.setattr(local, "load_scan", vanished)
    out = explain("out", source=cohort, status=1)
    assert [row["status"] for row in table(out / "cases.tsv")] == ["done", "failed", "done"]
    assert "sub-02" not in (out / "lesions.tsv").read_text()
    assert len([name for name in written(out) if "sub-02_" in name]) == 3
    explain("out", source=cohort)
    assert written(out) == written(explain("whole", source=cohort))


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, when: Callable[[Sequence[Instance]], bool]) -> None:
    """Groups of lesions for which `when` holds fail."""
    explained = stages.explain_group

    def explain_group(key: Any, method: Any, predictor: Any, image: Any, group: Any, progress: Any = None) -> Any:
        if when(group):
            raise error
        return explained(key, method, predictor, image, group, progress)

    monkeypatch.setattr(stages, "explain_group", explain_group)


def test_a_failing_lesion_does_not_take_the_others_with_it(
    explain: Explain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, ZeroDivisionError("a mistake"), lambda group: any(i.label == 2 for i in group))
        out = explain("out", status=1)
    (row,) = table(out / "cases.tsv")
    assert (row["status"], row["explained"]) == ("partial", "1")
    assert row["message"] == "smoothgrad, lesion 2: ZeroDivisionError: a mistake"
    assert [row["lesion"] for row in table(out / "lesions.tsv")] == ["1"]
    (failure,) = table(out / "logs" / "failures.tsv")
    assert (failure["unit"], failure["lesion"]) == ("smoothgrad", "2")
    (entry,) = [e for e in Journal(out, CASE).entries() if e["entry"] == "failed"]
    assert "Traceback" in entry["traceback"]
    capsys.readouterr()
    explain("out")
    assert "plan: 1 case, 1 lesion; 1 units done before" in capsys.readouterr().out
    assert written(out) == written(explain("whole"))


def test_the_first_failure_stops_the_run_where_that_is_wanted(
    explain: Explain, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, FloatingPointError("no number"), lambda group: True)
        out = explain("out", "--stop-on-first-crash", source=cohort, status=1)
    rows = table(out / "cases.tsv")
    assert [row["status"] for row in rows].count("left") >= 1
    explain("out", source=cohort)
    assert written(out) == written(explain("whole", source=cohort))


@pytest.mark.parametrize("fits", [2, 0])
def test_out_of_memory_halves_the_chunk(fits: int, explain: Explain, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []
    explained = stages.explain_group

    def explain_group(key: Any, method: Any, *arguments: Any) -> Any:
        chunks.append(method.settings | {"chunk": current()})
        if current() > fits:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")
        return explained(key, method, *arguments)

    sessions: list[Session] = []
    begin = Session.__init__
    monkeypatch.setattr(Session, "__init__", lambda self, *a: (sessions.append(self), begin(self, *a))[1])
    monkeypatch.setattr(stages, "explain_group", explain_group)

    def current() -> int:
        assert sessions[-1].settings is not None
        assert sessions[-1].settings.chunk is not None
        return sessions[-1].settings.chunk

    out = explain("out", "--chunk", "8", status=0 if fits else 1)
    assert [c["chunk"] for c in chunks][:3] == [8, 4, 2]
    if fits:
        assert table(out / "lesions.tsv") == table(explain("whole", "--chunk", "2") / "lesions.tsv")
    else:
        assert {row["status"] for row in table(out / "cases.tsv")} == {"failed"}
        assert table(out / "logs" / "failures.tsv")[0]["message"].startswith(
            "out of memory, however few rows at a time"
        )


def test_a_map_that_is_no_number_is_a_failure(explain: Explain, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host = explaining._on_host

    def spoilt(saliency: SaliencyMap) -> SaliencyMap:
        found = on_host(saliency)
        return found._replace(values=np.full_like(found.values, np.nan))

    monkeypatch.setattr(explaining, "_on_host", spoilt)
    out = explain("out", status=1)
    assert "values that are no numbers" in table(out / "cases.tsv")[0]["message"]


def test_no_case_left_is_one_error_and_no_output(
    explain: Explain, broken_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tmp_path)
    explain("out", "--cases", "sub-02", source=broken_cohort, status=1)
    (line,) = progress_free(capsys.readouterr().err)
    assert line.startswith("xaiseg: error: ")
    assert snapshot(tmp_path) == before


def test_a_full_disk_in_the_last_step_costs_that_step(
    explain: Explain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tables, "summary_figure", full)
        explain("out", status=1)
    (line,) = progress_free(capsys.readouterr().err)
    assert "desc-smoothgrad_summary.png: cannot be written (No space left on device)" in line
    out = explain("out")
    assert "nothing left to do" in capsys.readouterr().out
    assert written(out) == written(explain("whole"))


@pytest.mark.parametrize(("module", "step"), [(stages, "segment_scan"), (stages, "explain_group")])
def test_an_interrupted_run_goes_on(
    module: Any, step: str, explain: Explain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second Ctrl-C, at once."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupted)
        out = explain("out", status=130)
    assert progress_free(capsys.readouterr().err) == ["xaiseg: interrupted; nothing half-written was left"]
    assert not [name for name in snapshot(out) if name.endswith(".tmp")]
    explain("out")
    assert written(out) == written(explain("whole"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_lesions_under_way_finish(
    number: int, explain: Explain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explained = stages.explain_group
    groups = []

    def signalled(key: Any, method: Any, predictor: Any, image: Any, group: Any, progress: Any) -> Any:
        groups.append([instance.label for instance in group])
        signal.raise_signal(number)
        return explained(key, method, predictor, image, group, progress)

    monkeypatch.setattr(explaining, "_PASSES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "explain_group", signalled)
        out = explain("out", status=130)
    assert groups == [[1]]
    captured = capsys.readouterr()
    assert "xaiseg: stopped: 1 case: 1 left; give the same command again to go on" in captured.err
    assert [row["lesion"] for row in table(out / "lesions.tsv")] == ["1"]
    explain("out")
    assert written(out) == written(explain("whole"))


def test_an_empty_case_among_others_is_no_failure(explain: Explain, tmp_path: Path) -> None:
    lines = [write_case(tmp_path / "in", f"sub-0{n}", seed=n) for n in (1, 2)]
    flair = tmp_path / "in" / "sub-02_FLAIR.nii.gz"
    image = nib.load(flair)
    noise = np.random.default_rng(0).normal(100, 6, image.shape).astype(np.float32) * (image.get_fdata() != 0)
    nib.save(nib.Nifti1Image(noise, image.affine, image.header), flair)
    out = explain("out", source=write_manifest(tmp_path / "in" / "cases.tsv", lines))
    rows = table(out / "cases.tsv")
    assert [row["status"] for row in rows] == ["done", "empty"]
    assert rows[1]["message"] == "no voxel above the threshold"
    assert {row["case"] for row in table(out / "lesions.tsv")} == {"sub-01"}


def test_results_of_a_killed_run_are_known_as_ours(tmp_path: Path) -> None:
    """Whatever happens after the start, the folder says who wrote it, so that its masks are never taken for a reference."""
    output = RunFolder(tmp_path / "out")
    output.begin({}, "somewhere")
    description = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert description["GeneratedBy"][0]["Name"] == "xaiseg"
    output.discard()
    assert not (tmp_path / "out").exists()


def test_an_interruption_just_after_a_file_was_written_leaves_nothing(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    output.begin("somewhere", ())

    def draw(path: Path) -> None:
        path.write_bytes(b"picture")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output.figure(tmp_path / "out" / "picture.png", draw)
    output.discard()
    assert not (tmp_path / "out").exists()
