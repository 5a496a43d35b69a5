"""One scan's lesions explained in groups, and what a row costs here."""

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
from xaiseg.inference import StitchedPredictor
from xaiseg.models import Model
from xaiseg.saliency import input_gradient
from xaiseg.saliency.linearise import total_memory

# Passes after which a group of lesions ends: minutes on a CPU, seconds on an accelerator.
_PASSES = 1024
# Bytes of the maps of a group while they are computed, where nothing else is said.
_MAPS_MEMORY = 2**30


def case_key(seed: int, case: str) -> jax.Array:
    """The key of a case: independent of the order of cases and of what else is explained."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(case.encode()))


def groups(
    method: Method,
    predictor: StitchedPredictor,
    shape: tuple[int, ...],
    instances: Sequence[Instance],
    passes: Sequence[int],
    memory: int | None,
) -> Iterator[list[Instance]]:
    """The instances in order, in groups that are explained together: a group is what is lost when a run is killed.

    passes: of each instance, over all samples. Lesions that share parts of the network are cheaper together, so a group holds as
    many as `memory` bytes hold maps of, but ends after `_PASSES`. The groups follow from the case and the settings alone, not from
    the machine nor from what is done already: rows of lesions that are computed together are added up in an order that depends on
    who they are with.

    Raises InputError for an instance whose map this machine has no memory for.
    """
    plan = predictor.plan(shape)
    numbers = shape[-1] * method.copies
    memory = memory or _MAPS_MEMORY
    group: list[Instance] = []
    held = taken = 0
    for instance, own in zip(instances, passes, strict=True):
        windows = np.flatnonzero((plan.coverage(instance.voxels)[1] > 0).any(1))
        needed = math.prod(plan.bounding_box(windows).shape) * numbers * 4
        if needed > total_memory():
            raise InputError(
                f"lesion {instance.label} needs {needed / 2**30:.3g} GiB for its map under way, more than there is; "
                "choose another --aggregate than median, or leave it out by --lesions"
            )
        if group and (held + needed > memory or taken + own > _PASSES):
            yield group
            group, held, taken = [], 0, 0
        group.append(instance)
        held, taken = held + needed, taken + own
    if group:
        yield group


def explain_group(
    key: jax.Array,
    method: Method,
    predictor: StitchedPredictor,
    image: jax.Array,
    instances: Sequence[Instance],
    progress: Progress | None = None,
) -> list[tuple[Instance, SaliencyMap, Info]]:
    """Maps of instances that are explained together, on the host. Raises FloatingPointError for one that is not finite."""
    maps, infos = method.explain(key, predictor, image, instances, progress=progress)
    found = [(i, _on_host(saliency), info) for i, saliency, info in zip(instances, maps, infos, strict=True)]
    for instance, saliency, _ in found:
        if not np.isfinite(saliency.values).all():
            raise FloatingPointError(
                f"lesion {instance.label}: the map of {method.title} has values that are no numbers"
            )
    return found


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or this machine had no memory for what was asked."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower())
    )


def _on_host(saliency: SaliencyMap) -> SaliencyMap:
    error = saliency.standard_error
    return saliency._replace(
        values=np.asarray(saliency.values), standard_error=None if error is None else np.asarray(error)
    )


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
