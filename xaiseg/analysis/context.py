"""How much of a lesion's surroundings the network needs: everything farther from it than a distance is taken away, step by step.

The dilation experiment of Spagnolo et al., Scientific Reports 2026, with distances in mm, so that voxels may have any size. There:
steps of one voxel of 1 mm with an 18-connected element, lesions of 91 to 119 voxels that were found (TP).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import ndimage

from xaiseg._types import Instance, Progress
from xaiseg.analysis.altered import Altered, Box, altered_logits
from xaiseg.analysis.crossing import crossing_interval, mean_intervals
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor

DISTANCES_MM = tuple(float(d) for d in range(35))
DETECTED = (0.5, 0.9)
LEVEL_OFF = 0.95
_TOLERANCE = 1e-3  # mm; headers in float32 give voxel sizes such as 1.0000002

CONTEXT_COLUMNS = {
    "distance_mm": "The image is kept within this distance of the lesion, centre to centre of voxels; inf: all of it",
    "mean_probability": "Mean lesion probability over the lesion's voxels",
    "max_probability": "Largest lesion probability in the lesion",
    "mean_logit": "Mean logit of the lesion class over the lesion's voxels",
    "detected": "1 where at least one voxel of the lesion is segmented, else 0",
}


@dataclass(frozen=True, eq=False)
class ContextCurve:
    """One lesion, `K` distances from it, and last the untouched image: arrays `(K + 1,)`.

    distance_mm: rising, the last infinite. The others: see `CONTEXT_COLUMNS`. passes: of one image through one window or tile.
    """

    label: int
    distance_mm: np.ndarray
    mean_probability: np.ndarray
    max_probability: np.ndarray
    mean_logit: np.ndarray
    detected: np.ndarray
    passes: int


def context_curves(
    predictor: StitchedPredictor,
    image: Array | np.ndarray,
    spacing: Sequence[float],
    instances: Sequence[Instance],
    *,
    distances_mm: Sequence[float] = DISTANCES_MM,
    threshold: float | None,
    background: float | Sequence[float] = 0.0,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Iterator[ContextCurve]:
    """The curve of each lesion, one after another as they are done.

    For each distance `d` all voxels farther than `d` from the nearest voxel of the lesion are set to the background, and the
    network segments what is left: `d = 0` keeps the lesion alone. Scores equal those of `predictor(dilated image)` to float32's
    rounding; only windows that hold voxels of the lesion are computed, and each once while nothing new appears in it.
    Beware: the edge of what is kept is something to see too, and 0 is the brain's mean after z-scoring, not an absence. A lesion
    alone on it may well be found, and found less where more is kept.

    image: `(X, Y, Z, C)` as the network takes it. spacing: mm of a voxel along each axis. instances: lesions on the image's grid.
    distances_mm: rising. threshold: a lesion is detected where the probability of any of its voxels exceeds it (rule `overlap`; a
      smallest size of components, which would need the network's answer around the lesion, is not asked for); None: where
      the lesion class is the most probable.
    background: of the normalised image, one number or one per channel; 0 is what z-scoring over non-zero voxels leaves.
    chunk: images evaluated together, by default 1 on CPU and 8 elsewhere. progress: told of finished passes.
    Raises InputError for distances that are not rising from 0 or more, a background or spacing of the wrong length.

    >>> predictor = StitchedPredictor(lambda x: jnp.concatenate([-x, x], -1), (4, 4, 4))
    >>> lesion = Instance(1, np.array([[2, 2, 2]], np.int32))
    >>> (curve,) = context_curves(predictor, np.ones((4, 4, 4, 1), np.float32), (1, 1, 1), [lesion], threshold=0.5)
    >>> curve.mean_logit[:3].tolist(), curve.passes  # from 3.5 mm on nothing new appears
    ([1.0, 1.0, 1.0], 5)
    """
    steps = _checked_steps(distances_mm)
    size = np.asarray(spacing, float)
    if size.shape != (3,) or not (size > 0).all():
        raise InputError(f"context: spacing is {spacing}, expected three positive lengths in mm: take the grid's")
    channels = image.shape[-1]
    value = np.asarray(background, float)
    if value.shape not in ((), (channels,)):
        raise InputError(
            f"context: {value.size} background values for {channels} channels: give one, or one per channel"
        )
    value = np.broadcast_to(value, channels).astype(image.dtype)
    on_host = np.asarray(image)
    seen = (on_host != value).any(-1)
    count = len(steps) + 1
    parameters = (np.arange(count, dtype=np.int32), np.tile(value, (count, 1)))
    for instance in instances:
        first = _first_step(instance, image.shape, size, steps)

        def kept(box: Box, first: np.ndarray = first) -> np.ndarray:
            """How much that is no background is kept in a box: images are nested, so equal counts are equal images."""
            return np.bincount(first[box][seen[box]], minlength=count).cumsum()

        altered = Altered(_keep, (image, first[..., None]), parameters, kept)
        logits, passes = altered_logits(predictor, altered, instance.voxels, chunk=chunk, progress=progress)
        yield ContextCurve(
            instance.label, np.append(steps, np.inf), *scores(predictor, logits, threshold), passes=passes
        )


def scores(
    predictor: StitchedPredictor, logits: np.ndarray, threshold: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of logits `(K, n, classes)` of a lesion's voxels: mean and largest probability, mean logit of its class, and whether any
    voxel is segmented; `(K,)` each."""
    probability = np.asarray(predictor.probability(jnp.asarray(logits)))
    segmented = probability > threshold if threshold is not None else predictor.most_probable(jnp.asarray(logits))
    logit = logits[..., predictor.target_class]
    return (
        probability.mean(1, dtype=np.float64),
        probability.max(1),
        logit.mean(1, dtype=np.float64),
        np.any(np.asarray(segmented), axis=1),
    )


def context_rows(curve: ContextCurve, **lesion: Any) -> list[dict[str, Any]]:
    """Rows of `CONTEXT_COLUMNS`, one per distance, behind the columns `lesion`, such as case, patient, and volume."""
    columns = {name: getattr(curve, name).tolist() for name in CONTEXT_COLUMNS}
    columns["detected"] = curve.detected.astype(int).tolist()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{**lesion, "lesion": curve.label, **row} for row in rows]


def context_summary(
    curves: Sequence[ContextCurve],
    patients: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """Rows `measure, distance_mm, estimate, low, high, lesions, patients` of all lesions, each of equal weight.

    `detection_rate` and `mean_probability` at each distance. `detected_50_mm` and `detected_90_mm`: the distance from which on that
    share of lesions is detected. `level_off_mm`: from which on the mean probability is at least 95 % of that in the untouched
    image. Places between two steps are taken on a line; NaN where the last step is not there. Curves need not rise with distance:
    look at them, not at these numbers alone.
    low, high: percentile intervals from resampling patients, each with all lesions; infinite where they lie beyond the last step.

    patients: of each curve. Raises InputError for no curves, or curves of different distances.
    """
    if not curves or len(curves) != len(patients):
        raise InputError(
            f"context: {len(curves)} lesions and {len(patients)} patients, expected one patient for each of at least one lesion: "
            "choose lesions that exist"
        )
    distances = curves[0].distance_mm
    if any(not np.array_equal(c.distance_mm, distances) for c in curves):
        raise InputError("context: lesions have different distances, expected the same for all: summarise them apart")
    steps = distances[:-1]
    detected = np.stack([c.detected for c in curves]).astype(float)
    probability = np.stack([c.mean_probability for c in curves])
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "level": level}
    counted = {"lesions": len(curves), "patients": len(set(patients))}
    rows: list[dict[str, Any]] = []
    for measure, values in (("detection_rate", detected), ("mean_probability", probability)):
        for distance, found in zip(distances.tolist(), mean_intervals(values, patients, **options), strict=True):
            rows.append({"measure": measure, "distance_mm": distance, **_ends(found[:3]), **counted})
    places = [(f"detected_{100 * at:g}_mm", detected[:, :-1], at, False) for at in DETECTED]
    for measure, values, at, relative in [*places, ("level_off_mm", probability, LEVEL_OFF, True)]:
        ends = crossing_interval(steps, values, patients, at, relative=relative, **options)
        rows.append({"measure": measure, "distance_mm": None, **_ends(ends), **counted})
    return rows


def _ends(found: Sequence[float]) -> dict[str, float]:
    return dict(zip(("estimate", "low", "high"), map(float, found), strict=True))


def _checked_steps(distances_mm: Sequence[float]) -> np.ndarray:
    steps = np.asarray(distances_mm, float)
    if steps.ndim != 1 or not len(steps) or not np.isfinite(steps).all() or steps[0] < 0 or (np.diff(steps) <= 0).any():
        raise InputError(
            f"context: distances are {', '.join(map(str, distances_mm)) or 'none'} mm, expected rising numbers from 0 or more: "
            "give some such as 0, 1, 2, 3"
        )
    return steps


def _first_step(instance: Instance, shape: Sequence[int], spacing: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """From which step on each voxel `(X, Y, Z)` is kept, int32; the number of steps where none keeps it."""
    first = np.full(shape[:3], len(steps), np.int32)
    reach = np.ceil(steps[-1] / spacing).astype(int) + 1
    low = np.maximum(instance.voxels.min(0) - reach, 0)
    high = np.minimum(instance.voxels.max(0) + 1 + reach, shape[:3])
    outside = np.ones(high - low, bool)
    outside[tuple((instance.voxels - low).T)] = False
    distance = ndimage.distance_transform_edt(outside, sampling=spacing)
    first[tuple(map(slice, low, high))] = np.searchsorted(steps + _TOLERANCE, distance)
    return first


def _keep(step: tuple[Array, Array], image: Array, first: Array) -> Array:
    """The image where it is kept at this step, else the background."""
    number, background = step
    return jnp.where(first <= number, image, jnp.asarray(background)[None, None, None])
