"""A run that is repeated, shared or changed: what is trusted of before, what is done again, what is refused."""

import fcntl
import json
import os
import threading
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import Explain, progress_free, snapshot, table

from xaiseg.cohort import stages
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
    folder = tmp_path / "in"
    folder.mkdir()
    for file in cohort.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
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
