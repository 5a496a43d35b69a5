"""Segment and explain the cases of an input: preflight, segmentation, plan, explanation, tables."""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from xaiseg._types import Instance, SaliencyMap
from xaiseg._version import __version__
from xaiseg.checkpoints import model_hash
from xaiseg.cohort.explaining import Method, Settings, build_methods, case_key, explain_scan, seconds_per_row
from xaiseg.cohort.measures import describe_columns, lesion_row, map_row
from xaiseg.cohort.output import OutputFolder
from xaiseg.cohort.segmentation import Segmentation, Target, chosen_instances, segment_scan, target_of
from xaiseg.errors import InputError
from xaiseg.imaging import Case, Scan, check_header, load_scan, preflight, read_input, select_cases
from xaiseg.inference import StitchedPredictor
from xaiseg.models import Model
from xaiseg.report import lesion_figure, summary_figure

CASE_COLUMNS = {
    "case": "Case",
    "status": "done, empty (nothing to explain) or failed",
    "lesions": "Predicted instances",
    "explained": "Instances explained",
    "volume_mm3": "Predicted lesion volume in mm³",
    "dice": "Dice against the reference mask",
    "ndsc": "Normalised Dice (r = 0.001) over the whole array",
    "TP": "Predicted instances that share at least one voxel with the reference",
    "FP": "Predicted instances that share none",
    "FN": "Reference instances that share no voxel with the prediction",
    "seconds": "Time for the case",
    "message": "What went wrong",
}
_MARGIN_MM = 20.0
_MAPS_FRACTION = 0.25

Print = Callable[[str], Any]


@dataclass(frozen=True)
class Request:
    """What to run on: `input` is a BIDS folder or a manifest; `cases` selects by name; see `Settings` for the rest."""

    input: Path
    output: Path
    cases: tuple[str, ...] = ()
    instances: str = "predicted"
    lesions: tuple[int, ...] | None = None
    min_voxels: int = 6
    resample: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass
class _Work:
    """One case between segmentation and explanation: only what is small is kept."""

    case: Case
    row: dict[str, Any]
    instances: list[Instance] = field(default_factory=list)
    lesion_rows: list[dict[str, Any]] = field(default_factory=list)
    volume_shape: tuple[int, ...] = ()
    present: int = 0


def segment(model: Model, request: Request, say: Print = print) -> list[dict[str, Any]]:
    """Segment the cases, write masks, probabilities and label maps; returns the rows of `cases.tsv`.

    Raises InputError for input that cannot be used, before any compute where headers show it. A case that fails later is
    recorded and the others go on; if every case fails, nothing is left behind and the first error is raised.
    """
    started = time.time()
    cases, output = _prepare(model, request)
    predictor = StitchedPredictor.of(model)
    with _discarding(output):
        output.begin()
        works = _segment_all(model, predictor, cases, request, output, "predicted")
        rows = [work.row for work in works]
        _finish(output, request, model, None, [], rows, started)
    for row in rows:
        say(_case_line(row))
    return rows


def explain(model: Model, request: Request, settings: Settings, say: Print = print) -> list[dict[str, Any]]:
    """Segment, then explain every instance; writes maps, pictures and tables and returns the rows of `cases.tsv`.

    Raises InputError as `segment`, and where there is no instance to explain at all.
    """
    started = time.time()
    try:
        methods = build_methods(model, settings)
    except ValueError as error:
        raise InputError(str(error)) from error
    cases, output = _prepare(model, request)
    predictor = StitchedPredictor.of(model)
    with _discarding(output):
        if not request.dry_run:
            output.begin()
        written = None if request.dry_run else output
        works = _segment_all(model, predictor, cases, request, written, request.instances)
        if not any(work.instances for work in works):
            raise InputError(_nothing(works, request, model))
        units = _say_plan(works, methods, predictor, model, request, say)
        if request.dry_run:
            return [work.row for work in works]
        with _bar(units, "row", "explaining") as bar:
            for work in works:
                if work.instances:
                    with _recording(work, output, alone=len(works) == 1):
                        _explain_case(work, methods, predictor, model, settings, request, output, bar)
        _raise_if_all_failed(works)
        _write_lesions(output, works, methods, model, say)
        for method in methods:
            _write_sidecar(output, method, model)
        rows = [work.row for work in works]
        _finish(output, request, model, settings, methods, rows, started)
    for row in rows:
        say(_case_line(row))
    return rows


def _prepare(model: Model, request: Request) -> tuple[list[Case], OutputFolder]:
    channels = model.spec.channels
    cases = read_input(request.input, channels)
    if request.cases:
        cases = select_cases(cases, request.cases)
    if request.instances == "reference" and (lacking := [c.name for c in cases if c.reference is None]):
        raise InputError(
            f"{lacking[0]}: has no reference mask, which --instances reference needs; add it, or select others by --cases"
        )
    if request.instances == "given" and (lacking := [c.name for c in cases if c.instances is None]):
        raise InputError(
            f"{lacking[0]}: has no label map, which --instances given needs; add a column 'instances' to the manifest"
        )
    preflight(cases, channels, request.resample)
    return cases, OutputFolder(request.output, request.overwrite)


def _segment_all(
    model: Model,
    predictor: StitchedPredictor,
    cases: Sequence[Case],
    request: Request,
    output: OutputFolder | None,
    source: str,
) -> list[_Work]:
    works = [_Work(case, {"case": case.name, "status": "done"}) for case in cases]
    with _bar(_window_count(predictor, cases), "window", "segmenting") as bar:
        for work in works:
            case, begun = work.case, time.perf_counter()
            with _recording(work, output, alone=len(works) == 1):
                scan = load_scan(case, model.spec.channels, model.spec.orientation, request.resample)
                segmentation = segment_scan(predictor, model.spec, scan, case, lambda: bar.update(1))
                target = target_of(source, segmentation, scan, case)
                _describe(work, scan, segmentation, target, request)
                if output is not None:
                    _write_segmentation(output, case, scan, segmentation, target)
            work.row["seconds"] = time.perf_counter() - begun
    _raise_if_all_failed(works)
    return works


def _describe(work: _Work, scan: Scan, segmentation: Segmentation, target: Target, request: Request) -> None:
    counted = int(segmentation.labels.max())
    work.row |= {
        "lesions": counted,
        "volume_mm3": int((segmentation.labels > 0).sum()) * scan.grid.voxel_volume,
        **segmentation.agreement(),
    }
    wanted = list(request.lesions) if request.lesions is not None else None
    work.instances = chosen_instances(target, work.case.name, request.min_voxels, wanted)
    work.lesion_rows = [lesion_row(work.case, scan.grid, segmentation, target, i) for i in work.instances]
    work.volume_shape = scan.image.shape
    work.present = len(target.groups)
    if not work.instances:
        work.row["status"] = "empty"
    if not segmentation.labels.any():
        work.row["message"] = "no voxel above the threshold"


def _write_segmentation(
    output: OutputFolder, case: Case, scan: Scan, segmentation: Segmentation, target: Target
) -> None:
    output.volume(output.path(case, "space-orig_label-L_probseg.nii.gz"), scan, segmentation.probability)
    output.volume(output.path(case, "space-orig_label-L_mask.nii.gz"), scan, (segmentation.labels > 0).astype(np.uint8))
    labels = target.labels.astype(np.int16 if target.labels.max() < 2**15 else np.int32)
    output.volume(output.path(case, "space-orig_desc-instances_dseg.nii.gz"), scan, labels)


def _explain_case(
    work: _Work,
    methods: Sequence[Method],
    predictor: StitchedPredictor,
    model: Model,
    settings: Settings,
    request: Request,
    output: OutputFolder,
    bar: tqdm,
) -> None:
    begun = time.perf_counter()
    case = work.case
    scan = load_scan(case, model.spec.channels, model.spec.orientation, request.resample)
    key = case_key(settings.seed, case.name)
    by_label = {row["lesion"]: row for row in work.lesion_rows}
    memory = settings.memory or int(_physical_memory() * _MAPS_FRACTION)
    for method in methods:
        explained = explain_scan(key, method, predictor, scan.image, work.instances, memory, bar.update)
        for instance, saliency, info, seconds in explained:
            row = by_label[instance.label]
            row |= map_row(method.key, method.names, saliency, info, instance, scan.image.shape)
            row[f"{method.key}_seconds"] = seconds
            stem = f"space-orig_desc-{method.key}_lesion-{instance.label:03d}_saliency"
            trimmed = trim(saliency)
            output.volume(output.path(case, f"{stem}.nii.gz"), scan, trimmed.values, trimmed.start)
            draw = partial(_draw, scan=scan, instance=instance, saliency=saliency, method=method, row=row)
            output.figure(output.path(case, f"{stem}.png"), draw)
    output.table(output.path(case, "desc-lesions.tsv"), _columns(methods), work.lesion_rows)
    work.row["explained"] = len(work.instances)
    work.row["seconds"] += time.perf_counter() - begun


def trim(saliency: SaliencyMap) -> SaliencyMap:
    """The smallest crop that holds every non-zero value; the first voxel of the map where there is none."""
    places = np.argwhere(saliency.values.any(-1))
    low, high = (places.min(0), places.max(0) + 1) if len(places) else (np.zeros(3, int), np.ones(3, int))
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    x, y, z = (low + np.array(saliency.start)).tolist()
    return SaliencyMap(saliency.values[box], (x, y, z))


def _draw(
    path: Path, *, scan: Scan, instance: Instance, saliency: SaliencyMap, method: Method, row: dict[str, Any]
) -> None:
    shape = scan.image.shape[:3]
    mask = np.zeros(shape, bool)
    mask[tuple(instance.voxels.T)] = True
    whole = np.zeros((*shape, saliency.values.shape[-1]), np.float32)
    whole[tuple(slice(s, s + n) for s, n in zip(saliency.start, saliency.values.shape, strict=False))] = saliency.values
    names = method.names if method.signed else ("Grad-CAM++",)
    peaks = ", ".join(
        f"{name} {saliency.values[..., c].max():{'+.3g' if method.signed else '.3g'}}" for c, name in enumerate(names)
    )
    lesion_figure(
        scan.image,
        method.model.spec.channels,
        mask,
        whole,
        scan.grid.affine,
        title=f"{row['case']} · lesion {instance.label} · {row['group']}",
        subtitle=f"{row['volume_mm3']:.0f} mm³ · {method.title} · peak {peaks}",
        unit=method.unit,
        signed=method.signed,
        saliency_names=names,
        margin_mm=_MARGIN_MM,
        path=path,
    )


def _say_plan(
    works: Sequence[_Work],
    methods: Sequence[Method],
    predictor: StitchedPredictor,
    model: Model,
    request: Request,
    say: Print,
) -> int:
    """Print what is about to be done and what it will take; returns the units of the progress bar."""
    busy = [work for work in works if work.instances]
    smallest = min(busy, key=lambda work: work.volume_shape)
    scan = load_scan(smallest.case, model.spec.channels, model.spec.orientation, request.resample)
    lesions = sum(len(work.instances) for work in busy)
    left_out = sum(work.present for work in works) - lesions
    units, seconds = 0, 0.0
    lines = []
    for method in methods:
        rows = windows = 0
        for work in busy:
            for instance in work.instances:
                r, w = method.work(predictor.plan(work.volume_shape), instance)
                rows, windows = rows + r, windows + w
        each = seconds_per_row(method, predictor, scan.image, smallest.instances[0])
        units += rows * method.samples
        seconds += rows * method.samples * each
        lines.append(
            f"  {method.title}: {rows:,} rows × {method.samples} through {windows:,} windows, {each * 1e3:.0f} ms a row measured"
        )
    smaller = f" ({left_out} left out: below --min-voxels {request.min_voxels} or not selected)" if left_out else ""
    say(f"plan: {len(busy)} case{'s' * (len(busy) > 1)}, {lesions} lesion{'s' * (lesions > 1)}{smaller}")
    for line in lines:
        say(line)
    say(f"  estimated time {_duration(seconds)} on {jax.devices()[0].device_kind}")
    return units


def _columns(methods: Sequence[Method]) -> list[str]:
    return list(describe_columns({m.key: (m.names, m.unit) for m in methods}))


def _write_lesions(
    output: OutputFolder, works: Sequence[_Work], methods: Sequence[Method], model: Model, say: Print
) -> None:
    rows = [row for work in works if work.row["status"] == "done" for row in work.lesion_rows]
    output.table(output.root / "lesions.tsv", _columns(methods), rows)
    output.json(output.root / "lesions.json", describe_columns({m.key: (m.names, m.unit) for m in methods}))
    channels = model.spec.channels
    for method in methods:
        if method.names == channels:
            peaks = [{**row, **{f"peak_{c}": row[f"{method.key}_{c}_peak"] for c in channels}} for row in rows]
            output.figure(
                output.root / f"desc-{method.key}_summary.png",
                lambda path, peaks=peaks, unit=method.unit: summary_figure(peaks, channels, path, unit=unit),
            )
            for line in _group_lines(peaks, channels):
                say(line)


def _group_lines(rows: Sequence[dict[str, Any]], channels: Sequence[str]) -> Iterator[str]:
    """Median peak saliency by group and channel, for the reader of the terminal."""
    for group in ("TP", "FP", "FN", "unlabelled"):
        members = [row for row in rows if row["group"] == group]
        if members:
            medians = ", ".join(f"{c} {np.median([row[f'peak_{c}'] for row in members]):+.3g}" for c in channels)
            yield f"{group}: {len(members)} lesion{'s' * (len(members) > 1)}, median peak saliency {medians}"


def _write_sidecar(output: OutputFolder, method: Method, model: Model) -> None:
    content = {
        "Method": method.title,
        "MethodKey": method.name,
        "Settings": method.settings,
        "Channels": method.names,
        "Units": method.unit,
        "Target": "logit of the lesion class, blended over the sliding windows, before softmax",
        "ModelHash": model_hash(model),
        "GeneratedBy": {"Name": "xaiseg", "Version": __version__},
    }
    output.json(output.root / f"desc-{method.key}_saliency.json", content)


def _finish(
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


def _nothing(works: Sequence[_Work], request: Request, model: Model) -> str:
    where = works[0].case.name if len(works) == 1 else f"{len(works)} cases"
    present = sum(work.present for work in works)
    if present:
        return (
            f"{where}: none of the {present} instances has {request.min_voxels} voxels or more, so there is nothing to explain; "
            "lower --min-voxels"
        )
    if request.instances != "predicted":
        return f"{where}: the {request.instances} label map is empty, so there is nothing to explain"
    return (
        f"{where}: the segmentation is empty at threshold {model.spec.threshold}, so there is nothing to explain; "
        "lower --threshold, or check that the channels and their intensities are those the model was trained on"
    )


@contextmanager
def _recording(work: _Work, output: OutputFolder | None, alone: bool) -> Iterator[None]:
    """A case that fails is recorded, its files are removed, and the others go on."""
    try:
        yield
    except InputError as error:
        work.row |= {"status": "failed", "message": str(error)}
        work.instances = []
        if output is not None:
            output.discard_case(work.case)
        if not alone:
            tqdm.write(f"{work.case.name}: failed: {error}", file=sys.stderr)


def _raise_if_all_failed(works: Sequence[_Work]) -> None:
    if all(work.row["status"] == "failed" for work in works):
        raise InputError(works[0].row["message"])


@contextmanager
def _discarding(output: OutputFolder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        output.discard()
        raise


def _bar(total: int, unit: str, what: str) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, unit=unit, desc=what, file=sys.stderr, mininterval=interval, dynamic_ncols=True)


def _window_count(predictor: StitchedPredictor, cases: Sequence[Case]) -> int:
    return sum(len(predictor.plan(check_header(next(iter(case.images.values()))).shape).starts) for case in cases)


def _case_line(row: dict[str, Any]) -> str:
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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
