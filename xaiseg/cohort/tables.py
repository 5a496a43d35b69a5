"""What a run leaves for the reader besides maps: tables, their descriptions, side-car files, the log; all from the journals."""

import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from xaiseg._types import Course, Info
from xaiseg._version import __version__
from xaiseg.checkpoints import model_hash
from xaiseg.cohort.journal import CaseRecord, journalled
from xaiseg.cohort.measures import describe_columns
from xaiseg.cohort.methods import Method
from xaiseg.cohort.session import Session
from xaiseg.cohort.work import Execution, Print, Request
from xaiseg.imaging import Case
from xaiseg.report import convergence_figure, summary_figure

TARGET_TEXTS = {
    "logit": "logit of the lesion class, blended over the windows of the prediction, before softmax",
    "log_odds": "log-odds of the lesion class, log(p / (1 - p)), from logits blended over the windows of the prediction",
    "probability": "probability of the lesion class, from logits blended over the windows of the prediction",
    "margin": "logit of the lesion class minus the largest other logit, blended over the windows of the prediction",
}
CASE_COLUMNS = {
    "case": "Case",
    "patient": "Whose examination it is: the manifest's, else the subject",
    "status": "done, empty (nothing to explain), partial (some lesions failed), failed, or left (not finished yet)",
    "lesions": "Predicted instances",
    "explained": "Instances explained by every method",
    "volume_mm3": "Predicted lesion volume in mm³",
    "dice": "Dice against the reference mask",
    "ndsc": "Normalised Dice (r = 0.001) over the whole array",
    "TP": "Predicted instances of any size that share at least one voxel with the reference",
    "FP": "Predicted instances of any size that share none",
    "FN": "Reference instances that share no voxel with the prediction",
    "message": "What went wrong, or looks wrong",
}
FAILURE_COLUMNS = ("case", "unit", "lesion", "message")
TIMING_COLUMNS = ("case", "unit", "lesions", "passes", "seconds", "at", "worker")
FAILURES, TIMINGS, LOG = Path("logs/failures.tsv"), Path("logs/timings.tsv"), Path("logs/run.json")
# Channels that one panel of the convergence picture can tell apart.
_MOST_LINES = 4


class Counts(NamedTuple):
    """Of the cases of a run, by status, and of their lesions."""

    cases: dict[str, int]
    units: int
    done: int
    failures: int


def case_row(record: CaseRecord, methods: Sequence[str] | None) -> dict[str, Any]:
    """The row of `cases.tsv`; `methods` are None for a segmentation alone."""
    row: dict[str, Any] = {"case": record.name}
    failed = [f for (unit, lesion), f in record.failures.items() if lesion is None]
    lesions = [f for (unit, lesion), f in record.failures.items() if lesion is not None]
    if record.segmented is None or failed:
        row |= {"status": "failed" if failed else "left"}
    if record.segmented is not None:
        row |= {"patient": record.segmented.get("patient"), **record.segmented["row"]}
        if methods is not None:
            labels = record.lesions()
            row["explained"] = sum(all((m, label) in record.explained for m in methods) for label in labels)
            left = len(record.missing(methods))
            status = "empty" if not labels else "done" if not left else "left" if left > len(lesions) else "partial"
            if status == "partial" and not row["explained"]:
                status = "failed"
            row.setdefault("status", status)
        row.setdefault("status", "done")
    texts = [f["message"] for f in failed] + [f"{f['unit']}, lesion {f['lesion']}: {f['message']}" for f in lesions]
    if texts:
        row["message"] = "; ".join(filter(None, [row.get("message"), *texts]))
    return row


def lesion_rows(record: CaseRecord, methods: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the lesion table of one case: of all lesions that are explained by some method."""
    if record.segmented is None:
        return []
    rows = []
    for row in record.segmented["rows"]:
        found = [record.explained[m, row["lesion"]]["row"] for m in methods if (m, row["lesion"]) in record.explained]
        if found:
            rows.append({k: v for part in (row, *found) for k, v in part.items()})
    return rows


def finish_case(session: Session, case: Case) -> None:
    """The table of a case's lesions, and how their peaks settled; made anew when a unit came after the last time."""
    folder = session.folder
    record = CaseRecord.read(folder.root, case.name)
    if record.finished or not record.explained:
        return
    folder.clean(case)
    files = [folder.path(case, "desc-lesions.tsv")]
    folder.table(files[0], lesion_columns(session.methods), lesion_rows(record, session.keys))
    assert session.settings is not None
    tolerance = session.settings.tolerance or 0.05
    for method in session.methods:
        found = {label: entry for (key, label), entry in sorted(record.explained.items()) if key == method.key}
        infos = [_info(method.key, entry) for entry in found.values()]
        if session.request.pictures and len(method.names) <= _MOST_LINES and any(i.course for i in infos):
            files.append(folder.path(case, f"desc-{method.key}_convergence.png"))
            labels = [f"lesion {label}" for label in found]
            folder.figure(files[-1], partial(_draw_course, infos, labels, method, tolerance))
    folder.journal(case.name).append({"entry": "finished"}, files)


def _draw_course(infos: Sequence[Info], labels: Sequence[str], method: Method, tolerance: float, path: Path) -> None:
    convergence_figure(infos, labels, method.names, path, unit=method.unit, tolerance=tolerance)


def _info(method: str, entry: dict[str, Any]) -> Info:
    row, course = entry["row"], entry["course"]
    settled = None if course is None else Course(*(_numbers(course[name]) for name in Course._fields))
    return Info(row[f"{method}_rows"], row[f"{method}_windows"], row[f"{method}_samples"], course=settled)


def _numbers(table: Sequence[Sequence[float | None]]) -> tuple[tuple[float, ...], ...]:
    """JSON has no NaN."""
    return tuple(tuple(math.nan if value is None else value for value in row) for row in table)


def lesion_columns(methods: Sequence[Method]) -> list[str]:
    return list(describe_columns({m.key: m for m in methods}))


def write_tables(session: Session, execution: Execution, started: float, say: Print) -> Counts:
    """Every table of the cohort, from all journals that are there."""
    folder = session.folder
    explaining = session.settings is not None
    keys = session.keys if explaining else None
    with folder.exclusively("tables"):
        for left in folder.root.glob(".*.tmp"):  # who wrote it would be in here
            left.unlink(missing_ok=True)
        rows: list[dict[str, Any]] = []
        failures: list[dict[str, Any]] = []
        timings: list[dict[str, Any]] = []
        peaks: dict[str, list[dict[str, Any]]] = {
            m.key: [] for m in session.methods if m.names == session.model.spec.channels
        }
        units = done = 0

        def lesions() -> Iterator[dict[str, Any]]:
            """Case by case, so that only what tables need of a cohort is held."""
            nonlocal units, done
            for name in sorted({*journalled(folder.root), *folder.planned()}):
                record = CaseRecord.read(folder.root, name)
                rows.append(case_row(record, keys))
                failures.extend({"case": name, **failure} for failure in record.failures.values())
                timings.extend({"case": name, **timing, "at": _when(timing["at"])} for timing in record.timings)
                units, done = units + len(record.lesions()) * len(session.keys), done + len(record.explained)
                for row in lesion_rows(record, session.keys):
                    for key, found in peaks.items():
                        columns = {f"peak_{c}": row.get(f"{key}_{c}_peak") for c in session.model.spec.channels}
                        if None not in columns.values():
                            found.append({name: row[name] for name in ("case", "group", "voxels")} | columns)
                    yield row

        described = describe_columns({m.key: m for m in session.methods})
        if explaining:
            folder.table(folder.root / "lesions.tsv", list(described), lesions())
            folder.json(folder.root / "lesions.json", described)
        else:
            assert not list(lesions())
        columns = [c for c in CASE_COLUMNS if explaining or c != "explained"]
        folder.table(folder.root / "cases.tsv", columns, rows)
        folder.json(folder.root / "cases.json", {c: {"Description": CASE_COLUMNS[c]} for c in columns})
        folder.table(folder.root / FAILURES, FAILURE_COLUMNS, failures)
        folder.table(folder.root / TIMINGS, TIMING_COLUMNS, timings)
        for method in session.methods:
            folder.json(folder.root / f"desc-{method.key}_saliency.json", _sidecar(session, method))
            if found := peaks.get(method.key):
                _summarise(session, method, found, say)
        _write_log(session, execution, rows, started)
    statuses = [row["status"] for row in rows]
    return Counts({s: statuses.count(s) for s in dict.fromkeys(statuses)}, units, done, len(failures))


def _summarise(session: Session, method: Method, peaks: Sequence[dict[str, Any]], say: Print) -> None:
    channels, folder = session.model.spec.channels, session.folder
    folder.figure(
        folder.root / f"desc-{method.key}_summary.png",
        lambda path: summary_figure(peaks, channels, path, unit=method.unit),
    )
    for line in _group_lines(peaks, channels):
        say(line if len(session.methods) == 1 else f"{method.name}: {line}")


def _group_lines(rows: Sequence[dict[str, Any]], channels: Sequence[str]) -> Iterator[str]:
    """Median peak saliency by group and channel, for the reader of the terminal."""
    for group in ("TP", "FP", "FN", "unlabelled"):
        members = [row for row in rows if row["group"] == group]
        if members:
            medians = ", ".join(f"{c} {np.median([row[f'peak_{c}'] for row in members]):+.3g}" for c in channels)
            yield f"{group}: {len(members)} lesion{'s' * (len(members) > 1)}, median peak saliency {medians}"


def _sidecar(session: Session, method: Method) -> dict[str, Any]:
    request, settings = session.request, session.settings
    assert settings is not None
    return {
        "Method": method.title,
        "MethodKey": method.name,
        "Settings": method.settings,
        "Precision": settings.precision,
        "Prediction": "whole volume" if request.whole_volume else "sliding windows",
        "Channels": method.names,
        "Units": method.unit,
        "Target": TARGET_TEXTS[method.settings["target"]],
        "StoredAs": _stored(request),
        "ModelHash": model_hash(session.model),
        "GeneratedBy": {"Name": "xaiseg", "Version": __version__},
    }


def _stored(request: Request) -> str:
    where = {"crop": "cropped to its non-zero values", "full": "on the whole grid", "none": "not stored"}
    bits = ", float32 rounded to the 11 significant bits of float16" if request.map_dtype == "float16" else ", float32"
    return where[request.save_maps] + (bits if request.save_maps != "none" else "")


def _write_log(session: Session, execution: Execution, rows: Sequence[dict[str, Any]], started: float) -> None:
    folder, request, settings = session.folder, session.request, session.settings
    device = jax.devices()[0]
    folder.json(folder.root / LOG, {})  # so that it is among the files
    log = {
        "command": sys.argv,
        "input": str(request.input.absolute()),
        "started": _when(started),
        "seconds": round(time.time() - started, 1),
        "request": {k: v for k, v in asdict(request).items() if k != "input"},
        "execution": asdict(execution),
        "settings": asdict(settings) if settings else None,
        "methods": {m.key: m.settings for m in session.methods},
        "matching": {"rule": "overlap", "min_shared_voxels": 1},
        "model": {**asdict(session.model.spec), "hash": model_hash(session.model)},
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "versions": versions(),
        "cases": rows,
        "files": [str(file.relative_to(folder.root)) for file in folder.files()],
    }
    folder.json(folder.root / LOG, log)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    packages = ("jax", "jaxlib", "flax", "numpy", "scipy", "nibabel", "matplotlib")
    return {"xaiseg": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}


def case_line(row: dict[str, Any]) -> str:
    parts = [f"{row['case']}: {row['status']}"]
    if "lesions" in row:
        parts.append(f"{row['lesions']} lesions")
    if "explained" in row:
        parts.append(f"{row['explained']} explained")
    if "dice" in row:
        parts.append(f"Dice {row['dice']:.3f}, nDSC {row['ndsc']:.3f}, TP {row['TP']}, FP {row['FP']}, FN {row['FN']}")
    if row.get("message"):
        parts.append(row["message"])
    return ", ".join(parts)
