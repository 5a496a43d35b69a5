"""What a run leaves for the reader besides maps: tables, their descriptions, side-car files, the log, lines on the terminal."""

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from xaiseg._version import __version__
from xaiseg.checkpoints import model_hash
from xaiseg.cohort.measures import describe_columns
from xaiseg.cohort.methods import Method, Settings
from xaiseg.cohort.output import OutputFolder
from xaiseg.cohort.work import Print, Request, Work
from xaiseg.models import Model
from xaiseg.report import summary_figure

TARGET_TEXTS = {
    "logit": "logit of the lesion class, blended over the windows of the prediction, before softmax",
    "log_odds": "log-odds of the lesion class, log(p / (1 - p)), from logits blended over the windows of the prediction",
    "probability": "probability of the lesion class, from logits blended over the windows of the prediction",
    "margin": "logit of the lesion class minus the largest other logit, blended over the windows of the prediction",
}
CASE_COLUMNS = {
    "case": "Case",
    "status": "done, empty (nothing to explain) or failed",
    "lesions": "Predicted instances",
    "explained": "Instances explained",
    "volume_mm3": "Predicted lesion volume in mm³",
    "dice": "Dice against the reference mask",
    "ndsc": "Normalised Dice (r = 0.001) over the whole array",
    "TP": "Predicted instances of any size that share at least one voxel with the reference",
    "FP": "Predicted instances of any size that share none",
    "FN": "Reference instances that share no voxel with the prediction",
    "seconds": "Time for the case",
    "message": "What went wrong",
}


def lesion_columns(methods: Sequence[Method]) -> list[str]:
    return list(describe_columns({m.key: m for m in methods}))


def write_lesions(
    output: OutputFolder, works: Sequence[Work], methods: Sequence[Method], model: Model, say: Print
) -> None:
    rows = [row for work in works if work.row["status"] == "done" for row in work.lesion_rows]
    output.table(output.root / "lesions.tsv", lesion_columns(methods), rows)
    output.json(output.root / "lesions.json", describe_columns({m.key: m for m in methods}))
    channels = model.spec.channels
    for method in methods:
        if method.names == channels:
            peaks = [{**row, **{f"peak_{c}": row[f"{method.key}_{c}_peak"] for c in channels}} for row in rows]
            output.figure(
                output.root / f"desc-{method.key}_summary.png",
                lambda path, peaks=peaks, unit=method.unit: summary_figure(peaks, channels, path, unit=unit),
            )
            for line in _group_lines(peaks, channels):
                say(line if len(methods) == 1 else f"{method.name}: {line}")


def _group_lines(rows: Sequence[dict[str, Any]], channels: Sequence[str]) -> Iterator[str]:
    """Median peak saliency by group and channel, for the reader of the terminal."""
    for group in ("TP", "FP", "FN", "unlabelled"):
        members = [row for row in rows if row["group"] == group]
        if members:
            medians = ", ".join(f"{c} {np.median([row[f'peak_{c}'] for row in members]):+.3g}" for c in channels)
            yield f"{group}: {len(members)} lesion{'s' * (len(members) > 1)}, median peak saliency {medians}"


def write_sidecar(output: OutputFolder, method: Method, model: Model, settings: Settings, request: Request) -> None:
    content = {
        "Method": method.title,
        "MethodKey": method.name,
        "Settings": method.settings,
        "Precision": settings.precision,
        "Prediction": "whole volume" if request.whole_volume else "sliding windows",
        "Channels": method.names,
        "Units": method.unit,
        "Target": TARGET_TEXTS[method.settings["target"]],
        "ModelHash": model_hash(model),
        "GeneratedBy": {"Name": "xaiseg", "Version": __version__},
    }
    output.json(output.root / f"desc-{method.key}_saliency.json", content)


def write_log(
    output: OutputFolder,
    request: Request,
    model: Model,
    settings: Settings | None,
    methods: Sequence[Method],
    rows: Sequence[dict[str, Any]],
    started: float,
) -> None:
    columns = [c for c in CASE_COLUMNS if settings is not None or c != "explained"]
    output.table(output.root / "cases.tsv", columns, rows)
    output.json(output.root / "cases.json", {c: {"Description": CASE_COLUMNS[c]} for c in columns})
    device = jax.devices()[0]
    output.close(
        {
            "command": sys.argv,
            "input": str(request.input.absolute()),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
            "seconds": round(time.time() - started, 1),
            "request": {k: v for k, v in asdict(request).items() if k != "input"},
            "settings": asdict(settings) if settings else None,
            "methods": {m.key: m.settings for m in methods},
            "matching": {"rule": "overlap", "min_shared_voxels": 1},
            "model": {**asdict(model.spec), "hash": model_hash(model)},
            "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
            "versions": versions(),
            "cases": rows,
        }
    )


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
