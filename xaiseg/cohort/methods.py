"""The methods that a run can use: an explainer with its name, unit and cost."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from xaiseg._types import Explainer, Instance
from xaiseg.inference import StitchedPredictor
from xaiseg.inference.devices import device_mesh
from xaiseg.models import Model
from xaiseg.saliency import (
    AGGREGATORS,
    BASELINES,
    Baseline,
    gradcam,
    gradcam_pp,
    guided_backprop,
    hirescam,
    input_gradient,
    integrated_gradients,
    jacobian_rows,
    layercam,
    noisy,
    normal_appearing_white_matter,
    occlusion,
    occlusion_passes,
    smooth_integrated_gradients,
    times_input,
)
from xaiseg.saliency.schedule import Geometry, passes, portions


@dataclass(frozen=True)
class Settings:
    """Options of `explain`; a method uses those that concern it.

    methods: names in `METHODS`. aggregate: of Jacobian rows, in `saliency.AGGREGATORS`. target: in `saliency.TARGETS`.
    samples, noise, tolerance, seed: see `saliency.noisy`. layers: taps of class-activation maps, the model's default if none.
    form, derivatives, region: see `saliency.gradcam_pp`. baseline, steps: see `saliency.integrated_gradients`.
    patch, margin: see `saliency.occlusion`. precision: of the network while it explains, `precision.PRECISIONS`.
    devices: how many to use; None for all of an accelerator, one on CPU.
    chunk, memory (bytes): bound the work at once and do not change the result.
    """

    methods: tuple[str, ...] = ("smoothgrad",)
    aggregate: str = "signed_max"
    target: str = "logit"
    samples: int = 50
    noise: float = 0.05
    tolerance: float | None = None
    layers: tuple[str, ...] = ()
    form: str = "paper"
    derivatives: str = "closed_form"
    region: str = "instance"
    baseline: str = "zero"
    steps: int = 50
    patch: int = 8
    margin: int = 16
    seed: int = 0
    precision: str = "float32"
    devices: int | None = None
    chunk: int | None = None
    memory: int | None = None


Cost = Callable[[StitchedPredictor, tuple[int, ...], Instance], tuple[int, int]]
"""Passes through one window that an instance takes per sample, in a volume of this shape, and the windows it lies in."""


@dataclass(frozen=True)
class Method:
    """One method ready to run.

    name: as the user gives it. key: in file names and columns. title: in pictures. names: of the map's channels.
    signed: whether values may be negative. once: what is timed for the plan, one sample or step of `explain`.
    settings: what the result depends on, for the records. samples: noise samples, at most. extra: figures in `Info.extra`.
    copies: float32 numbers that are kept for each number of a map while it is computed: the aggregator's state, the sample's own,
    moments. spreads: whether its passes are spread over several devices.
    """

    name: str
    key: str
    title: str
    explain: Explainer
    once: Explainer
    names: tuple[str, ...]
    unit: str
    signed: bool
    cost: Cost
    samples: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    copies: int = 5
    spreads: bool = True


# What an option other than its default is for; the others concern every method, or every one with rows or noise.
_CONCERNS = {
    "tolerance": ("smoothgrad", "smoothgrad-squared", "vargrad", "smooth-integrated-gradients"),
    "layers": ("gradcam", "gradcam++", "hirescam", "layercam"),
    "region": ("gradcam", "gradcam++", "hirescam", "layercam"),
    "form": ("gradcam++",),
    "derivatives": ("gradcam++",),
    "baseline": ("integrated-gradients", "smooth-integrated-gradients", "occlusion"),
    "steps": ("integrated-gradients", "smooth-integrated-gradients"),
    "patch": ("occlusion",),
    "margin": ("occlusion",),
}


def build_methods(model: Model, settings: Settings) -> list[Method]:
    """The methods that `settings` name. Raises ValueError for unknown ones, unknown aggregators or taps, options that clash."""
    for name in settings.methods:
        if name not in METHODS:
            raise ValueError(f"method {name!r} is unknown; known are {', '.join(METHODS)}")
    for option, concerned in _CONCERNS.items():
        if getattr(settings, option) != getattr(Settings, option) and not set(concerned) & set(settings.methods):
            name = "layer" if option == "layers" else option
            raise ValueError(
                f"--{name} has no effect on {', '.join(settings.methods)}; it is for {', '.join(concerned)}"
            )
    if settings.tolerance is not None and (settings.noise == 0 or settings.samples < 2):
        raise ValueError("--tolerance needs noise and at least 2 --samples")
    for layer in settings.layers:
        if layer not in model.taps():
            raise ValueError(f"no layer {layer!r} in this network; it has {', '.join(model.taps())}")
    return [METHODS[name](name, model, settings) for name in settings.methods]


def build_predictor(model: Model, settings: Settings, whole_volume: bool) -> StitchedPredictor:
    """What the methods explain: the model's prediction at the precision and on the devices that are asked for.

    Raises ValueError for more devices than there are.
    """
    devices = settings.devices or (1 if jax.default_backend() == "cpu" else len(jax.local_devices()))
    try:
        mesh = device_mesh(devices) if devices > 1 else None
    except ValueError as error:
        raise ValueError(f"--devices {devices}: {error}") from error
    return StitchedPredictor.of(replace(model, precision=settings.precision), whole_volume=whole_volume, mesh=mesh)


def _unit(settings: Settings) -> str:
    return f"Δ{settings.target.replace('_', '-')} per unit of normalised intensity"


def _row_cost(linear: bool, times: int = 1) -> Cost:
    def cost(predictor: StitchedPredictor, shape: tuple[int, ...], instance: Instance) -> tuple[int, int]:
        plan = predictor.plan(shape)
        geometry = Geometry.of(plan, predictor.fitted(plan).local_fn)
        ((rows, windows),) = passes(portions(geometry, [instance]), 1, linear)
        return rows * times, windows

    return cost


def _window_cost(predictor: StitchedPredictor, shape: tuple[int, ...], instance: Instance) -> tuple[int, int]:
    ((_, windows),) = passes(portions(Geometry.of(predictor.plan(shape), None), [instance]), 1, linear=False)
    return windows, windows


def _reference_channel(model: Model) -> int:
    channels = model.spec.channels
    return channels.index("FLAIR") if "FLAIR" in channels else 0


def _noise(model: Model, settings: Settings) -> dict[str, Any]:
    """What a noisy method's result depends on."""
    return {
        "samples": settings.samples if settings.noise > 0 else 1,
        "noise": settings.noise,
        "noise_reference_channel": model.spec.channels[_reference_channel(model)],
        "tolerance": settings.tolerance,
        "seed": settings.seed,
    }


def _rows_of(settings: Settings) -> Explainer:
    if settings.aggregate not in AGGREGATORS:
        raise ValueError(f"aggregate is {settings.aggregate!r}, known are {', '.join(AGGREGATORS)}")
    aggregator = AGGREGATORS[settings.aggregate]()
    return jacobian_rows(aggregator, target=settings.target, chunk=settings.chunk, memory=settings.memory)


def _copies(settings: Settings) -> int:
    """See `Method`: of rows."""
    state = jax.eval_shape(lambda: AGGREGATORS[settings.aggregate]().init((1, 1, 1, 1)))
    return 3 + sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)


def _how(settings: Settings) -> str:
    return settings.aggregate.replace("signed_max", "signed maximum").replace("_", " ")


_STATISTICS = {
    "smoothgrad": ("mean", "SmoothGrad"),
    "smoothgrad-squared": ("squared", "SmoothGrad²"),
    "vargrad": ("variance", "VarGrad"),
}


def _noisy_rows(name: str, model: Model, settings: Settings) -> Method:
    statistic, title = _STATISTICS[name]
    base, samples = _rows_of(settings), settings.samples if settings.noise > 0 else 1
    explain = noisy(
        base,
        samples=settings.samples,
        noise=settings.noise,
        statistic=statistic,
        reference_channel=_reference_channel(model),
        tolerance=settings.tolerance,
        min_samples=max(2, min(8, settings.samples)),
    )
    unit = _unit(settings)
    up_to = "up to " if settings.tolerance is not None else ""
    return Method(
        name=name,
        key=name.replace("-", ""),
        title=f"{title}, {_how(settings)}, {up_to}{samples} sample{'s' * (samples > 1)}",
        explain=explain,
        once=base,
        names=model.spec.channels,
        unit=unit if statistic == "mean" else f"({unit})²",
        signed=statistic == "mean" and settings.aggregate not in ("positive_max", "l2_norm"),
        cost=_row_cost(AGGREGATORS[settings.aggregate]().linear),
        copies=_copies(settings),
        samples=samples,
        settings={
            "aggregate": settings.aggregate,
            "target": settings.target,
            "statistic": statistic,
            **_noise(model, settings),
        },
        extra=("converged",) if settings.tolerance is not None else (),
    )


def _rows(name: str, model: Model, settings: Settings) -> Method:
    base = _rows_of(settings)
    explain, title, unit = base, "Gradient", _unit(settings)
    if name == "input-x-gradient":
        explain, title, unit = times_input(base), "Input × gradient", f"Δ{settings.target.replace('_', '-')}"
    if name == "guided-backprop":
        explain, title = guided_backprop(base), "Guided backpropagation"
    return Method(
        name=name,
        key=name.replace("-", ""),
        title=f"{title}, {_how(settings)}",
        explain=explain,
        once=explain,
        names=model.spec.channels,
        unit=unit,
        signed=settings.aggregate not in ("positive_max", "l2_norm") or name == "input-x-gradient",
        cost=_row_cost(AGGREGATORS[settings.aggregate]().linear),
        copies=_copies(settings),
        settings={"aggregate": settings.aggregate, "target": settings.target},
    )


def _baseline(model: Model, settings: Settings) -> Baseline:
    if settings.baseline not in BASELINES:
        raise ValueError(f"baseline is {settings.baseline!r}, known are {', '.join(BASELINES)}")
    if settings.baseline == "nawm":
        if "T1w" not in model.spec.channels:
            raise ValueError(f"baseline nawm needs a channel T1w; this model has {', '.join(model.spec.channels)}")
        return normal_appearing_white_matter(model.spec.channels.index("T1w"))
    return BASELINES[settings.baseline]()


def _paths(name: str, model: Model, settings: Settings) -> Method:
    base = input_gradient(target=settings.target, memory=settings.memory)
    baseline = _baseline(model, settings)
    smooth = name == "smooth-integrated-gradients"
    title = f"Integrated gradients from {settings.baseline}, {settings.steps} steps"
    kept: dict[str, Any] = {"target": settings.target, "baseline": settings.baseline, "steps": settings.steps}
    samples = 1
    explain = integrated_gradients(base, baseline=baseline, steps=settings.steps)
    if smooth:
        samples = settings.samples if settings.noise > 0 else 1
        explain = smooth_integrated_gradients(
            base,
            samples=settings.samples,
            noise=settings.noise,
            baseline=baseline,
            steps=settings.steps,
            reference_channel=_reference_channel(model),
            tolerance=settings.tolerance,
            min_samples=max(2, min(8, settings.samples)),
        )
        title, kept = f"Smoothed {title[0].lower()}{title[1:]}, {samples} samples", {**kept, **_noise(model, settings)}
    return Method(
        name=name,
        key=name.replace("-", ""),
        title=title,
        explain=explain,
        once=base,
        names=model.spec.channels,
        unit=f"{settings.target.replace('_', '-')}, summed over the lesion",
        signed=True,
        cost=_row_cost(linear=True, times=settings.steps),
        samples=samples,
        settings=kept,
        extra=("converged",) if smooth and settings.tolerance is not None else (),
    )


def _activation_maps(name: str, model: Model, settings: Settings) -> Method:
    layers = settings.layers or (model.spec.default_layer,)
    common: dict[str, Any] = {"layer": layers, "target": settings.target, "region": settings.region}
    title = {"gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++", "hirescam": "HiResCAM", "layercam": "LayerCAM"}[name]
    extra: tuple[str, ...] = ()
    if name == "gradcam++":
        common |= {"form": settings.form, "derivatives": settings.derivatives}
        explain = gradcam_pp(**common)
        title += "" if settings.form == "paper" else f" ({settings.form})"
        extra = ("alpha_near_zero", "alpha_undefined")
        extra += ("closed_form_difference",) if settings.derivatives == "exact" else ()
    else:
        explain = {"gradcam": gradcam, "hirescam": hirescam, "layercam": layercam}[name](**common)
    key = name.replace("++", "pp")
    return Method(
        name=name,
        key=key,
        title=f"{title} at {', '.join(layers)}{' of the class' if settings.region == 'class' else ''}",
        explain=explain,
        once=explain,
        names=layers if len(layers) > 1 else (key,),
        unit="arbitrary units",
        signed=False,
        cost=_window_cost,
        spreads=False,
        settings={**common, "layer": layers[0] if len(layers) == 1 else layers},
        extra=extra,
    )


def _occlusion(name: str, model: Model, settings: Settings) -> Method:
    options: dict[str, Any] = {"patch": settings.patch, "margin": settings.margin}
    common: dict[str, Any] = {
        "baseline": _baseline(model, settings),
        "target": settings.target,
        "chunk": settings.chunk,
    }
    explain = occlusion(**options, **common)

    def cost(predictor: StitchedPredictor, shape: tuple[int, ...], instance: Instance) -> tuple[int, int]:
        return occlusion_passes(predictor, shape, instance, **options), _window_cost(predictor, shape, instance)[1]

    return Method(
        name=name,
        key=name,
        title=f"Occlusion, {settings.patch}³ voxels by {settings.baseline}",
        explain=explain,
        once=occlusion(**{**options, "margin": 0}, **common),
        names=model.spec.channels,
        unit=f"Δ{settings.target.replace('_', '-')}",
        signed=True,
        cost=cost,
        settings={**options, "target": settings.target, "baseline": settings.baseline},
    )


METHODS: dict[str, Callable[[str, Model, Settings], Method]] = {
    "smoothgrad": _noisy_rows,
    "smoothgrad-squared": _noisy_rows,
    "vargrad": _noisy_rows,
    "gradient": _rows,
    "input-x-gradient": _rows,
    "guided-backprop": _rows,
    "integrated-gradients": _paths,
    "smooth-integrated-gradients": _paths,
    "gradcam": _activation_maps,
    "gradcam++": _activation_maps,
    "hirescam": _activation_maps,
    "layercam": _activation_maps,
    "occlusion": _occlusion,
}
