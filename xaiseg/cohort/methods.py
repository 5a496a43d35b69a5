"""The methods that a run can use: an explainer with its name, unit and cost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from xaiseg._types import Explainer, Instance
from xaiseg.inference import WindowPlan
from xaiseg.models import Model
from xaiseg.saliency import AGGREGATORS, gradcam_pp, smoothgrad
from xaiseg.saliency.rows import count_rows, window_groups


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

    name: as the user gives it. key: in file names and columns. title: in pictures. names: of the map's channels.
    signed: whether values may be negative. once: `explain` with one noise sample, whose rows are timed for the plan.
    settings: what the result depends on, for the records. aggregate: of the rows, None if it has no rows.
    """

    name: str
    key: str
    title: str
    explain: Explainer
    once: Explainer
    names: tuple[str, ...]
    unit: str
    signed: bool
    aggregate: str | None = None
    samples: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    def work(self, plan: WindowPlan, instance: Instance) -> tuple[int, int]:
        """Backward passes per sample that an instance takes, and the windows it lies in."""
        groups = list(window_groups(plan, instance))
        windows = len({w for group in groups for w in group.windows.tolist()})
        return (count_rows(groups, AGGREGATORS[self.aggregate]()) if self.aggregate else windows), windows


def build_methods(model: Model, settings: Settings) -> list[Method]:
    """The methods that `settings` name. Raises ValueError for unknown ones, unknown aggregators or taps."""
    for name in settings.methods:
        if name not in METHODS:
            raise ValueError(f"method {name!r} is unknown; known are {', '.join(METHODS)}")
    if settings.layer is not None and settings.layer not in model.taps():
        raise ValueError(f"no layer {settings.layer!r} in this network; it has {', '.join(model.taps())}")
    return [METHODS[name](model, settings) for name in settings.methods]


def _smoothgrad(model: Model, settings: Settings) -> Method:
    channels = model.spec.channels
    reference = channels.index("FLAIR") if "FLAIR" in channels else 0
    samples = settings.samples if settings.noise > 0 else 1
    make = partial(
        smoothgrad,
        noise=settings.noise,
        aggregate=settings.aggregate,
        chunk=settings.chunk,
        memory=settings.memory,
        reference_channel=reference,
    )
    how = settings.aggregate.replace("signed_max", "signed maximum")
    return Method(
        name="smoothgrad",
        key="smoothgrad",
        title=f"SmoothGrad, {how}, {samples} sample{'s' * (samples > 1)}",
        explain=make(samples=samples),
        once=make(samples=1),
        names=channels,
        unit="Δlogit per unit of normalised intensity",
        signed=True,
        aggregate=settings.aggregate,
        samples=samples,
        settings={
            "aggregate": settings.aggregate,
            "samples": samples,
            "noise": settings.noise,
            "noise_reference_channel": channels[reference],
            "seed": settings.seed,
        },
    )


def _gradcam_pp(model: Model, settings: Settings) -> Method:
    layer = settings.layer or model.spec.default_layer
    explain = gradcam_pp(layer=layer)
    return Method(
        name="gradcam++",
        key="gradcampp",
        title=f"Grad-CAM++ at {layer}",
        explain=explain,
        once=explain,
        names=("gradcampp",),
        unit="arbitrary units",
        signed=False,
        settings={"layer": layer, "form": "paper", "target": "sum of the instance's blended logits"},
    )


METHODS: dict[str, Callable[[Model, Settings], Method]] = {"smoothgrad": _smoothgrad, "gradcam++": _gradcam_pp}
