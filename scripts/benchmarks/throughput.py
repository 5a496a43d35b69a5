"""Rows a second of xaiseg, how much of the hardware that is, and what it means for a scan and for the paper's cohort."""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts.benchmarks.lesions import PLACES, ball, centre_at
from scripts.benchmarks.measuring import seconds
from scripts.benchmarks.networks import random_image, random_model
from xaiseg._types import Instance
from xaiseg.checkpoints import convert
from xaiseg.cohort.work import load_scan
from xaiseg.imaging import read_input
from xaiseg.inference import StitchedPredictor
from xaiseg.inspection import flops, inspect
from xaiseg.instances import instances_of, label_components
from xaiseg.models.precision import at_precision, precision_of
from xaiseg.saliency import jacobian_rows, signed_max
from xaiseg.saliency.linearise import Chunk, Linear, Views, chunk_sizes, pull_back, pull_rows, row_chunks
from xaiseg.saliency.rows import head_of
from xaiseg.saliency.schedule import Geometry, Portion, View, portions

_SAMPLES, _SCANS = 50, 4023
_CASE = "sub-26"
# Of the lesion that is explained: one of the larger ones, or what takes about so many seconds.
_VOXELS, _SECONDS = 200, 20
# Smaller components are no lesions, as in the paper.
_MIN_VOXELS = 6
# One sample of the scan is measured if it should take no more seconds than this.
_MEASURE_BELOW = 120


class Scan(NamedTuple):
    image: np.ndarray
    instances: list[Instance]


class Figures(NamedTuple):
    """linearise: seconds of a view. row: seconds of a pass back through one, as `explain` computes it."""

    linearise: float
    row: float


def throughput(networks: Sequence[str], window: tuple[int, int, int], shared: Path, repeats: int) -> None:
    rate = matrix_rate(repeats)
    print(f"matrix product in float32: {rate / 1e9:.4g} GFLOP/s")
    scan = real_scan(shared)
    if scan is None:
        print(f"no {shared / 'data' / 'open_ms'}: nothing is said of a real scan")
    for network in networks:
        model = random_model(network, window)
        predictor = StitchedPredictor.of(model)
        figures = _of_one_lesion(network, model, predictor, window, rate, repeats)
        if scan is not None:
            _of_scan(predictor, scan, figures)


def matrix_rate(repeats: int) -> float:
    """Operations a second of a large product of square matrices, as the network's products are computed."""
    n = 4096 if jax.default_backend() == "cpu" else 8192

    @jax.jit
    def product(a: Any, b: Any) -> Any:
        with precision_of("float32"):
            return at_precision(lambda a, b, precision: jnp.matmul(a, b, precision=precision), a, b)

    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, n)).astype(np.float32))
    return 2 * n**3 / _median(lambda: product(a, a), repeats)


def _of_one_lesion(
    network: str, model: Any, predictor: StitchedPredictor, window: tuple[int, int, int], rate: float, repeats: int
) -> Figures:
    x, plan = jnp.asarray(random_image(window)), predictor.plan(window)
    centre = centre_at(plan, PLACES[0], _VOXELS)
    if centre is None:
        sys.exit(f"a window of {window} has no room for a lesion of {_VOXELS} voxels")
    geometry = Geometry.of(plan, predictor.local_fn)

    def linearised() -> tuple[Views, View, Linear]:
        (view,) = portions(geometry, [Instance(1, np.array([centre], np.int32))])[0].views
        views = Views(predictor, geometry, x, head_of(predictor, "logit", x))
        return views, view, views[view]

    held, view, linear = linearised()
    linearise = _median(lambda: linearised()[2], repeats)
    chunk = _full_chunk(geometry, view, held, chunk_sizes(linear, None, None)[0])
    alone = _median(lambda: pull_rows(linear, chunk, 0, geometry.sides), repeats) / chunk.rows

    voxels = int(np.clip(_SECONDS / alone, 2, _VOXELS))
    lesion = Instance(1, ball(centre, voxels))
    work = portions(geometry, [lesion])
    passes, views = _passes(work), sum(len(p.views) for p in work)
    explain = jacobian_rows(signed_max())
    whole = _median(lambda: explain(jax.random.key(0), predictor, x, [lesion])[0][0].values, min(repeats, 3))
    row = max((whole - views * linearise) / passes, alone)
    computed = flops(jax.make_jaxpr(pull_back)(linear.pull, jnp.zeros((1, *linear.logits.shape))))
    of_window = inspect(model).row_flops
    part = "a window" if predictor.local_fn is None else f"a tile of {predictor.local_fn.tile[0]}³"
    print(
        f"\n{network}: rows through {part}, {chunk.rows} at a time, linearised in {linearise * 1e3:.4g} ms\n"
        f"  pulled back      {1 / alone:10.4g} rows/s   {computed / 1e9:.3g} GFLOP a row, {computed / alone / rate:.0%} of the "
        f"matrix product's rate; {of_window / 1e9:.3g} GFLOP through the whole window, {of_window / alone / rate:.0%}\n"
        f"  in explain       {passes / whole:10.4g} rows/s   a lesion of {voxels} voxels in {whole:.4g} s: {views} "
        f"linearisation{'s' * (views > 1)}, {passes} rows, their maximum",
        flush=True,
    )
    return Figures(linearise, row)


def _full_chunk(geometry: Geometry, view: View, views: Views, size: int) -> Chunk:
    """As many rows as are pulled back together, of voxels anywhere in the view."""
    place = np.random.default_rng(0).integers(0, geometry.sides, (1, size, 3)).astype(np.int32)
    number = np.arange(size, dtype=np.int32)
    filled = Portion((view,), np.zeros(size, np.int32), number, place, np.ones((1, size), np.float32))
    return next(row_chunks(filled, views.values(filled), (size,)))


def _passes(work: Sequence[Portion]) -> int:
    return sum(len(p.views) * len(p.row) for p in work)


def _of_scan(predictor: StitchedPredictor, scan: Scan, figures: Figures) -> None:
    """All lesions of a scan, from what a row and a linearisation cost."""
    shape, count = scan.image.shape, sum(len(i.voxels) for i in scan.instances)
    geometry = Geometry.of(predictor.plan(shape), predictor.local_fn)
    work = portions(geometry, scan.instances)
    passes, linearisations = _passes(work), sum(len(p.views) for p in work)
    sample = passes * figures.row + linearisations * figures.linearise
    total = _SAMPLES * sample
    print(
        f"  {_CASE}, {len(scan.instances)} lesions, {count} voxels, {'×'.join(map(str, shape[:3]))}: {passes} rows through views "
        f"({passes / count:.2g} a voxel), {linearisations} linearisations, {_long(sample)} a sample\n"
        f"  {_SAMPLES} samples {_long(total)} a scan; {_SCANS} such scans {_long(_SCANS * total)} on this one device",
        flush=True,
    )
    if sample <= _MEASURE_BELOW:
        x, explain = jnp.asarray(scan.image), jacobian_rows(signed_max())

        def once() -> list[Any]:
            return [m.values for m in explain(jax.random.key(0), predictor, x, scan.instances)[0]]

        print(f"  one sample of it measured: {_long(_median(once, 1))}", flush=True)


def real_scan(shared: Path) -> Scan | None:
    """A public scan and the lesions that a trained U-Net finds in it; None where either is absent."""
    folder, checkpoint = shared / "data" / "open_ms", shared / "models" / "monai_unet_ms.pth"
    if not folder.is_dir() or not checkpoint.is_file():
        return None
    model = convert(checkpoint, window=(96, 96, 96))
    case = next(c for c in read_input(folder, model.spec.channels) if c.name.startswith(_CASE))
    image = np.asarray(load_scan(case, model.spec).image)
    predictor = StitchedPredictor.of(model)
    probability = np.asarray(predictor.probability(predictor(jnp.asarray(image))))
    lesions = instances_of(label_components(probability > model.spec.threshold))
    return Scan(image, [lesion for lesion in lesions if len(lesion.voxels) >= _MIN_VOXELS])


def _median(work: Callable[[], Any], repeats: int) -> float:
    """Of so many runs, after one that compiles."""
    jax.block_until_ready(work())
    return statistics.median(seconds(lambda: jax.block_until_ready(work())) for _ in range(repeats))


def _long(s: float) -> str:
    for unit, name in ((365.25 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if s >= 2 * unit:
            return f"{s / unit:.3g} {name}"
    return f"{s:.3g} s"
