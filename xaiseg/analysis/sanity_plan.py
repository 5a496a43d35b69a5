"""What a comparison of explainers will take: passes through a window, forward and back, and minutes."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xaiseg._types import Instance, SaliencyMap
from xaiseg.analysis.named_explainers import Named
from xaiseg.analysis.sanity import SanityCase, SanitySettings
from xaiseg.cohort.explaining import seconds_per_row
from xaiseg.cohort.plan import duration
from xaiseg.inference import StitchedPredictor
from xaiseg.metrics.instance_score import box_around, score_passes
from xaiseg.metrics.perturbation import deletion
from xaiseg.metrics.replacement import Replacement


class Work(NamedTuple):
    """Of some lesions. forward: passes of altered images, by what alters them (the name of a replacement, `noise`, `patches`).
    back: passes of each explainer, by name."""

    forward: dict[str, int]
    back: dict[str, int]

    def with_more(self, other: "Work") -> "Work":
        """That of other lesions too, for the same measures and explainers."""
        return Work(*({k: n + b[k] for k, n in a.items()} for a, b in zip(self, other, strict=True)))


def work_of(
    predictor: StitchedPredictor,
    case: SanityCase,
    explainers: Sequence[Named],
    settings: SanitySettings,
    layers: int,
) -> Work:
    """The passes that `sanity` takes for a case, but for the other lesions of `random_instance`. layers: of the network."""
    curves = [
        f"{kind}_{name}"
        for kind in ("deletion", "insertion")
        if kind in settings.measures
        for name in settings.replacements
    ]
    each = {name: 2 + (len(settings.fractions) - 2) * (len(explainers) + settings.orders) for name in curves}
    each |= {m: 1 + settings.samples for m in ("infidelity", "faithfulness_correlation") if m in settings.measures}
    times = explanations(settings, layers)
    forward, back = dict.fromkeys(each, 0), {e.name: 0 for e in explainers if e.method is not None}
    for instance in case.instances:
        windows = score_passes(predictor, case.image.shape, instance)
        forward = {name: count + each[name] * windows for name, count in forward.items()}
        for explainer in explainers:
            if (method := explainer.method) is not None:
                rows, _ = method.cost(predictor, case.image.shape, instance)
                back[explainer.name] += rows * method.samples * times
    return Work(forward, back)


def explanations(settings: SanitySettings, layers: int) -> int:
    """How often each explainer explains a lesion."""
    steps = 1 + min(settings.steps or layers, layers)
    counts = {"max_sensitivity": 1 + settings.radius_samples, "randomisation": steps}
    counts |= {"smooth_randomisation": steps * settings.smooth_samples}
    return 1 + sum(count for measure, count in counts.items() if measure in settings.measures)


def plan_lines(
    predictor: StitchedPredictor, case: SanityCase, explainers: Sequence[Named], settings: SanitySettings, work: Work
) -> list[str]:
    """What is about to be done, and how long it will take, measured on the first lesion of a case."""
    instance, image = case.instances[0], jnp.asarray(case.image)
    windows = score_passes(predictor, image.shape, instance)
    lines, total = [], 0.0
    if work.forward:
        seconds = {
            name: _seconds_per_image(predictor, image, instance, settings, replacement) / windows
            for name, replacement in settings.replacements.items()
            if any(measure.endswith(f"_{name}") for measure in work.forward)
        } or {"nothing": _seconds_per_image(predictor, image, instance, settings, None) / windows}
        for measure, count in work.forward.items():
            filled = next((s for name, s in seconds.items() if measure.endswith(f"_{name}")), min(seconds.values()))
            total += count * filled
        each = ", ".join(f"{1e3 * s:.3g} ms each filled by {name}" for name, s in seconds.items())
        lines.append(f"  altered images: {sum(work.forward.values()):,} windows, {each}")
    for explainer in explainers:
        if explainer.method is not None:
            one = seconds_per_row(explainer.method, predictor, np.asarray(case.image), instance)
            total += work.back[explainer.name] * one
            lines.append(f"  {explainer.name}: {work.back[explainer.name]:,} passes, {1e3 * one:.3g} ms each")
    return [*lines, f"  estimated time {duration(total)} on {jax.devices()[0].device_kind}, and what compiling takes"]


def _seconds_per_image(
    predictor: StitchedPredictor,
    image: jax.Array,
    instance: Instance,
    settings: SanitySettings,
    replacement: Replacement | None,
) -> float:
    """Seconds for the score of an image with part of the lesion's surroundings replaced, measured when it is compiled."""
    anything = [SaliencyMap(np.zeros_like(image), (0, 0, 0))]
    region = box_around(instance, image.shape, settings.margin)
    for fractions in ((0.0, 0.5, 1.0), (0.0, 0.1, 0.3, 0.6, 1.0)):
        begun = time.perf_counter()
        deletion(
            jax.random.key(0), predictor, image, instance, anything,
            replacement=replacement, region=region, fractions=fractions, orders=1, chunk=settings.chunk,
        )  # fmt: skip
    return (time.perf_counter() - begun) / (2 + 3 * 2)
