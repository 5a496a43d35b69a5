"""The scan without one of its lesions: what the network says in its place, and what changes for its neighbours."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.spatial import KDTree

from xaiseg._types import Explainer, Instance, Progress
from xaiseg.analysis.altered import Altered, Box, altered_logits
from xaiseg.analysis.context import scores
from xaiseg.analysis.map_figures import map_figures, relative_change
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor

MOMENTS = ("before", "after")


def counterfactual_rows(
    predictor: StitchedPredictor,
    image: np.ndarray,
    filled: np.ndarray,
    spacing: Sequence[float],
    instance: Instance,
    neighbours: Sequence[Instance],
    channels: Sequence[str],
    *,
    threshold: float | None,
    explain: Explainer | None = None,
    key: Array | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A row for the filled lesion and one for each neighbour: scores, detection and saliency in `image` and in `filled`.

    image: `(X, Y, Z, C)`. filled: the same with the lesion's voxels and their rim replaced by what normal-appearing tissue around
      suggests. instance: the filled lesion. neighbours: others; of their windows only those that see the change are computed anew.
    explain, key: with one key before and after, so that noise is the same.

    Columns: `lesion`, `role` (filled, neighbour), `distance_mm` between the nearest voxels' centres, `changed_voxels` of the image;
    `before_X` and `after_X` for `mean_probability`, `max_probability`, `mean_logit`, `detected` and `saliency_CHANNEL_measure`;
    `saliency_change`, `‖M' - M‖₂ / ‖M‖₂`.
    Raises InputError where the filled image has another shape, or is the image itself.
    """
    if filled.shape != image.shape:
        raise InputError(
            f"counterfactual: the filled image is {filled.shape}, the image {image.shape}: give one on its grid"
        )
    changed = (filled != image).any(-1)
    if not changed.any():
        raise InputError(f"counterfactual: nothing of lesion {instance.label} was filled: fill its voxels first")
    if explain is not None and key is None:
        raise ValueError("an explainer needs a key")

    def same(box: Box) -> np.ndarray:
        return np.array([0, int(changed[box].any())])

    altered = Altered(_either, (image, filled), (np.array([False, True]),), same)
    lesions = [instance, *neighbours]
    # all at once: neighbours share windows
    voxels = np.concatenate([lesion.voxels for lesion in lesions])
    logits, _ = altered_logits(predictor, altered, voxels, chunk=chunk, progress=progress)
    ends = np.cumsum([len(lesion.voxels) for lesion in lesions])[:-1]
    tree = KDTree(instance.voxels * np.asarray(spacing, float))
    rows: list[dict[str, Any]] = []
    for lesion, own in zip(lesions, np.split(logits, ends, axis=1), strict=True):
        found = scores(predictor, own, threshold)
        row: dict[str, Any] = {
            "lesion": lesion.label,
            "role": "filled" if lesion is instance else "neighbour",
            "distance_mm": float(tree.query(lesion.voxels * np.asarray(spacing, float))[0].min()),
            "changed_voxels": int(changed.sum()),
        }
        for k, moment in enumerate(MOMENTS):
            mean, largest, logit, detected = (values[k] for values in found)
            row |= {f"{moment}_mean_probability": float(mean), f"{moment}_max_probability": float(largest)}
            row |= {f"{moment}_mean_logit": float(logit), f"{moment}_detected": int(detected)}
        rows.append(row)
    if explain is not None and key is not None:
        maps = [explain(key, predictor, jnp.asarray(one), lesions, progress=progress)[0] for one in (image, filled)]
        for row, lesion, *pair in zip(rows, lesions, *maps, strict=True):
            for moment, found_map in zip(MOMENTS, pair, strict=True):
                row |= map_figures(found_map, lesion, channels, f"{moment}_saliency")
            row["saliency_change"] = relative_change(*pair)
    return rows


def _either(parameters: tuple[Array], image: Array, filled: Array) -> Array:
    (second,) = parameters
    return jnp.where(second, filled, image)
