"""A lesion of known place, size and contrast put into a scan: from which contrast on it is found, and what its saliency says.

After the synthetic lesions of Spagnolo et al. (arXiv 2406.09335, v1): in FLAIR alone, in T1w alone, or in both.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import ndimage

from xaiseg._types import Explainer, Progress
from xaiseg.analysis.altered import Altered, altered_logits
from xaiseg.analysis.context import scores
from xaiseg.analysis.crossing import crossing_interval, mean_intervals
from xaiseg.analysis.lesion_shape import LesionShape
from xaiseg.analysis.map_figures import map_figures
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor

DETECTED = (0.5, 0.9)
_FEW = 30  # voxels of tissue from which a spread is taken


def insert_lesion(image: np.ndarray, lesion: LesionShape, contrast: Sequence[float]) -> np.ndarray:
    """The image plus `weight · contrast`: `(X, Y, Z, C)` of the same dtype; `image` is not changed.

    contrast: per channel, in the image's intensities. The tissue's own noise, bias and edges go on through the lesion. Voxels of a
    channel that are exactly 0, the background, stay 0.
    Raises InputError where the contrasts are not one per channel, or the lesion lies wholly in the background.

    >>> from xaiseg.analysis.lesion_shape import ellipsoid
    >>> image = np.ones((9, 9, 9, 2), np.float32)
    >>> brighter = insert_lesion(image, ellipsoid((9, 9, 9), (1, 1, 1), (4, 4, 4), 4.0), (2.0, -0.5))
    >>> brighter[4, 4, 4].tolist(), brighter[0, 0, 0].tolist()
    ([3.0, 0.5], [1.0, 1.0])
    """
    added = _checked(np.asarray(contrast, float)[None], image)[0]
    part = image[lesion.box]
    _check_place(part, lesion)
    out = np.array(image)
    out[lesion.box] += (np.where(part != 0, lesion.weight[..., None] * added, 0)).astype(image.dtype)
    return out


def tissue_spread(
    image: np.ndarray,
    lesion: LesionShape,
    spacing: Sequence[float],
    *,
    tissue: np.ndarray | None = None,
    exclude: np.ndarray | None = None,
    reach_mm: float = 8.0,
) -> np.ndarray:
    """Standard deviation `(C,)` of the tissue around a place, to give contrasts in: 1.4826 times the median absolute deviation.

    Of voxels with no weight that lie within `reach_mm` of the lesion and are not 0 in any channel; of the `tissue` `(X, Y, Z)` bool
    alone, such as normal-appearing white matter, and not of what to `exclude`, such as other lesions.
    Raises InputError for fewer than 30 such voxels.
    """
    step = np.asarray(spacing, float)
    reach = np.ceil(reach_mm / step).astype(int) + 1
    low = np.maximum(np.array(lesion.start) - reach, 0)
    high = np.minimum(np.array(lesion.start) + lesion.weight.shape + reach, image.shape[:3])
    box = tuple(map(slice, low, high))
    inside = np.zeros(high - low, np.float32)
    inside[tuple(slice(s, s + n) for s, n in zip(np.array(lesion.start) - low, lesion.weight.shape, strict=True))] = (
        lesion.weight
    )
    near = ndimage.distance_transform_edt(inside < 0.5, sampling=step) <= reach_mm
    used = near & (inside == 0) & (image[box] != 0).all(-1)
    if tissue is not None:
        used &= tissue[box] != 0
    if exclude is not None:
        used &= exclude[box] == 0
    if used.sum() < _FEW:
        raise InputError(
            f"synthetic lesion: {int(used.sum())} voxels of tissue within {reach_mm:g} mm of it, expected at least {_FEW}: put it "
            "elsewhere, or give its contrast in normalised intensity"
        )
    values = image[box][used].astype(np.float64)
    return 1.4826 * np.median(np.abs(values - np.median(values, axis=0)), axis=0)


def insertion_rows(
    predictor: StitchedPredictor,
    image: np.ndarray,
    spacing: Sequence[float],
    lesion: LesionShape,
    contrasts: np.ndarray,
    channels: Sequence[str],
    *,
    threshold: float | None,
    unit: Sequence[float] | np.ndarray | None = None,
    explain: Explainer | None = None,
    key: Array | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A row per contrast: whether the network finds the lesion in the image, and its saliency.

    contrasts: `(K, C)`, in units of `unit` `(C,)`, for example `tissue_spread`; without it in the image's intensities.
    explain, key: of the lesion's voxels, found or not, at each contrast with the same key; without them no saliency is computed.
    Detection and scores are as in `context_curves`, of only those windows that hold voxels of the lesion.

    Columns: `contrast_CHANNEL` as given, `added_CHANNEL` in the image's intensities, `voxels`, `volume_mm3` (weights times voxel),
    `mean_probability`, `max_probability`, `mean_logit`, `detected` (0, 1), and `saliency_CHANNEL_measure`.
    Raises InputError as `insert_lesion`.
    """
    given = np.atleast_2d(np.asarray(contrasts, float))
    added = _checked(given * (1.0 if unit is None else np.asarray(unit, float)), image)
    _check_place(image[lesion.box], lesion)
    if explain is not None and key is None:
        raise ValueError("an explainer needs a key")
    weight = np.zeros((*image.shape[:3], 1), image.dtype)
    weight[lesion.box] = lesion.weight[..., None]
    altered = Altered(_add, (image, weight), (added.astype(image.dtype),))
    logits, _ = altered_logits(predictor, altered, lesion.voxels, chunk=chunk, progress=progress)
    found = zip(*scores(predictor, logits, threshold), strict=True)
    rows: list[dict[str, Any]] = []
    for k, (mean, largest, logit, detected) in enumerate(found):
        row: dict[str, Any] = {f"contrast_{name}": float(v) for name, v in zip(channels, given[k], strict=True)}
        row |= {f"added_{name}": float(v) for name, v in zip(channels, added[k], strict=True)}
        row |= {"voxels": len(lesion.voxels), "volume_mm3": lesion.volume_mm3(spacing)}
        row |= {"mean_probability": float(mean), "max_probability": float(largest), "mean_logit": float(logit)}
        row["detected"] = int(detected)
        if explain is not None and key is not None:
            (saliency,), _ = explain(key, predictor, altered.image(k), [lesion.instance()], progress=progress)
            row |= map_figures(saliency, lesion.instance(), channels, "saliency")
        rows.append(row)
    return rows


def insertion_summary(
    rows: Sequence[dict[str, Any]],
    axis: str,
    *,
    lesion: str = "lesion",
    patient: str = "patient",
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """Rows `measure, AXIS, estimate, low, high, lesions, patients`: `detection_rate` at each level, `detected_50`, `detected_90`.

    rows: of `insertion_rows` with columns of the lesion and patient. axis: a column, for example `contrast_FLAIR`, that takes the
    same levels once for each lesion. The last two measures are levels of it, see `context_summary`.
    Raises InputError where levels differ between lesions.
    """
    levels = sorted({row[axis] for row in rows})
    by_lesion: dict[tuple[Any, Any], dict[float, float]] = {}
    for row in rows:
        by_lesion.setdefault((row[patient], row[lesion]), {})[row[axis]] = row["detected"]
    complete = all(len(found) == len(levels) for found in by_lesion.values())
    if not rows or not complete or len(rows) != len(by_lesion) * len(levels):
        raise InputError(
            f"synthetic lesions: {len(rows)} rows of {len(by_lesion)} lesions at {len(levels)} levels of {axis}, expected each "
            "lesion once at each level: summarise series apart"
        )
    detected = np.array([[found[at] for at in levels] for found in by_lesion.values()], float)
    patients = [str(name) for name, _ in by_lesion]
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "level": level}
    counted = {"lesions": len(patients), "patients": len(set(patients))}
    found = [
        ("detection_rate", at, tuple(interval[:3]))
        for at, interval in zip(levels, mean_intervals(detected, patients, **options), strict=True)
    ]
    places = np.array(levels, float)
    found += [
        (f"detected_{100 * s:g}", None, crossing_interval(places, detected, patients, s, **options)) for s in DETECTED
    ]
    return [
        {
            "measure": measure,
            axis: at,
            **dict(zip(("estimate", "low", "high"), map(float, ends), strict=True)),
            **counted,
        }
        for measure, at, ends in found
    ]


def _add(parameters: tuple[Array], image: Array, weight: Array) -> Array:
    (contrast,) = parameters
    return image + jnp.where(image != 0, weight * jnp.asarray(contrast)[None, None, None], jnp.zeros_like(image))


def _checked(added: np.ndarray, image: np.ndarray) -> np.ndarray:
    if added.shape[-1] != image.shape[-1] or not np.isfinite(added).all():
        raise InputError(
            f"synthetic lesion: contrasts {added[0].tolist()} for {image.shape[-1]} channels: give one number for each channel"
        )
    return added


def _check_place(part: np.ndarray, lesion: LesionShape) -> None:
    if not (part[lesion.weight >= 0.5] != 0).any():
        raise InputError(
            f"synthetic lesion: at voxel {lesion.start} it lies wholly in the background: choose a centre in the brain"
        )
