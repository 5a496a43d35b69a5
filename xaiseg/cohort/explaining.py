"""The methods a run can use, what each costs, and one scan's lesions explained in batches that fit into memory."""

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xaiseg._types import Explainer, Info, Instance, Progress, SaliencyMap
from xaiseg.inference import StitchedPredictor, WindowPlan
from xaiseg.models import Model
from xaiseg.saliency import AGGREGATORS, gradcam_pp, smoothgrad
from xaiseg.saliency.rows import count_rows, window_groups

METHODS = ("smoothgrad", "gradcam++")
# Copies of a map alive at once: the aggregator's two, the sample's own, mean, squares.
_COPIES = 5


@dataclass(frozen=True)
class Settings:
    """Options of `explain`. `chunk` and `memory` (bytes) bound the work at once and do not change the result."""

    methods: tuple[str, ...] = ("smoothgrad",)
    aggregate: str = "signed_max"
    samples: int = 50
    noise: float = 0.05
    layer: str | None = None
    seed: int = 0
    chunk: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Method:
    """One method ready to run.

    key: its name in file names and columns. names: of the map's channels. signed: whether values may be negative.
    once: `explain` with one noise sample, whose rows are timed for the plan.
    """

    name: str
    key: str
    title: str
    explain: Explainer
    once: Explainer
    names: tuple[str, ...]
    unit: str
    signed: bool
    settings: dict[str, Any]
    model: Model
    aggregate: str = "mean"
    samples: int = 1

    def work(self, plan: WindowPlan, instance: Instance) -> tuple[int, int]:
        """Backward passes per sample that an instance takes, and the windows it lies in."""
        groups = list(window_groups(plan, instance))
        windows = len({w for group in groups for w in group.windows.tolist()})
        rows = count_rows(groups, AGGREGATORS[self.aggregate]()) if self.name == "smoothgrad" else windows
        return rows, windows


def build_methods(model: Model, settings: Settings) -> list[Method]:
    """The methods that `settings` name. Raises ValueError for unknown ones, unknown aggregators or taps."""
    methods = []
    layer = settings.layer or model.spec.default_layer
    channels = model.spec.channels
    reference = channels.index("FLAIR") if "FLAIR" in channels else 0
    for name in settings.methods:
        if name == "smoothgrad":
            samples = settings.samples if settings.noise > 0 else 1
            make = partial(
                smoothgrad,
                noise=settings.noise,
                aggregate=settings.aggregate,
                chunk=settings.chunk,
                memory=settings.memory,
                reference_channel=reference,
            )
            used = {k: asdict(settings)[k] for k in ("aggregate", "samples", "noise", "seed")} | {"samples": samples}
            used |= {"noise_reference_channel": channels[reference]}
            how = {"signed_max": "signed maximum", "mean": "mean"}[settings.aggregate]
            title = f"SmoothGrad, {how}, {samples} sample{'s' * (samples > 1)}"
            unit = "Δlogit per unit of normalised intensity"
            methods.append(
                Method(
                    name,
                    "smoothgrad",
                    title,
                    make(samples=samples),
                    make(samples=1),
                    channels,
                    unit,
                    True,
                    used,
                    model,
                    settings.aggregate,
                    samples,
                )
            )
        elif name == "gradcam++":
            if layer not in model.taps():
                raise ValueError(f"no layer {layer!r} in this network; it has {', '.join(model.taps())}")
            title = f"Grad-CAM++ at {layer}"
            used = {"layer": layer, "form": "paper", "target": "sum of the instance's blended logits"}
            explain = gradcam_pp(layer=layer)
            methods.append(
                Method(
                    name,
                    "gradcampp",
                    title,
                    explain,
                    explain,
                    ("gradcampp",),
                    "arbitrary units",
                    False,
                    used,
                    model,
                )
            )
        else:
            raise ValueError(f"method {name!r} is unknown; known are {', '.join(METHODS)}")
    return methods


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
    for batch in _batches(plan, instances, image.shape[-1], memory):
        start = time.perf_counter()
        maps, infos = method.explain(key, predictor, volume, batch, progress=progress)
        seconds = time.perf_counter() - start
        total = sum(info.rows for info in infos)
        for instance, saliency, info in zip(batch, maps, infos, strict=True):
            yield instance, saliency, info, seconds * info.rows / total


def _batches(plan: WindowPlan, instances: Sequence[Instance], channels: int, memory: int) -> Iterator[list[Instance]]:
    batch: list[Instance] = []
    held = 0
    for instance in instances:
        windows = np.flatnonzero((plan.coverage(instance.voxels)[1] > 0).any(1))
        sides = plan.starts[windows].max(0) - plan.starts[windows].min(0) + np.array(plan.window)
        needed = int(np.prod(sides)) * channels * 4 * _COPIES
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
            return seconds / rows
        voxels *= 4
