"""A run that is repeated, shared or changed: what is trusted of before, what is done again, what is refused."""

import fcntl
import json
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import Explain, progress_free, snapshot, table

from xaiseg.cohort import stages
from xaiseg.cohort.folder import RunFolder
from xaiseg.cohort.journal import CaseRecord, Journal


def results(out: Path) -> dict[str, bytes | None]:
    return {name: content for name, content in snapshot(out).items() if not name.startswith("logs")}


def done(out: Path) -> Counter[tuple]:
    """How often each unit was recorded."""
    found: Counter[tuple] = Counter()
    for path in (out / "logs" / "cases").glob("*.jsonl"):
        for entry in map(json.loads, path.read_text().splitlines()):
            found[entry["case"], entry["entry"]] += entry["entry"] == "segmented"
            for lesion in entry.get("lesions", ()) if entry["entry"] == "explained" else ():
                found[entry["case"], lesion["lesion"]] += 1
    return found


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group a lesion."""
    monkeypatch.setattr("xaiseg.cohort.explaining._PASSES", 1)


def cut(journal: Path, lines: int, rest: int = 0) -> None:
    """What a kill leaves: the first lines, and of the next one a few bytes."""
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole[:lines]) + b"".join(whole[lines:])[:rest])


@pytest.mark.parametrize(("lines", "rest"), [(0, 0), (0, 40), (1, 0), (1, 200), (2, 1), (3, 0), (3, 30)])
def test_wherever_a_journal_ends_the_run_goes_on(
    lines: int, rest: int, explain: Explain, cohort: Path, small_groups: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines: segmentation, lesion 1, lesion 2, the case's table."""
    out = explain("out", source=cohort)
    before = results(out)
    cut(out / "logs" / "cases" / "sub-02.jsonl", lines, rest)
    (out / "lesions.tsv").unlink()
    capsys.readouterr()
    explain("out", source=cohort)
    assert results(out) == before
    left = {
        0: "plan: 1 case, 2 lesions; 4 units",
        1: "plan: 1 case, 2 lesions; 4 units",
        2: "plan: 1 case, 1 lesion; 5 units",
    }
    assert left.get(lines, "nothing left to do: 6 units") in capsys.readouterr().out
    assert set(done(out).values()) == {0, 1}


@pytest.mark.parametrize("damage", ["missing", "shorter", "other"])
@pytest.mark.parametrize(
    ("name", "lesions"), [("desc-smoothgrad_lesion-002_saliency.nii.gz", 1), ("desc-instances_dseg.nii.gz", 2)]
)
def test_a_damaged_file_is_made_again(
    damage: str, name: str, lesions: int, explain: Explain, cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = explain("out", source=cohort)
    before = results(out)
    (file,) = (out / "sub-02").rglob(f"*{name}")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-20] if damage == "shorter" else content)
    capsys.readouterr()
    explain("out", source=cohort)
    printed = capsys.readouterr().out
    assert f"{name} is missing or damaged" in printed
    assert f"plan: 1 case, {lesions} lesion" in printed
    assert results(out) == before


def test_what_was_half_written_when_a_process_was_killed_is_removed(explain: Explain, cohort: Path) -> None:
    out = explain("out", source=cohort)
    before = results(out)
    cut(out / "logs" / "cases" / "sub-02.jsonl", 1)
    (out / "sub-02" / "anat" / ".sub-02_space-orig_saliency.nii.gz.123.tmp").write_bytes(b"half")
    explain("out", source=cohort)
    assert results(out) == before


def test_other_settings_are_refused_and_named(explain: Explain, capsys: pytest.CaptureFixture[str]) -> None:
    out = explain("out")
    before = snapshot(out)
    for options, named in (
        (["--samples", "3"], "methods.smoothgrad.samples: 2 before, 3 now"),
        (["--noise", "0.1"], "methods.smoothgrad.noise: 0.05 before, 0.1 now"),
        (["--method", "gradient"], "methods.smoothgrad: there before, not now; methods.gradient: not there before"),
        (["--min-voxels", "7"], "min_voxels: 6 before, 7 now"),
        (["--lesions", "1"], "lesions: none before, [1] now"),
        (["--precision", "bfloat16"], "precision: float32 before, bfloat16 now"),
        (["--map-dtype", "float16"], "map_dtype: float32 before, float16 now"),
    ):
        capsys.readouterr()
        explain("out", *options, status=1)
        (line,) = progress_free(capsys.readouterr().err)
        assert named in line
        assert snapshot(out) == before
    for same in (["--chunk", "2"], ["--memory", "1G"], ["--devices", "1"]):
        explain("out", *same)
        assert results(out) == {k: v for k, v in before.items() if not k.startswith("logs")}


def test_a_changed_input_is_done_again_and_a_touched_one_is_not(
    explain: Explain, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(cohort.parent, tmp_path / "in"))
    source = folder / cohort.name
    out = explain("out", source=source)
    before = results(out)
    os.utime(folder / "sub-01_FLAIR.nii.gz", (1, 1))
    flair = folder / "sub-03_FLAIR.nii.gz"
    image = nib.load(flair)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * np.float32(2), image.affine, image.header), flair)
    capsys.readouterr()
    explain("out", source=source)
    printed = capsys.readouterr().out
    assert "sub-03: FLAIR changed since: done again" in printed
    assert "sub-01: FLAIR" not in printed
    assert "plan: 1 case, 2 lesions; 4 units done before" in printed
    # twice the intensity is the same image once standardised, up to rounding
    assert results(out).keys() == before.keys()


def test_shards_make_together_what_one_run_makes(explain: Explain, cohort: Path) -> None:
    whole = explain("whole", source=cohort)
    out = explain("out", "--shard", "2/2", source=cohort)
    assert [row["case"] for row in table(out / "cases.tsv")] == ["sub-02"]
    explain("out", "--shard", "1/2", source=cohort)
    assert results(out) == results(whole)
    assert set(done(out).values()) == {0, 1}


def test_participants_then_the_group(explain: Explain, cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("01", "sub-02"):
        out = explain("out", "--participant-label", label, source=cohort, level="participant")
    assert not (out / "lesions.tsv").exists()
    capsys.readouterr()
    explain("out", source=cohort, level="group")
    assert "2 cases, 4 of 4 units done, 0 failures" in capsys.readouterr().out
    whole = table(explain("whole", source=cohort) / "lesions.tsv")
    assert table(out / "lesions.tsv") == [row for row in whole if row["case"] != "sub-03"]
    explain("nowhere", source=cohort, level="group", status=1)
    assert "holds no run" in capsys.readouterr().err


def test_a_case_that_another_process_works_on_is_waited_for(
    explain: Explain, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = explain("whole", source=cohort)
    out = explain("out", "--cases", "sub-01", source=cohort)
    # a lock of its own handle excludes as one of another process does
    journal = out / "logs" / "cases" / "sub-02.jsonl"
    handle = os.open(journal, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    order = []
    segmented = stages.segment_scan

    def noted(predictor, spec, scan, case, progress=None):
        order.append(case.name)
        if case.name == "sub-03":
            threading.Timer(0.3, os.close, [handle]).start()
        return segmented(predictor, spec, scan, case, progress)

    monkeypatch.setattr(stages, "segment_scan", noted)
    explain("out", source=cohort)
    assert order == ["sub-03", "sub-02"]
    assert results(out) == results(whole)


def test_a_run_is_not_overwritten_while_somebody_works_on_it(
    explain: Explain, capsys: pytest.CaptureFixture[str]
) -> None:
    out = explain("out")
    handle = os.open(out / "logs" / "locks" / "run", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_SH)
    before = snapshot(out)
    explain("out", "--overwrite", status=1)
    assert "another run is working here" in capsys.readouterr().err
    assert snapshot(out) == before
    os.close(handle)
    explain("out", "--overwrite")


def test_overwriting_takes_the_analysis_and_the_report_with_it(explain: Explain) -> None:
    """They speak of results that are gone; a file that is nobody's stays."""
    out = explain("out")
    old = [out / name for name in ("report.html", "sub-01.html", "report/groups.svg", "analysis/groups.tsv")]
    for path in (*old, out / "notes.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("old")
    explain("out", "--overwrite")
    assert not [path for path in old if path.exists()]
    assert not (out / "report").exists()
    assert (out / "notes.txt").read_text() == "old"


def test_a_repeated_run_computes_nothing(explain: Explain, cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = explain("out", source=cohort)
    before = snapshot(out)

    def never(*_: object) -> None:
        raise AssertionError

    for name in ("segment_scan", "explain_group"):
        monkeypatch.setattr(stages, name, never)
    explain("out", source=cohort)
    after = snapshot(out)
    assert before.keys() == after.keys()
    assert [n for n in before if before[n] != after[n]] == ["logs/run.json"]


def test_a_line_that_was_changed_is_no_line(explain: Explain, capsys: pytest.CaptureFixture[str]) -> None:
    out = explain("out")
    before = results(out)
    (journal,) = (out / "logs" / "cases").iterdir()
    text = journal.read_text()
    peak = table(out / "lesions.tsv")[0]["smoothgrad_FLAIR_peak"][:6]
    assert peak in text
    journal.write_text(text.replace(peak, f"9{peak[1:]}"))
    capsys.readouterr()
    explain("out")
    assert "plan: 1 case, 2 lesions" in capsys.readouterr().out
    assert results(out) == before


def test_the_table_of_a_case_is_made_again(explain: Explain, cohort: Path) -> None:
    out = explain("out", source=cohort)
    before = results(out)
    next((out / "sub-01").rglob("*desc-lesions.tsv")).unlink()
    next((out / "sub-02").rglob("*desc-lesions.tsv")).write_text("garbage")
    (out / ".lesions.tsv.99.tmp").write_text("half")
    explain("out", source=cohort)
    assert results(out) == before


def test_an_input_that_was_away_for_a_while(
    explain: Explain, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(cohort.parent, tmp_path / "in"))
    source = folder / cohort.name
    out = explain("out", source=source)
    before = results(out)
    flair = folder / "sub-02_FLAIR.nii.gz"
    flair.rename(folder / "away")
    explain("out", source=source, status=1)
    assert [row["status"] for row in table(out / "cases.tsv")] == ["done", "failed", "done"]
    (folder / "away").rename(flair)
    explain("out", source=source)
    assert results(out) == before
    # gone between segmentation and explanation: the others go on
    for name in ("sub-01", "sub-02"):
        cut(out / "logs" / "cases" / f"{name}.jsonl", 1)
    flair.rename(folder / "away")
    capsys.readouterr()
    explain("out", source=source, status=1)
    assert "plan: 1 case, 2 lesions" in capsys.readouterr().out
    assert [row["status"] for row in table(out / "cases.tsv")] == ["done", "failed", "done"]


def test_nothing_of_an_input_that_changed_is_left(explain: Explain, cohort: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cohort.parent, tmp_path / "in"))
    source = folder / cohort.name
    out = explain("out", source=source)
    flair = folder / "sub-02_FLAIR.nii.gz"
    image = nib.load(flair)
    data = np.asarray(image.dataobj).copy()
    data[12:] = np.minimum(data[12:], 120)  # without the second lesion
    nib.save(nib.Nifti1Image(data, image.affine, image.header), flair)
    explain("out", source=source)
    assert results(out) == results(explain("whole", source=source))
    data[5, 5, 5] = np.nan
    nib.save(nib.Nifti1Image(data, image.affine, image.header), flair)
    explain("out", source=source, status=1)
    assert not [name for name in results(out) if "sub-02_" in name]


@pytest.mark.parametrize("where", ["describe", "_settle", "_set_aside"])
def test_an_overwriting_that_is_killed_loses_nothing(
    where: str, explain: Explain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = explain("out")
    before = results(out)
    set_aside = RunFolder._set_aside

    class Killed(BaseException):
        pass

    def killed(self: RunFolder, *_: object) -> None:
        if where == "_set_aside":
            set_aside(self)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, where, killed)
        patch.setattr(RunFolder, "discard", RunFolder.release)  # all that the end of a process does
        with pytest.raises(Killed):
            explain("out", "--overwrite")
    assert list(out.glob(".earlier-*"))
    capsys.readouterr()
    explain("out")
    assert "nothing left to do" in capsys.readouterr().out
    assert results(out) == before
    assert not list(out.glob(".earlier-*"))


def test_a_part_that_comes_to_nothing_is_recorded(
    explain: Explain, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(cohort.parent, tmp_path / "in"))
    source = folder / cohort.name
    flair = folder / "sub-01_FLAIR.nii.gz"
    image = nib.load(flair)
    noise = np.random.default_rng(0).normal(100, 6, image.shape).astype(np.float32) * (image.get_fdata() != 0)
    nib.save(nib.Nifti1Image(noise, image.affine, image.header), flair)
    (folder / "sub-02_T1w.nii.gz").write_bytes(b"")
    explain("out", "--shard", "1/3", source=source, level="participant")
    explain("out", "--participant-label", "02", source=source, level="participant", status=1)
    out = explain("out", "--shard", "3/3", source=source, level="participant")
    capsys.readouterr()
    explain("out", source=source, level="group", status=1)
    assert "3 cases, 2 of 2 units done, 1 failures" in capsys.readouterr().out
    assert [row["status"] for row in table(out / "cases.tsv")] == ["empty", "failed", "done"]


def test_a_name_too_long_for_files_fails_alone(explain: Explain, cohort: Path) -> None:
    lines = cohort.read_text().splitlines()
    for number, length in enumerate((151, 300)):
        lines.append(lines[1].replace("sub-01\t", f"sub-{number}{'x' * length}\t"))
    source = cohort.with_name("long.tsv")
    source.write_text("\n".join(lines) + "\n")
    out = explain("out", source=source, status=1)
    rows = table(out / "cases.tsv")
    assert sorted(row["status"] for row in rows) == ["done", "done", "done", "failed", "failed"]
    assert all("expected at most 150: rename the case" in row["message"] for row in rows if row["status"] == "failed")


def test_a_journal_that_the_disk_has_spoilt_costs_its_lines_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "sub-ä 1/..")
    (tmp_path / "file").write_bytes(b"content")
    journal.append({"entry": "segmented", "explain": [1, 2], "row": {}}, [tmp_path / "file"])
    lesion = {"row": {}, "course": None, "files": []}
    for label in (1, 2):
        journal.append({"entry": "explained", "method": "m", "lesions": [{"lesion": label, **lesion}]})
    assert journal.path.parent == tmp_path / "logs" / "cases"
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + b"\x00\xff spoilt\n" + lines[2])
    record = CaseRecord.read(tmp_path, "sub-ä 1/..")
    assert record.missing(["m"]) == [("m", 1)]
