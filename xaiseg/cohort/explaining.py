"""One scan's lesions explained in batches that fit into memory, and what a row costs here."""

import math
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from xaiseg._types import Info, Instance, Progress, SaliencyMap
from xaiseg.cohort.methods import Method
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor, WindowPlan
from xaiseg.models import Model
from xaiseg.saliency import input_gradient
from xaiseg.saliency.linearise import total_memory


def case_key(seed: int, case: str) -> jax.Array:
    """The key of a case: independent of the order of cases and of what else is explained."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(case.encode()))


def explain_scan(
    key: jax.Array,
    method: Method,
    predictor: StitchedPredictor,
    image: np.ndarray,
    instances: Sequence[Instance],
    memory: int,
    progress: Progress | None = None,
) -> Iterator[tuple[Instance, SaliencyMap, Info, float]]:
    """Maps of all instances, with the seconds each took, in order. `memory` in bytes bounds the maps alive at once."""
    volume = jnp.asarray(image)
    plan = predictor.plan(image.shape)
    for batch in _batches(plan, instances, image.shape[-1] * method.copies, memory):
        start = time.perf_counter()
        maps, infos = method.explain(key, predictor, volume, batch, progress=progress)
        maps = [_on_host(saliency) for saliency in maps]
        seconds = time.perf_counter() - start
        total = sum(info.rows for info in infos)
        shares = [info.rows / total if total else 1 / len(infos) for info in infos]
        for instance, saliency, info, share in zip(batch, maps, infos, shares, strict=True):
            yield instance, saliency, info, seconds * share


def _on_host(saliency: SaliencyMap) -> SaliencyMap:
    error = saliency.standard_error
    return saliency._replace(
        values=np.asarray(saliency.values), standard_error=None if error is None else np.asarray(error)
    )


def _batches(plan: WindowPlan, instances: Sequence[Instance], numbers: int, memory: int) -> Iterator[list[Instance]]:
    batch: list[Instance] = []
    held = 0
    for instance in instances:
        windows = np.flatnonzero((plan.coverage(instance.voxels)[1] > 0).any(1))
        needed = math.prod(plan.bounding_box(windows).shape) * numbers * 4
        if needed > total_memory():
            raise InputError(
                f"lesion {instance.label} needs {needed / 2**30:.3g} GiB for its map under way, more than there is; "
                "choose another --aggregate than median, or leave it out by --lesions"
            )
        if batch and held + needed > memory:
            yield batch
            batch, held = [], 0
        batch.append(instance)
        held += needed
    if batch:
        yield batch


def seconds_per_row(method: Method, predictor: StitchedPredictor, image: np.ndarray, instance: Instance) -> float:
    """Seconds per backward pass, measured on part of an instance after compilation.

    The part grows until it takes a second: a few voxels would fill a chunk of rows with padding, which costs as much as rows.
    """
    volume = jnp.asarray(image)

    def timed(voxels: int) -> tuple[float, int]:
        start = time.perf_counter()
        part = Instance(instance.label, instance.voxels[:voxels])
        _, (info,) = method.once(jax.random.key(0), predictor, volume, [part])
        return time.perf_counter() - start, info.rows

    voxels = 1
    while True:
        timed(voxels)  # compiles
        seconds, rows = timed(voxels)
        if seconds > 1 or voxels >= len(instance.voxels):
            return seconds / max(rows, 1)
        voxels *= 4


def precision_error(
    model: Model, precision: str, predictor: StitchedPredictor, image: np.ndarray, instance: Instance
) -> float:
    """By how much a row of an instance's first voxel differs from that in float32, at most, as a fraction of its largest value."""
    whole = predictor.window is None
    first = Instance(instance.label, instance.voxels[:1])
    rows = []
    for name in ("float32", precision):
        at = StitchedPredictor.of(replace(model, precision=name), whole_volume=whole)
        (found,), _ = input_gradient()(jax.random.key(0), at, jnp.asarray(image), [first])
        rows.append(np.asarray(found.values))
    return float(np.abs(rows[1] - rows[0]).max() / np.abs(rows[0]).max())
