"""Figures of a saliency map of one lesion, by channel, as columns of a row."""

from collections.abc import Sequence

import numpy as np

from xaiseg._types import Instance, SaliencyMap

MEASURES = {
    "peak": "Largest value of the map",
    "minimum": "Smallest value of the map",
    "mean_inside": "Mean over the lesion's voxels",
    "positive_mass": "Sum of the positive values",
    "negative_mass": "Sum of the negative values",
}


def map_figures(found: SaliencyMap, instance: Instance, channels: Sequence[str], prefix: str) -> dict[str, float]:
    """`PREFIX_CHANNEL_measure` of `MEASURES`; channels of the map are numbered where they are not the image's, `map0`, `map1`, …"""
    values = np.asarray(found.values, np.float64)
    local = instance.voxels - np.array(found.start)
    held = local[((local >= 0) & (local < np.array(values.shape[:3]))).all(1)]
    own = list(channels) if len(channels) == values.shape[-1] else [f"map{n}" for n in range(values.shape[-1])]
    row: dict[str, float] = {}
    for c, name in enumerate(own):
        one = values[..., c]
        measures = {
            "peak": one.max(),
            "minimum": one.min(),
            "mean_inside": one[tuple(held.T)].sum() / len(instance.voxels),  # beyond its crop a map is zero
            "positive_mass": one[one > 0].sum(),
            "negative_mass": one[one < 0].sum(),
        }
        row |= {f"{prefix}_{name}_{measure}": float(value) for measure, value in measures.items()}
    return row


def relative_change(before: SaliencyMap, after: SaliencyMap) -> float:
    """`‖M' - M‖₂ / ‖M‖₂` of two maps of one volume, zero beyond their crops; NaN where the first is zero everywhere."""
    low = np.minimum(before.start, after.start)
    high = np.maximum(*(np.array(m.start) + m.values.shape[:3] for m in (before, after)))
    whole = np.zeros((2, *(high - low), before.values.shape[-1]))
    for canvas, found in zip(whole, (before, after), strict=True):
        first = np.array(found.start) - low
        canvas[tuple(slice(a, a + n) for a, n in zip(first, found.values.shape[:3], strict=True))] = found.values
    size = np.linalg.norm(whole[0])
    return float(np.linalg.norm(whole[1] - whole[0]) / size) if size else float("nan")
