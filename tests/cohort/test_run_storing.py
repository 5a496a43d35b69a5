"""What is kept of maps, how far a run is, and the same from Python."""

import json
import os
import socket
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import SHAPE, Explain, onto, table

import xaiseg
from xaiseg.cli import main
from xaiseg.cohort import Request, Settings, run
from xaiseg.cohort.job import Result
from xaiseg.cohort.journal import decode, encode
from xaiseg.cohort.stages import rounded
from xaiseg.cohort.status import status
from xaiseg.errors import InputError


def maps(out: Path) -> list[Path]:
    return sorted(out.rglob("*_saliency.nii.gz"))


def test_maps_cropped_whole_or_not_at_all(explain: Explain, capsys: pytest.CaptureFixture[str]) -> None:
    crop = explain("crop", "--no-pictures")
    assert "maps: crop, float32, no pictures" in capsys.readouterr().out
    full, none = explain("full", "--save-maps", "full"), explain("none", "--save-maps", "none")
    assert "no maps, with pictures" in capsys.readouterr().out
    assert not maps(none)
    assert not [p for p in crop.rglob("*.png") if "summary" not in p.name]
    for small, large in zip(maps(crop), maps(full), strict=True):
        a, b = nib.load(small), nib.load(large)
        assert b.shape[:3] == SHAPE
        np.testing.assert_array_equal(onto(a, b.affine), np.asarray(b.dataobj))
    rows = [table(out / "lesions.tsv") for out in (crop, full, none)]
    assert rows[0] == rows[1] == rows[2]
    assert json.loads((none / "desc-smoothgrad_saliency.json").read_text())["StoredAs"] == "not stored"


def test_maps_with_the_bits_of_a_float16(explain: Explain) -> None:
    long, short = explain("long"), explain("short", "--map-dtype", "float16")
    for a, b in zip(maps(long), maps(short), strict=True):
        exact, kept = (np.asarray(nib.load(file).dataobj) for file in (a, b))
        np.testing.assert_allclose(kept, exact, rtol=2**-11, atol=0)  # half of the last of 11 bits
        assert (kept != exact).any()
        assert b.stat().st_size < 0.75 * a.stat().st_size
    assert table(long / "lesions.tsv") == table(short / "lesions.tsv")


def test_rounding_is_that_of_float16_where_that_has_the_range() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=10_000) * 10.0 ** rng.integers(-4, 4, 10_000)).astype(np.float32)
    normal = np.abs(values) > 2.0**-14  # the smallest normal float16
    np.testing.assert_array_equal(rounded(values[normal]), values[normal].astype(np.float16).astype(np.float32))
    halves = np.float32(1) + np.float32(2.0**-11) * np.arange(1, 8, 2, dtype=np.float32)
    np.testing.assert_array_equal(rounded(halves), halves.astype(np.float16).astype(np.float32))
    tiny = np.float32(1e-30)
    assert abs(rounded(tiny)[()] / tiny - 1) < 2**-11


def test_how_far_a_run_is(explain: Explain, cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = explain("out", "--shard", "1/2", source=cohort)  # sub-01 and sub-03
    found = status(out)
    assert found["cases"] == {"total": 2, "done": 2}
    assert found["units"] == {"total": 4, "done": 4, "failed": 0}
    rows = sum(int(row["smoothgrad_rows"]) * 2 for row in table(out / "lesions.tsv"))
    assert found["passes"] == {"total": rows, "done": rows}
    assert found["running"] == found["failures"] == []
    assert found["rate"] > 0
    assert found["seconds_left"] is None

    journal = out / "logs" / "cases" / "sub-03.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:1]))
    state = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time(), "stopping": False}
    running = out / "logs" / "running"
    running.mkdir()
    (running / "a.json").write_text(json.dumps(state))
    (running / "b.json").write_text(json.dumps(state | {"pid": 2**22 + 1}))  # beyond what Linux gives
    (running / "c.json").write_text(json.dumps(state | {"host": "elsewhere", "at": time.time() - 1000}))
    (running / "d.json").write_text(json.dumps({"host": socket.gethostname()}))
    found = status(out)
    assert found["cases"] == {"total": 2, "done": 1, "left": 1}
    assert found["segmented"] == 2
    assert (found["units"]["done"], found["units"]["total"]) == (2, 4)
    assert [process["pid"] for process in found["running"]] == [os.getpid()]
    capsys.readouterr()
    assert main(["status", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "cases: 2 (1 done, 1 left)" in printed
    assert "lesions × methods: 2 of 4 done" in printed
    assert f"running: {socket.gethostname()}, process {os.getpid()}" in printed
    assert main(["status", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["units"] == found["units"]
    (running / "a.json").unlink()
    assert main(["status", str(out)]) == 0
    assert "nobody is at work" in capsys.readouterr().out


def test_the_time_left_comes_from_what_was_done(explain: Explain, cohort: Path) -> None:
    out = explain("out", source=cohort)
    stamps = {"sub-01": 100.0, "sub-02": 110.0, "sub-03": None}
    passes = {}
    for case, at in stamps.items():
        journal = out / "logs" / "cases" / f"{case}.jsonl"
        entries = [decode(line) for line in journal.read_bytes().splitlines(keepends=True)]
        kept = entries[:1] if at is None else [entries[0], *(e | {"at": at} for e in entries[1:])]
        passes[case] = next(e["passes"] for e in entries if e["entry"] == "explained")
        journal.write_bytes(b"".join(map(encode, kept)))
    (out / "logs" / "running").mkdir()
    state = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time(), "stopping": False}
    (out / "logs" / "running" / "a.json").write_text(json.dumps(state))
    found = status(out)
    assert found["rate"] == pytest.approx(passes["sub-02"] / 10)
    assert found["seconds_left"] == pytest.approx(passes["sub-03"] / found["rate"])


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the output folder of a run"):
        status(tmp_path)


def test_results_as_they_come(explain: Explain, native_model: Path, cohort: Path, tmp_path: Path) -> None:
    settings = Settings(samples=2, chunk=4)
    request = Request(cohort, tmp_path / "api", pictures=False)
    results = list(run(native_model, request, settings, say=lambda _: None))
    assert [r.case for r in results if r.status == "segmented"] == ["sub-01", "sub-02", "sub-03"]
    explained = [r for r in results if r.status == "explained"]
    assert [(r.case, r.method, r.lesion) for r in explained] == [
        (f"sub-0{n}", "smoothgrad", label) for n in (1, 2, 3) for label in (1, 2)
    ]
    rows = table(explain("out", source=cohort) / "lesions.tsv")
    for result, row in zip(explained, rows, strict=True):
        assert f"{result.row['smoothgrad_FLAIR_peak']:.7g}" == row["smoothgrad_FLAIR_peak"]

    first = next(run(native_model, Request(cohort, tmp_path / "left", pictures=False), settings, say=lambda _: None))
    assert isinstance(first, Result)  # left after one: what was done is kept, and the folder is free again
    again = list(run(native_model, Request(cohort, tmp_path / "left", pictures=False), settings, say=lambda _: None))
    assert (tmp_path / "left" / "lesions.tsv").read_bytes() == (tmp_path / "api" / "lesions.tsv").read_bytes()
    assert len(again) < len(results)


def test_tables_for_pandas(explain: Explain, cohort: Path) -> None:
    pytest.importorskip("pandas", reason="pandas is an optional extra")
    out = explain("out", source=cohort)
    found = xaiseg.tables(out)
    assert list(found.lesions["case"]) == [row["case"] for row in table(out / "lesions.tsv")]
    assert found.lesions["smoothgrad_FLAIR_peak"].dtype == np.float64
    assert found.lesions["session"].isna().all()
    assert list(found.cases["status"]) == ["done"] * 3
    assert list(found.timings["unit"]) == ["segmentation", "smoothgrad"] * 3
    assert len(found.failures) == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--shard", "3/2"], "--shard"),
        (["--shard", "0/2"], "--shard"),
        (["--job-option", "cores"], "--job-option"),
        (["--executor", "magic"], "--executor"),
    ],
)
def test_usage(options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["explain", "in", "out", "--model", "m", *options])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_options_of_workers_without_workers(explain: Explain, capsys: pytest.CaptureFixture[str]) -> None:
    explain("out", "--workers", "2", status=1)
    assert "are for --executor dask or slurm" in capsys.readouterr().err
    explain("out", "--shard", "2/2", status=1)
    assert "--shard 2/2: no case in this part" in capsys.readouterr().err
