"""What a run is about to do and how long it will take, said before it starts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from xaiseg._types import Instance
from xaiseg.cohort.explaining import out_of_memory, precision_error, seconds_per_row
from xaiseg.cohort.journal import CaseRecord
from xaiseg.cohort.methods import Method
from xaiseg.cohort.segmentation import on_image
from xaiseg.cohort.session import Session
from xaiseg.cohort.stages import INSTANCES
from xaiseg.cohort.work import Print, load_scan
from xaiseg.errors import InputError
from xaiseg.imaging import Case, Scan, check_header
from xaiseg.inference import StitchedPredictor
from xaiseg.instances import instances_of
from xaiseg.models import Model

# A float map of random digits compresses little; rounded to a float16's bits, to about half.
_PACKED = {"float32": 0.9, "float16": 0.45}
_PICTURE = 150_000  # bytes
_DRAWING = 0.6  # seconds of a core for a picture
_MANY = 100  # pictures whose time is worth a word


@dataclass
class Load:
    """What is left to do. passes: by method, over all samples. rows, windows: of one sample. known: seconds and passes of what is
    done, by method."""

    cases: int = 0
    lesions: int = 0
    left_out: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    windows: dict[str, int] = field(default_factory=dict)
    known: dict[str, tuple[float, int]] = field(default_factory=dict)
    done: int = 0
    voxels: int = 0
    units: int = 0
    smallest: tuple[int, str] | None = None

    def add(self, record: CaseRecord, methods: Sequence[Method]) -> None:
        if record.segmented is None:
            return
        shape, costs = record.segmented["shape"], record.segmented["costs"]
        labels = record.lesions()
        missing = record.missing([m.key for m in methods])
        self.done += len(labels) * len(methods) - len(missing)
        self.left_out += record.segmented["present"] - len(labels)
        for timing in record.timings:
            if timing["passes"]:
                seconds, passes = self.known.get(timing["unit"], (0.0, 0))
                self.known[timing["unit"]] = (seconds + timing["seconds"], passes + timing["passes"])
        if not missing:
            return
        self.cases += 1
        self.lesions += len({label for _, label in missing})
        for key, label in missing:
            rows, windows = costs[key][str(label)]
            self.rows[key] = self.rows.get(key, 0) + rows
            self.windows[key] = self.windows.get(key, 0) + windows
            self.voxels += record.segmented["map_voxels"][str(label)]
            self.units += 1
        size = (math.prod(shape), record.name)
        self.smallest = min(self.smallest or size, size)


def load_of(records: Iterator[CaseRecord], methods: Sequence[Method]) -> Load:
    load = Load()
    for record in records:
        load.add(record, methods)
    return load


def say_plan(session: Session, load: Load, cases: Mapping[str, Case], say: Print, devices: int | None = None) -> int:
    """Print what is about to be done and what it will take; returns the units of the progress bar.

    devices: that work side by side, where those of this process are not all. Raises InputError for what an explainer refuses.
    """
    settings, predictor, request = session.settings, session.explained, session.request
    assert settings is not None
    assert load.smallest is not None
    scan, instance = _sample(session, cases[load.smallest[1]])
    mesh = 1 if predictor.mesh is None else predictor.mesh.size
    units, seconds = 0, 0.0
    lines = []
    for number, method in enumerate(session.methods):
        if not (rows := load.rows.get(method.key)):
            continue
        before, passes = load.known.get(method.key, (0.0, 0))
        each = before / passes if passes else None
        if each is None and scan is not None:
            each = _measured(session, number, scan, instance)
        units += rows * method.samples
        spread = mesh if method.spreads and not passes else 1
        seconds += rows * method.samples * (each or math.nan) / spread / (devices or 1)
        what = f"  {method.title}: {rows:,} rows × {method.samples} through {load.windows[method.key]:,} windows"
        lines.append(f"{what}, {each * 1e3:.3g} ms a row measured" if each else what)
    smaller = (
        f" ({load.left_out} left out: below --min-voxels {request.min_voxels} or not selected)" if load.left_out else ""
    )
    done = f"; {load.done} units done before" if load.done else ""
    say(f"plan: {load.cases} case{_s(load.cases)}, {load.lesions} lesion{_s(load.lesions)}{smaller}{done}")
    for line in lines:
        say(line)
    count = devices or mesh
    kind = jax.devices()[0].device_kind
    estimate = duration(seconds) if math.isfinite(seconds) else "unknown"
    say(f"  estimated time {estimate} on {f'{count} × {kind}' if count > 1 else kind}")
    say(f"  files: at most {_size(_bytes(session, load))} ({_stored(session, load.units)})")
    if settings.precision != "float32" and scan is not None:
        off = precision_error(session.model, settings.precision, predictor, scan.image, instance)
        say(f"  {settings.precision}: one row differs from float32 by up to {off:.2g} of its largest value")
    return units


def _sample(session: Session, case: Case) -> tuple[Scan | None, Instance]:
    """A scan and one of its lesions to measure with; no scan where it cannot be read any more, which its own turn will tell."""
    nobody = Instance(0, np.zeros((0, 3), np.int32))
    try:
        scan = load_scan(case, session.model.spec, session.request.resample)
        labels = scan.labels(session.folder.path(case, INSTANCES))
    except InputError:
        return None, nobody
    record = CaseRecord.read(session.folder.root, case.name)
    instances, _ = on_image(instances_of(labels, record.lesions()), labels, scan)
    return (scan, instances[0]) if instances else (None, nobody)


def _measured(session: Session, number: int, scan: Scan, instance: Instance) -> float | None:
    """Seconds a row, with a smaller chunk where memory runs out; None where not even one row fits. Raises InputError for what the
    explainer refuses, which is the user's to mend, as any other input."""
    predictor = replace(session.explained, mesh=None)
    while True:
        try:
            return seconds_per_row(session.methods[number], predictor, scan.image, instance)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if session.halve_chunk() is None:
                return None


def _bytes(session: Session, load: Load) -> float:
    request, channels = session.request, len(session.model.spec.channels)
    maps = load.voxels * channels * 4 * _PACKED[request.map_dtype] if request.save_maps != "none" else 0
    return maps + (load.units * _PICTURE if request.pictures else 0)


def _stored(session: Session, units: int) -> str:
    request = session.request
    maps = "no maps" if request.save_maps == "none" else f"maps: {request.save_maps}, {request.map_dtype}"
    if not request.pictures:
        return f"{maps}, no pictures"
    drawn = f" that take {duration(units * _DRAWING)} of a core; --no-pictures" if units > _MANY else ""
    return f"{maps}, with pictures{drawn}"


def nothing_to_explain(session: Session, records: Iterator[CaseRecord]) -> str:
    request, model = session.request, session.model
    found = [record for record in records if record.segmented is not None]
    where = found[0].name if len(found) == 1 else f"{len(found)} cases"
    present = sum((record.segmented or {})["present"] for record in found)
    if present:
        return (
            f"{where}: none of the {present} instances has {request.min_voxels} voxels or more, so there is nothing to explain; "
            "lower --min-voxels"
        )
    if request.instances != "predicted":
        return f"{where}: the {request.instances} label map is empty, so there is nothing to explain"
    at = f" at threshold {model.spec.threshold}" if model.spec.threshold is not None else ""
    return (
        f"{where}: the segmentation is empty{at}, so there is nothing to explain; "
        "lower --threshold, or check that the channels and their intensities are those the model was trained on"
    )


def window_count(predictor: StitchedPredictor, model: Model, cases: Sequence[Case]) -> int | None:
    """Windows of all cases by their headers; None where a preprocessing crops and resamples them first."""
    if model.spec.normalisation == "nnunet":
        return None
    return sum(len(predictor.plan(check_header(next(iter(case.images.values()))).shape).starts) for case in cases)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _s(count: int) -> str:
    return "s" * (count != 1)
