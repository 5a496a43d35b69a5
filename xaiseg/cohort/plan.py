"""What a run is about to do and how long it will take, said before it starts."""

import math
from collections.abc import Sequence
from dataclasses import replace

import jax

from xaiseg.cohort.explaining import precision_error, seconds_per_row
from xaiseg.cohort.methods import Method, Settings
from xaiseg.cohort.work import Print, Request, Work, load_scan
from xaiseg.imaging import Case, check_header
from xaiseg.inference import StitchedPredictor
from xaiseg.models import Model


def say_plan(
    works: Sequence[Work],
    methods: Sequence[Method],
    predictor: StitchedPredictor,
    model: Model,
    settings: Settings,
    request: Request,
    say: Print,
) -> int:
    """Print what is about to be done and what it will take; returns the units of the progress bar."""
    busy = [work for work in works if work.instances]
    smallest = min(busy, key=lambda work: math.prod(work.volume_shape))
    scan = load_scan(smallest.case, model.spec, request.resample)
    lesions = sum(len(work.instances) for work in busy)
    left_out = sum(work.present for work in works) - lesions
    devices = 1 if predictor.mesh is None else predictor.mesh.size
    units, seconds = 0, 0.0
    lines = []
    for method in methods:
        rows = windows = 0
        for work in busy:
            for instance in work.instances:
                r, w = method.cost(predictor, work.volume_shape, instance)
                rows, windows = rows + r, windows + w
        each = seconds_per_row(method, replace(predictor, mesh=None), scan.image, smallest.instances[0])
        units += rows * method.samples
        seconds += rows * method.samples * each / (devices if method.spreads else 1)
        lines.append(
            f"  {method.title}: {rows:,} rows × {method.samples} through {windows:,} windows, {each * 1e3:.3g} ms a row measured"
        )
    smaller = f" ({left_out} left out: below --min-voxels {request.min_voxels} or not selected)" if left_out else ""
    say(f"plan: {len(busy)} case{'s' * (len(busy) > 1)}, {lesions} lesion{'s' * (lesions > 1)}{smaller}")
    for line in lines:
        say(line)
    where = f"{devices} × {jax.devices()[0].device_kind}" if devices > 1 else jax.devices()[0].device_kind
    say(f"  estimated time {_duration(seconds)} on {where}")
    if settings.precision != "float32":
        error = precision_error(model, settings.precision, predictor, scan.image, smallest.instances[0])
        say(f"  {settings.precision}: one row differs from float32 by up to {error:.2g} of its largest value")
    return units


def nothing_to_explain(works: Sequence[Work], request: Request, model: Model) -> str:
    where = works[0].case.name if len(works) == 1 else f"{len(works)} cases"
    present = sum(work.present for work in works)
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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
