"""Segment and explain the cases of an input: preflight, segmentation, plan, explanation, tables."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xaiseg._types import Info, Instance, SaliencyMap
from xaiseg.cohort.explaining import case_key, explain_scan
from xaiseg.cohort.measures import lesion_row, map_row
from xaiseg.cohort.methods import Method, Settings, build_methods, build_predictor
from xaiseg.cohort.output import OutputFolder
from xaiseg.cohort.plan import nothing_to_explain, say_plan, window_count
from xaiseg.cohort.records import case_line, lesion_columns, write_lesions, write_log, write_sidecar
from xaiseg.cohort.segmentation import Segmentation, Target, chosen_instances, on_image, segment_scan, target_of
from xaiseg.cohort.work import Print, Request, Work, load_scan
from xaiseg.errors import InputError
from xaiseg.imaging import Case, Scan, preflight, read_input, select_cases
from xaiseg.inference import StitchedPredictor
from xaiseg.models import Model
from xaiseg.report import convergence_figure, lesion_figure

_MARGIN_MM = 20.0
_MAPS_FRACTION = 0.25
# Channels that one panel of the convergence picture can tell apart.
_MOST_LINES = 4


def segment(model: Model, request: Request, say: Print = print) -> list[dict[str, Any]]:
    """Segment the cases, write masks, probabilities and label maps; returns the rows of `cases.tsv`.

    Raises InputError for input that cannot be used, before any compute where headers show it. A case that fails later is
    recorded and the others go on; if every case fails, nothing is left behind and the first error is raised.
    """
    started = time.time()
    predictor = _predictor(model, request)
    cases, output = _prepare(model, request)
    with _discarding(output):
        output.begin(str(request.input.absolute()))
        works = _segment_all(model, predictor, cases, request, output, "predicted")
        rows = [work.row for work in works]
        write_log(output, request, model, None, [], rows, started)
    for row in rows:
        say(case_line(row))
    return rows


def explain(model: Model, request: Request, settings: Settings, say: Print = print) -> list[dict[str, Any]]:
    """Segment, then explain every instance; writes maps, pictures and tables and returns the rows of `cases.tsv`.

    Raises InputError as `segment`, and where there is no instance to explain at all.
    """
    started = time.time()
    predictor = _predictor(model, request)
    try:
        methods = build_methods(model, settings)
        explained = build_predictor(model, settings, request.whole_volume)
    except ValueError as error:
        raise InputError(str(error)) from error
    cases, output = _prepare(model, request)
    with _discarding(output):
        if not request.dry_run:
            output.begin(str(request.input.absolute()))
        written = None if request.dry_run else output
        works = _segment_all(model, predictor, cases, request, written, request.instances)
        if not any(work.instances for work in works):
            raise InputError(nothing_to_explain(works, request, model))
        with _refused():
            units = say_plan(works, methods, explained, model, settings, request, say)
        if request.dry_run:
            return [work.row for work in works]
        with _bar(units, "row", "explaining") as bar:
            for work in works:
                if work.instances:
                    with _recording(work, output, alone=len(works) == 1):
                        _explain_case(work, methods, explained, model, settings, request, output, bar)
        _raise_if_all_failed(works)
        write_lesions(output, works, methods, model, say)
        for method in methods:
            write_sidecar(output, method, model, settings, request)
        rows = [work.row for work in works]
        write_log(output, request, model, settings, methods, rows, started)
    for row in rows:
        say(case_line(row))
    return rows


def _predictor(model: Model, request: Request) -> StitchedPredictor:
    """For segmentation: always in float32, so that which lesions there are does not depend on how they are explained."""
    try:
        return StitchedPredictor.of(model, whole_volume=request.whole_volume)
    except ValueError as error:
        raise InputError(f"--whole-volume: {error}") from error


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
) -> list[Work]:
    works = [Work(case, {"case": case.name, "status": "done"}) for case in cases]
    with _bar(window_count(predictor, model, cases), "window", "segmenting") as bar:
        for work in works:
            case, begun = work.case, time.perf_counter()
            with _recording(work, output, alone=len(works) == 1):
                scan = load_scan(case, model.spec, request.resample)
                segmentation = segment_scan(predictor, model.spec, scan, case, lambda: bar.update(1))
                target = target_of(source, segmentation, scan, case)
                _describe(work, scan, segmentation, target, request)
                if output is not None:
                    _write_segmentation(output, case, scan, segmentation, target)
            work.row["seconds"] = time.perf_counter() - begun
    _raise_if_all_failed(works)
    return works


def _describe(work: Work, scan: Scan, segmentation: Segmentation, target: Target, request: Request) -> None:
    counted = int(segmentation.labels.max())
    work.row |= {
        "lesions": counted,
        "volume_mm3": int((segmentation.labels > 0).sum()) * scan.label_grid.voxel_volume,
        **segmentation.agreement(),
    }
    wanted = list(request.lesions) if request.lesions is not None else None
    chosen = chosen_instances(target, work.case.name, request.min_voxels, wanted)
    work.instances, lost = on_image(chosen, target, scan)
    held = {instance.label for instance in work.instances}
    work.lesion_rows = [
        lesion_row(work.case, scan.label_grid, segmentation, target, i) for i in chosen if i.label in held
    ]
    work.volume_shape = scan.image.shape
    work.present = len(target.groups)
    if not work.instances:
        work.row["status"] = "empty"
    if not segmentation.labels.any():
        work.row["message"] = "no voxel above the threshold"
    if lost:
        work.row["message"] = f"not explained: {', '.join(map(str, lost))}, outside of what the preprocessing keeps"


def _write_segmentation(
    output: OutputFolder, case: Case, scan: Scan, segmentation: Segmentation, target: Target
) -> None:
    output.label_volume(output.path(case, "space-orig_label-L_probseg.nii.gz"), scan, segmentation.probability)
    mask = (segmentation.labels > 0).astype(np.uint8)
    output.label_volume(output.path(case, "space-orig_label-L_mask.nii.gz"), scan, mask)
    labels = target.labels.astype(np.int16 if target.labels.max() < 2**15 else np.int32)
    output.label_volume(output.path(case, "space-orig_desc-instances_dseg.nii.gz"), scan, labels)


def _explain_case(
    work: Work,
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
    scan = load_scan(case, model.spec, request.resample)
    key = case_key(settings.seed, case.name)
    by_label = {row["lesion"]: row for row in work.lesion_rows}
    memory = settings.memory or int(_physical_memory() * _MAPS_FRACTION)
    for method in methods:
        explained = explain_scan(key, method, predictor, scan.image, work.instances, memory, bar.update)
        infos: list[Info] = []
        for instance, saliency, info, seconds in explained:
            infos.append(info)
            row = by_label[instance.label]
            row |= map_row(method.key, method.names, saliency, info, instance, scan.image.shape)
            row[f"{method.key}_seconds"] = seconds
            stem = f"space-orig_desc-{method.key}_lesion-{instance.label:03d}_saliency"
            trimmed = trim(saliency)
            output.volume(output.path(case, f"{stem}.nii.gz"), scan, np.asarray(trimmed.values), trimmed.start)
            draw = partial(_draw, scan, model.spec.channels, instance, saliency, method, row)
            output.figure(output.path(case, f"{stem}.png"), draw)
        if len(method.names) <= _MOST_LINES and any(info.course is not None for info in infos):
            labels = [f"lesion {instance.label}" for instance in work.instances]
            course = partial(_draw_course, infos, labels, method, settings.tolerance or 0.05)
            output.figure(output.path(case, f"desc-{method.key}_convergence.png"), course)
    output.table(output.path(case, "desc-lesions.tsv"), lesion_columns(methods), work.lesion_rows)
    work.row["explained"] = len(work.instances)
    work.row["seconds"] += time.perf_counter() - begun


def _draw_course(infos: Sequence[Info], labels: Sequence[str], method: Method, tolerance: float, path: Path) -> None:
    convergence_figure(infos, labels, method.names, path, unit=method.unit, tolerance=tolerance)


def trim(saliency: SaliencyMap) -> SaliencyMap:
    """The smallest crop that holds every non-zero value; the first voxel of the map where there is none."""
    places = np.argwhere(saliency.values.any(-1))
    low, high = (places.min(0), places.max(0) + 1) if len(places) else (np.zeros(3, int), np.ones(3, int))
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    x, y, z = (low + np.array(saliency.start)).tolist()
    return SaliencyMap(np.asarray(saliency.values)[box], (x, y, z))


def _draw(
    scan: Scan,
    channels: Sequence[str],
    instance: Instance,
    saliency: SaliencyMap,
    method: Method,
    row: dict[str, Any],
    path: Path,
) -> None:
    shape = scan.image.shape[:3]
    mask = np.zeros(shape, bool)
    mask[tuple(instance.voxels.T)] = True
    whole = np.zeros((*shape, saliency.values.shape[-1]), np.float32)
    whole[tuple(slice(s, s + n) for s, n in zip(saliency.start, saliency.values.shape, strict=False))] = saliency.values
    names = method.names if len(method.names) > 1 else (method.title.split(" at ")[0],)
    peaks = "peak " + ", ".join(
        f"{name} {saliency.values[..., c].max():{'+.3g' if method.signed else '.3g'}}" for c, name in enumerate(names)
    )
    if not saliency.values.any():
        peaks = "the map is zero everywhere"
    lesion_figure(
        scan.image,
        channels,
        mask,
        whole,
        scan.grid.affine,
        title=f"{row['case']} · lesion {instance.label} · {row['group']}",
        subtitle=f"{row['volume_mm3']:.0f} mm³ · {method.title} · {peaks}",
        unit=method.unit,
        signed=method.signed,
        saliency_names=names,
        margin_mm=_MARGIN_MM,
        path=path,
    )


@contextmanager
def _refused() -> Iterator[None]:
    """What an explainer refuses when it is called is the user's to mend, as any other input."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


@contextmanager
def _recording(work: Work, output: OutputFolder | None, alone: bool) -> Iterator[None]:
    """A case that fails is recorded, its files are removed, and the others go on."""
    try:
        yield
    except (InputError, ValueError) as error:
        work.row |= {"status": "failed", "message": str(error)}
        work.instances = []
        if output is not None:
            output.discard_case(work.case)
        if not alone:
            tqdm.write(f"{work.case.name}: failed: {error}", file=sys.stderr)


def _raise_if_all_failed(works: Sequence[Work]) -> None:
    if all(work.row["status"] == "failed" for work in works):
        raise InputError(works[0].row["message"])


@contextmanager
def _discarding(output: OutputFolder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        output.discard()
        raise


def _bar(total: int | None, unit: str, what: str) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, unit=unit, desc=what, file=sys.stderr, mininterval=interval, dynamic_ncols=True)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
