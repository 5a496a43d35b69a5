"""The two stages of a case, segmentation and explanation: what is computed at once, and what is left to be written behind it."""

import math
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xaiseg._types import Info, Instance, Progress, SaliencyMap
from xaiseg.cohort.explaining import case_key, explain_group, groups, out_of_memory
from xaiseg.cohort.journal import CaseRecord
from xaiseg.cohort.measures import lesion_row, map_row
from xaiseg.cohort.methods import Method
from xaiseg.cohort.output import OutputError
from xaiseg.cohort.segmentation import chosen_instances, on_image, segment_scan, target_of
from xaiseg.cohort.session import Session
from xaiseg.errors import InputError
from xaiseg.imaging import Case, Scan
from xaiseg.instances import instances_of
from xaiseg.report import lesion_figure

Write = Callable[[], dict[str, Any]]
"""Writes the files of some units, then their line in the journal, which it returns."""
Stopped = Callable[[], bool]

PROBABILITY, MASK, INSTANCES = (
    "space-orig_label-L_probseg.nii.gz",
    "space-orig_label-L_mask.nii.gz",
    "space-orig_desc-instances_dseg.nii.gz",
)
_MARGIN_MM = 20.0
WORKER = f"{socket.gethostname()}-{os.getpid()}"


def segment_case(
    session: Session,
    case: Case,
    scan: Scan,
    inputs: Mapping[str, Any],
    warnings: Sequence[str] = (),
    progress: Callable[[], Any] | None = None,
) -> Write:
    """Segment a scan and find its instances. `inputs`: `identity.fingerprint` of its files. `warnings`: about the scan.

    Raises InputError where the case lacks what is asked of it.
    """
    begun = time.perf_counter()
    spec, folder, request = session.model.spec, session.folder, session.request
    segmentation = segment_scan(session.segmenter, spec, scan, case, progress)
    target = target_of(session.source, segmentation, scan, case)
    wanted = list(request.lesions) if request.lesions is not None else None
    chosen = chosen_instances(target, case.name, request.min_voxels, wanted)
    instances, lost = on_image(chosen, target.labels, scan)
    held = {instance.label for instance in instances}
    row: dict[str, Any] = {
        "lesions": int(segmentation.labels.max()),
        "volume_mm3": int((segmentation.labels > 0).sum()) * scan.label_grid.voxel_volume,
        **segmentation.agreement(),
    }
    messages = [f"warning: {warning}" for warning in warnings]
    if not segmentation.labels.any():
        messages.append("no voxel above the threshold")
    if lost:
        messages.append(f"not explained: {', '.join(map(str, lost))}, outside of what the preprocessing keeps")
    row["message"] = "; ".join(messages) or None
    shape = scan.image.shape
    costs = {m.key: {i.label: m.cost(session.explained, shape, i) for i in instances} for m in session.methods}
    entry = {
        "entry": "segmented",
        "patient": case.patient,
        "warnings": list(warnings),
        "inputs": inputs,
        "row": row,
        "rows": [lesion_row(case, scan.label_grid, segmentation, target, i) for i in chosen if i.label in held],
        "explain": [instance.label for instance in instances],
        "present": len(target.groups),
        "costs": costs,
        "map_voxels": {i.label: _hull(session, shape, i) for i in instances},
        "shape": shape,
        "seconds": time.perf_counter() - begun,
        "worker": WORKER,
    }

    def write() -> dict[str, Any]:
        mask = (segmentation.labels > 0).astype(np.uint8)
        labels = target.labels.astype(np.int16 if target.labels.max() < 2**15 else np.int32)
        arrays = {PROBABILITY: segmentation.probability, MASK: mask, INSTANCES: labels}
        for name, array in arrays.items():
            folder.label_volume(folder.path(case, name), scan, array)
        return folder.journal(case.name).append(entry, [folder.path(case, name) for name in arrays], anew=True)

    return write


def explain_case(
    session: Session,
    case: Case,
    scan: Scan,
    record: CaseRecord,
    stopped: Stopped = lambda: False,
    progress: Progress | None = None,
) -> Iterator[Write]:
    """Explain what of a segmented case is not explained yet, group by group; nothing is begun once `stopped`."""
    assert session.settings is not None
    assert record.segmented is not None
    costs, rows = record.segmented["costs"], {row["lesion"]: row for row in record.segmented["rows"]}
    labels = scan.labels(session.folder.path(case, INSTANCES))
    instances, _ = on_image(instances_of(labels, record.lesions()), labels, scan)
    image = jnp.asarray(scan.image)
    key = case_key(session.settings.seed, case.name)
    for number, method in enumerate(session.methods):
        passes = [costs[method.key][str(i.label)][0] * method.samples for i in instances]
        missing = {label for _, label in record.missing([method.key])}
        parted = groups(method, session.explained, scan.image.shape, instances, passes, session.settings.memory)
        for group in parted:
            todo = [instance for instance in group if instance.label in missing]
            if not todo:
                continue
            if stopped():
                return
            yield from _explained(session, number, case, scan, rows, key, image, todo, stopped, progress)


def _explained(
    session: Session,
    number: int,
    case: Case,
    scan: Scan,
    rows: Mapping[int, Mapping[str, Any]],
    key: jax.Array,
    image: jax.Array,
    group: list[Instance],
    stopped: Stopped,
    progress: Progress | None,
) -> Iterator[Write]:
    """A group of lesions; one by one when together they fail."""
    begun = time.perf_counter()
    while True:
        method = session.methods[number]
        try:
            found = explain_group(key, method, session.explained, image, group, progress)
            break
        except Exception as error:
            if must_stop(error):
                raise
            if out_of_memory(error) and session.halve_chunk() is not None:
                continue
            if len(group) == 1:
                yield partial(fail, session, case, method.key, group[0].label, error)
                return
        for instance in group:
            if stopped():
                return
            yield from _explained(session, number, case, scan, rows, key, image, [instance], stopped, progress)
        return
    yield partial(_write_maps, session, method, case, scan, rows, found, time.perf_counter() - begun)


def _write_maps(
    session: Session,
    method: Method,
    case: Case,
    scan: Scan,
    rows: Mapping[int, Mapping[str, Any]],
    found: Sequence[tuple[Instance, SaliencyMap, Info]],
    seconds: float,
) -> dict[str, Any]:
    folder, request = session.folder, session.request
    files: list[Path] = []
    lesions = []
    for instance, saliency, info in found:
        row = map_row(method.key, method.names, saliency, info, instance, scan.image.shape)
        course = None if info.course is None else info.course._asdict()
        own: list[Path] = []
        stem = f"space-orig_desc-{method.key}_lesion-{instance.label:03d}_saliency"
        if request.save_maps != "none":
            saved = trim(saliency) if request.save_maps == "crop" else whole(saliency, scan.image.shape)
            values = np.asarray(saved.values)
            values = rounded(values) if request.map_dtype == "float16" else values
            own.append(folder.path(case, f"{stem}.nii.gz"))
            folder.volume(own[-1], scan, values, saved.start)
        if request.pictures:
            own.append(folder.path(case, f"{stem}.png"))
            known = rows[instance.label]
            folder.figure(own[-1], partial(_draw, scan, session.model.spec.channels, instance, saliency, method, known))
        names = [str(file.relative_to(folder.root)) for file in own]
        lesions.append({"lesion": instance.label, "row": row, "course": course, "files": names})
        files += own
    passes = sum(info.rows * info.samples for _, _, info in found)
    entry = {"entry": "explained", "method": method.key, "lesions": lesions}
    timing = {"seconds": seconds, "passes": passes, "worker": WORKER}
    return folder.journal(case.name).append({**entry, **timing}, files)


def _hull(session: Session, shape: tuple[int, ...], instance: Instance) -> int:
    """Voxels of a stored map, at most: of the box of the windows that hold the instance, or of the grid."""
    plan, volume = session.explained.plan(shape), math.prod(shape[:3])
    if session.request.save_maps == "full":
        return volume
    windows = np.flatnonzero((plan.coverage(instance.voxels)[1] > 0).any(1))
    return min(math.prod(plan.bounding_box(windows).shape), volume)


def fail(session: Session, case: Case | str, unit: str, lesion: int | None, error: BaseException) -> dict[str, Any]:
    """Record that a case (`unit` "input" or "segmentation") or a lesion (a method's key) failed, and why."""
    name = case if isinstance(case, str) else case.name
    entry = {"entry": "failed", "unit": unit, "lesion": lesion, "message": cause(error), "worker": WORKER}
    if not isinstance(error, InputError | OSError | FloatingPointError | MemoryError):
        entry["traceback"] = "".join(traceback.format_exception(error))
    return session.folder.journal(name).append(entry)


def cause(error: BaseException) -> str:
    """One line."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError | OSError | FloatingPointError):
        return text
    if out_of_memory(error):
        return f"out of memory, however few rows at a time: take a larger device, or smaller windows ({text[:200]})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def must_stop(error: BaseException) -> bool:
    """Whether an error is not a case's: going on with the next one would only repeat it."""
    return isinstance(error, OutputError) or not isinstance(error, Exception)


def trim(saliency: SaliencyMap) -> SaliencyMap:
    """The smallest crop that holds every non-zero value; the first voxel of the map where there is none."""
    places = np.argwhere(saliency.values.any(-1))
    low, high = (places.min(0), places.max(0) + 1) if len(places) else (np.zeros(3, int), np.ones(3, int))
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    x, y, z = (low + np.array(saliency.start)).tolist()
    return SaliencyMap(np.asarray(saliency.values)[box], (x, y, z))


def whole(saliency: SaliencyMap, shape: Sequence[int]) -> SaliencyMap:
    """The map on the whole grid of an image of `shape`."""
    values = np.zeros((*shape[:3], saliency.values.shape[-1]), np.float32)
    box = tuple(slice(s, s + n) for s, n in zip(saliency.start, saliency.values.shape, strict=False))
    values[box] = saliency.values
    return SaliencyMap(values, (0, 0, 0))


def rounded(values: np.ndarray) -> np.ndarray:
    """Finite float32 values with the 11 significant bits of a float16 and the range of a float32.

    NIfTI has no float16; the 13 zero bits that this leaves compress to nothing.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = (bits >> np.uint32(13)) & np.uint32(1)  # halves go to the even neighbour, as in IEEE 754
    return ((bits + np.uint32(0xFFF) + even) & np.uint32(0xFFFFE000)).view(np.float32)


def _draw(
    scan: Scan,
    channels: Sequence[str],
    instance: Instance,
    saliency: SaliencyMap,
    method: Method,
    row: Mapping[str, Any],
    path: Path,
) -> None:
    shape = scan.image.shape[:3]
    mask = np.zeros(shape, bool)
    mask[tuple(instance.voxels.T)] = True
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
        np.asarray(whole(saliency, shape).values),
        scan.grid.affine,
        title=f"{row['case']} · lesion {instance.label} · {row['group']}",
        subtitle=f"{row['volume_mm3']:.0f} mm³ · {method.title} · {peaks}",
        unit=method.unit,
        signed=method.signed,
        saliency_names=names,
        margin_mm=_MARGIN_MM,
        path=path,
    )
