"""Can explanations be trusted? A table that compares explainers on the same lesions, by the measures of `metrics`."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import Explainer, Instance, SaliencyMap
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor
from xaiseg.metrics import bootstrap_interval, resample_weights, sum_by_patient
from xaiseg.metrics.instance_score import box_around
from xaiseg.metrics.localisation import leakage, localisation
from xaiseg.metrics.perturbation import FRACTIONS, PerturbationCurve, RankBy, deletion, insertion
from xaiseg.metrics.randomisation import parameter_randomisation, smooth_parameter_randomisation
from xaiseg.metrics.replacement import Replacement, by_baseline, noisy_linear
from xaiseg.metrics.sensitivity import faithfulness_correlation, infidelity, max_sensitivity
from xaiseg.metrics.similarity import instance_similarity
from xaiseg.models import Model
from xaiseg.saliency.baselines import Baseline, blur, zero

MEASURES = {
    "deletion": "Area under S/S(x) while the highest of the map is replaced first; below the control is better",
    "insertion": "Area under S/S(x) while the highest of the map is brought back first; above the control is better",
    "infidelity": "Share of the score's changes under noise that the map does not foretell; 0 is best, 1 as good as no map",
    "faithfulness_correlation": "Pearson's r of sums of the map over random voxels with the score they take along",
    "max_sensitivity": "Largest relative change of the map under small noise; small is better, and 0 where a map ignores the image",
    "localisation": "Mass and rank accuracy, pointing game: what of the map lies in its lesion",
    "leakage": "Share of the map's mass in lesions that lies in other lesions",
    "random_instance": "Spearman's ρ with the map of the nearest other lesion; a high one does not tell lesions apart",
    "randomisation": "What is left of a map when the network is random: ρ and SSIM, near 0 is better; the rise of its entropy",
    "smooth_randomisation": "The same of maps averaged over noise",
}

# Patients without whom no verdict is given: of five, all lie on one side of a limit by chance alone in one of 16 draws.
FEWEST = 6


class SanityCase(NamedTuple):
    """A scan and the lesions of it that are explained.

    image: `(X, Y, Z, C)`, normalised. spacing: of its voxels, mm. patient: whose it is, by default the case's own.
    others: more lesions of the scan, which are not measured: `leakage` and `random_instance` need some besides the measured one.
    """

    name: str
    image: Array | np.ndarray
    instances: Sequence[Instance]
    spacing: Sequence[float] = (1.0, 1.0, 1.0)
    patient: str | None = None
    others: Sequence[Instance] = ()


@dataclass(frozen=True)
class SanitySettings:
    """What is measured, and how; lengths in voxels but for `tolerance_mm`.

    margin: deletion, insertion, faithfulness correlation and randomisation look at the lesion's bounding box and so many voxels
      around it, the same for every explainer. replacements: of deletion and insertion, by name. baseline: of the faithfulness
      correlation. samples: of noise and of subsets. The rest are arguments of the measures by these names.
    """

    measures: Sequence[str] = tuple(MEASURES)
    margin: int = 16
    replacements: Mapping[str, Replacement] = field(
        default_factory=lambda: {"blur": by_baseline(blur()), "road": noisy_linear()}
    )
    fractions: Sequence[float] = FRACTIONS
    rank_by: RankBy = "signed"
    orders: int = 5
    samples: int = 50
    noise: float = 0.05
    baseline: Baseline = field(default_factory=zero)
    fraction: float = 0.1
    patch: int | Sequence[int] = 4
    radius: float = 0.01
    radius_samples: int = 5
    tolerance_mm: float = 0.0
    steps: int | None = None
    smooth_samples: int = 10
    resamples: int = 2000
    chunk: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown or not self.measures:
            raise InputError(f"measures: {', '.join(unknown) or 'none'}; known are {', '.join(MEASURES)}")
        if self.samples < 2:
            raise InputError(f"samples is {self.samples}, expected at least 2, so that something can vary")
        if self.margin < 0:
            raise InputError(f"margin is {self.margin} voxels, expected at least 0")


class Sanity(NamedTuple):
    """rows: for each explainer, lesion and measure. summary: for each explainer and measure. curves: behind areas and cascades.

    All are lists of flat dicts of strings, numbers and None, or lists of numbers, as JSON takes them; None stands where a measure
    is not defined.
    """

    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    curves: list[dict[str, Any]]


def sanity(
    key: Array,
    model: Model,
    cases: Iterable[SanityCase],
    explainers: Mapping[str, Explainer],
    settings: SanitySettings | None = None,
    *,
    predictor_of: Callable[[Model], StitchedPredictor] = StitchedPredictor.of,
    progress: Callable[[str, str], Any] | None = None,
) -> Sanity:
    """Measure each explainer on each lesion. Explainers share perturbations, random orders, random weights and noise of a lesion.

    key: folded with the number of the case. Lesions of a case do not change each other's values, but for `leakage` and
    `random_instance`, which are about that. predictor_of: how a model is applied. progress: told the case and what was measured.

    Rows have `case, patient, lesion, voxels, explainer, measure, value`, and for areas `control`, the mean of random orders,
    `control_sd` and `gain`: by how much the area is better than the control (smaller for deletion, larger for insertion).
    `…_drop` is the area of `S(x) - S(x^(k))`, in logits, which lesions with a negative score have too. Summary: `summarise_sanity`.

    Raises InputError where there is no explainer or no lesion at all.
    """
    settings = settings or SanitySettings()
    if not explainers:
        raise InputError("no explainer was given, so there is nothing to compare")
    predictor = predictor_of(model)
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        if not case.instances:
            continue
        work = _Case(jax.random.fold_in(key, number), model, predictor, predictor_of, case, explainers, settings)
        for measure in settings.measures:
            for row, curve in work.measure(measure):
                rows.append(row)
                if curve is not None:
                    curves.append(curve)
            if progress is not None:
                progress(case.name, measure)
    if not rows:
        raise InputError(
            "no case has a lesion, so there is nothing to measure: lower the threshold or the smallest size"
        )
    return Sanity(rows, summarise_sanity(rows, settings.resamples, settings.samples), curves)


def summarise_sanity(
    rows: Sequence[Mapping[str, Any]], resamples: int = 2000, samples: int = SanitySettings.samples
) -> list[dict[str, Any]]:
    """A row for each explainer and measure, in the order of `rows`, of the lesions where it is defined: `lesions`, `patients`,
    the mean with its 95 % bootstrap interval over patients (none for fewer than two), median, smallest and largest; for areas the
    mean gain with its interval.

    limit, verdict: where a map that knows nothing is at a known place, see `limit_of`, the interval `passes` if it lies on the good
    side of it, `fails` if on the other, and is else `unclear`; None for fewer than `FEWEST` patients. samples: of the infidelity.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["explainer"], row["measure"]), []).append(row)
    found = []
    for (explainer, measure), members in groups.items():
        values = np.array([row["value"] for row in members if row["value"] is not None])
        summary: dict[str, Any] = {"explainer": explainer, "measure": measure, "lesions": len(values)}
        summary["patients"] = len({row["patient"] for row in members if row["value"] is not None})
        summary |= _interval("mean", "value", members, resamples)
        if len(values):
            summary |= {
                "median": float(np.median(values)),
                "smallest": values.min().item(),
                "largest": values.max().item(),
            }
        else:
            summary |= dict.fromkeys(("median", "smallest", "largest"))
        if any("gain" in row for row in members):
            summary |= _interval("gain", "gain", members, resamples)
        limit = limit_of(measure, samples)
        summary |= {"limit": limit, "verdict": _verdict(summary, limit)}
        found.append(summary)
    return found


def better(measure: str) -> int:
    """1 where more is better, -1 where less is, of the gain for areas; 0 where neither is."""
    if measure.startswith(("deletion", "insertion", "localisation", "faithfulness")) or measure.endswith("_entropy"):
        return 1
    return 0 if measure == "infidelity_logits2" else -1


def limit_of(measure: str, samples: int) -> float | None:
    """Where a measure parts maps that pass from those that do not; None where there is no such place.

    Areas: a gain of 0, that of random orders. Infidelity: `1 - 1/samples`, what its fit leaves to a map that knows nothing.
    Faithfulness correlation: 0. Signed ρ with another lesion's map, or with that of the random network: 1/2, midway between 0,
    chance, and 1, a map that does not change; unsigned ρ and SSIM have none, since sizes fall off with the distance from the lesion
    in any network.
    """
    if measure.startswith(("deletion", "insertion", "faithfulness")):
        return 0.0
    if measure == "infidelity":
        return 1 - 1 / samples
    return 0.5 if measure == "random_instance" or measure.endswith("_signed") else None


def _verdict(summary: Mapping[str, Any], limit: float | None) -> str | None:
    column = "gain" if "gain" in summary else "mean"
    low, high = summary[f"{column}_low"], summary[f"{column}_high"]
    if limit is None or low is None or summary["patients"] < FEWEST:
        return None
    above, below = low > limit, high < limit
    if better(summary["measure"]) < 0:
        above, below = below, above
    return "passes" if above else "fails" if below else "unclear"


def _interval(name: str, column: str, rows: Sequence[Mapping[str, Any]], resamples: int) -> dict[str, float | None]:
    """The mean of a column and its interval; the same resamples for every column of the same patients."""
    known = [row for row in rows if row[column] is not None]
    if not known:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    sums = sum_by_patient(np.array([[row[column], 1.0] for row in known]), [row["patient"] for row in known])
    weights = resample_weights(np.random.default_rng(0), len(sums), resamples)
    interval = bootstrap_interval(lambda s: s[..., 0] / s[..., 1], sums, weights)
    return {
        name: _number(interval.estimate),
        f"{name}_low": _number(interval.low),
        f"{name}_high": _number(interval.high),
    }


_Found = Iterator[tuple[dict[str, Any], dict[str, Any] | None]]


class _Case:
    """The measures of one scan. Every one of them has a key of its own, by its name's place."""

    def __init__(
        self,
        key: Array,
        model: Model,
        predictor: StitchedPredictor,
        predictor_of: Callable[[Model], StitchedPredictor],
        case: SanityCase,
        explainers: Mapping[str, Explainer],
        settings: SanitySettings,
    ) -> None:
        self.key, self.model, self.predictor, self.predictor_of = key, model, predictor, predictor_of
        self.case, self.explainers, self.settings = case, explainers, settings
        self.image = jnp.asarray(case.image)
        self.lesions = [*case.instances, *case.others]
        self.maps: dict[str, list[SaliencyMap]] = self._explained(case.instances)

    def _explained(self, instances: Sequence[Instance]) -> dict[str, list[SaliencyMap]]:
        key = jax.random.fold_in(self.key, len(MEASURES))
        return {
            name: explain(key, self.predictor, self.image, instances)[0] for name, explain in self.explainers.items()
        }

    def measure(self, name: str) -> _Found:
        return getattr(self, f"_{name}")(jax.random.fold_in(self.key, list(MEASURES).index(name)))

    def _row(self, instance: Instance, explainer: str, measure: str, value: float, **more: float) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "patient": self.case.patient or self.case.name,
            "lesion": instance.label,
            "voxels": len(instance.voxels),
            "explainer": explainer,
            "measure": measure,
            "value": _number(value),
            **{column: _number(v) for column, v in more.items()},
        }

    def _curve(self, row: dict[str, Any], **columns: Any) -> dict[str, Any]:
        return {k: row[k] for k in ("case", "lesion", "explainer", "measure")} | columns

    def _lesions(self) -> Iterator[tuple[Instance, list[SaliencyMap], np.ndarray]]:
        """Each instance with its maps by all explainers, and the region that is looked at."""
        for i, instance in enumerate(self.case.instances):
            region = box_around(instance, self.image.shape, self.settings.margin)
            yield instance, [maps[i] for maps in self.maps.values()], region

    def _deletion(self, key: Array) -> _Found:
        return self._areas(key, "deletion", deletion, better=-1)

    def _insertion(self, key: Array) -> _Found:
        return self._areas(key, "insertion", insertion, better=1)

    def _areas(self, key: Array, name: str, of: Callable[..., list[PerturbationCurve]], better: int) -> _Found:
        s = self.settings
        for instance, maps, region in self._lesions():
            finite = {e: m for e, m in zip(self.maps, maps, strict=True) if np.isfinite(np.asarray(m.values)).all()}
            for kind, replacement in s.replacements.items():
                options = {"fractions": s.fractions, "rank_by": s.rank_by, "orders": s.orders, "chunk": s.chunk}
                found = of(
                    key, self.predictor, self.image, instance, list(finite.values()),
                    replacement=replacement, region=region, **options,
                )  # fmt: skip
                by_name = dict(zip(finite, found, strict=True))
                for explainer in self.maps:
                    curve, measure = by_name.get(explainer), f"{name}_{kind}"
                    if curve is None:  # a map that is not finite orders nothing
                        for undefined in (measure, f"{measure}_drop"):
                            yield (
                                self._controlled(instance, explainer, undefined, 0, math.nan, np.full(2, math.nan)),
                                None,
                            )
                        continue
                    row = self._controlled(instance, explainer, measure, better, curve.area, curve.control_areas)
                    yield (
                        row,
                        self._curve(
                            row,
                            fraction=_numbers(curve.fractions),
                            score=_numbers(curve.scores),
                            control_mean=_numbers(curve.control.mean(0)),
                            clean_score=_number(curve.clean),
                        ),
                    )
                    drop = f"{measure}_drop"
                    yield self._controlled(instance, explainer, drop, -better, curve.drop, curve.control_drops), None

    def _controlled(
        self, instance: Instance, explainer: str, measure: str, better: int, value: float, controls: np.ndarray
    ) -> dict[str, Any]:
        """A row with its control. better: 1 where a larger value is better, -1 where a smaller one is."""
        control = float(controls.mean())
        spread = float(controls.std(ddof=1)) if len(controls) > 1 else math.nan
        gain = better * (value - control)
        return self._row(instance, explainer, measure, value, control=control, control_sd=spread, gain=gain)

    def _infidelity(self, key: Array) -> _Found:
        s = self.settings
        for instance, maps, _ in self._lesions():
            found = infidelity(
                key, self.predictor, self.image, instance, maps, samples=s.samples, noise=s.noise, chunk=s.chunk
            )
            for explainer, result in zip(self.maps, found, strict=True):
                yield self._row(instance, explainer, "infidelity", result.relative), None
                yield self._row(instance, explainer, "infidelity_logits2", result.value), None

    def _faithfulness_correlation(self, key: Array) -> _Found:
        s = self.settings
        for instance, maps, region in self._lesions():
            found = faithfulness_correlation(
                key, self.predictor, self.image, instance, maps,
                baseline=s.baseline, region=region, samples=s.samples, fraction=s.fraction, patch=s.patch, chunk=s.chunk,
            )  # fmt: skip
            for explainer, result in zip(self.maps, found, strict=True):
                yield self._row(instance, explainer, "faithfulness_correlation", result.of_map), None
                yield (
                    self._row(instance, explainer, "faithfulness_correlation_times_difference", result.of_attribution),
                    None,
                )

    def _max_sensitivity(self, key: Array) -> _Found:
        s = self.settings
        for name, explain in self.explainers.items():
            found = max_sensitivity(
                key, explain, self.predictor, self.image, self.case.instances, samples=s.radius_samples, radius=s.radius
            )
            for instance, value in zip(self.case.instances, found.tolist(), strict=True):
                yield self._row(instance, name, "max_sensitivity", value), None

    def _localisation(self, key: Array) -> _Found:
        for i, instance in enumerate(self.case.instances):
            for name, maps in self.maps.items():
                found = localisation(
                    maps[i], instance, tolerance_mm=self.settings.tolerance_mm, spacing=self.case.spacing
                )
                for part, value in found._asdict().items():
                    kind = f"mass_{part}" if part in ("positive", "negative", "absolute") else part
                    yield self._row(instance, name, f"localisation_{kind}", value), None

    def _leakage(self, key: Array) -> _Found:
        for i, instance in enumerate(self.case.instances):
            for name, maps in self.maps.items():
                yield self._row(instance, name, "leakage", leakage(maps[i], i, self.lesions)), None

    def _random_instance(self, key: Array) -> _Found:
        centres = np.array([i.voxels.mean(0) for i in self.lesions]) * np.asarray(self.case.spacing)
        away = np.linalg.norm(centres[:, None] - centres, axis=-1) + np.diag(np.full(len(centres), np.inf))
        nearest = away.argmin(1)[: len(self.case.instances)].tolist()
        more = sorted({n for n in nearest if n >= len(self.case.instances)})
        beside = self._explained([self.lesions[n] for n in more]) if more else {}
        for i, instance in enumerate(self.case.instances):
            for name, maps in self.maps.items():
                known = dict(enumerate(maps)) | dict(zip(more, beside.get(name, ()), strict=True))
                rho = instance_similarity(maps[i], known[nearest[i]]) if len(centres) > 1 else math.nan
                yield self._row(instance, name, "random_instance", rho), None

    def _randomisation(self, key: Array) -> _Found:
        return self._cascades(key, "randomisation", parameter_randomisation)

    def _smooth_randomisation(self, key: Array) -> _Found:
        smooth = {"samples": self.settings.smooth_samples, "noise": self.settings.noise}
        return self._cascades(key, "smooth_randomisation", smooth_parameter_randomisation, **smooth)

    def _cascades(self, key: Array, name: str, of: Callable[..., Any], **options: Any) -> _Found:
        s, instances = self.settings, self.case.instances
        for explainer, explain in self.explainers.items():
            found = of(
                key, explain, self.model, self.image, instances,
                steps=s.steps, margin=s.margin, predictor_of=self.predictor_of, **options,
            )  # fmt: skip
            for i, instance in enumerate(instances):
                for part in ("spearman", "signed", "ssim"):
                    course = getattr(found, part)[:, i]
                    row = self._row(instance, explainer, f"{name}_{part}", float(course[-1]))
                    yield row, self._curve(row, layer=list(found.layers), score=_numbers(course))
                yield self._row(instance, explainer, f"{name}_entropy", float(found.complexity[i])), None


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(v) for v in values.tolist()]
