"""Figures of one saliency map, and of the lesion it explains: the columns of the lesion table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from xaiseg._types import Info, Instance, SaliencyMap
from xaiseg.cohort.methods import Method
from xaiseg.cohort.segmentation import Segmentation, Target
from xaiseg.imaging import Case, Grid
from xaiseg.saliency import recommended_samples

RING_VOXELS = 2
_NEIGHBOURS_18 = ndimage.generate_binary_structure(3, 2)

LESION_COLUMNS = {
    "case": "Case",
    "subject": "BIDS subject label",
    "session": "BIDS session label",
    "lesion": "Label of the instance in desc-instances_dseg",
    "group": "TP, FP or FN against the reference mask (at least one shared voxel); unlabelled without one",
    "voxels": "Voxels of the instance",
    "volume_mm3": "Volume in mm³",
    "centroid_x_mm": "Centroid in world coordinates, to the right, mm",
    "centroid_y_mm": "Centroid in world coordinates, to the front, mm",
    "centroid_z_mm": "Centroid in world coordinates, upward, mm",
    "overlap": "Voxels shared with the other side (reference or prediction)",
    "iou": "Largest intersection over union with an instance of the other side",
    "mean_probability": "Mean predicted lesion probability over the instance",
    "max_probability": "Largest predicted lesion probability in the instance",
}
MAP_COLUMNS = {
    "peak": "Largest value of the map",
    "minimum": "Smallest value of the map",
    "mean_inside": "Mean over the instance's voxels",
    "mean_ring": f"Mean over the ring of {RING_VOXELS} voxels (18-connected) around the instance",
    "positive_mass": "Sum of the positive values",
    "negative_mass": "Sum of the negative values",
    "peak_se": "Standard error of the peak over the noise samples",
}
EXTRA_COLUMNS = {
    "alpha_near_zero": "Fraction of positions with a positive gradient where the denominator of α is below 1e-3 of its second "
    "derivative: there the weights are ill-defined",
    "alpha_undefined": "Fraction of positions with a positive gradient where α is no number; their weight is 0",
    "closed_form_difference": "Largest difference of the map from that with the closed form of α, as a fraction of the map's peak",
    "converged": "1 where the standard error of the peak came down to the tolerance, 0 where samples ran out before",
}
METHOD_COLUMNS = {
    "samples": "Noise samples averaged",
    "samples_for_5_percent": "Noise samples that would bring the standard error of each channel's peak to 5 % of the largest peak",
    "windows": "Sliding windows that hold voxels of the instance",
    "rows": "Backward passes through one window, per sample",
}


def lesion_row(
    case: Case, grid: Grid, segmentation: Segmentation, target: Target, instance: Instance
) -> dict[str, Any]:
    """The columns of `LESION_COLUMNS` for one instance; missing ones are None."""
    centroid = grid.to_world(instance.voxels.mean(0))
    probability = segmentation.probability[tuple(instance.voxels.T)]
    return {
        "case": case.name,
        "subject": case.subject,
        "session": case.session,
        "lesion": instance.label,
        "group": target.groups[instance.label],
        "voxels": len(instance.voxels),
        "volume_mm3": len(instance.voxels) * grid.voxel_volume,
        "centroid_x_mm": centroid[0],
        "centroid_y_mm": centroid[1],
        "centroid_z_mm": centroid[2],
        "overlap": target.overlap.get(instance.label),
        "iou": target.iou.get(instance.label),
        "mean_probability": probability.mean(dtype=np.float64),
        "max_probability": probability.max(),
    }


def map_row(
    prefix: str, names: Sequence[str], saliency: SaliencyMap, info: Info, instance: Instance, shape: Sequence[int]
) -> dict[str, Any]:
    """The columns `PREFIX_NAME_measure` for each name, one per channel of the map, and `PREFIX_measure` of the method.

    shape: of the volume that the map is a crop of.
    """
    ring = ring_voxels(instance, shape)
    row: dict[str, Any] = {}
    for channel, name in enumerate(names):
        values = np.asarray(saliency.values[..., channel], np.float64)
        peak = np.unravel_index(np.argmax(values), values.shape)
        error = saliency.standard_error[..., channel][peak] if saliency.standard_error is not None else None
        measures = {
            "peak": values[peak],
            "minimum": values.min(),
            "mean_inside": _values_at(values, saliency.start, instance.voxels).mean(),
            "mean_ring": _values_at(values, saliency.start, ring).mean() if len(ring) else None,
            "positive_mass": values[values > 0].sum(),
            "negative_mass": values[values < 0].sum(),
            "peak_se": error,
        }
        row |= {_column(prefix, name, measure): value for measure, value in measures.items()}
    needed = recommended_samples(info, 0.05) if info.course is not None else None
    row |= {f"{prefix}_samples": info.samples, f"{prefix}_samples_for_5_percent": needed}
    row |= {f"{prefix}_windows": info.windows, f"{prefix}_rows": info.rows}
    return row | {f"{prefix}_{name}": value for name, value in info.extra.items() if name in EXTRA_COLUMNS}


def ring_voxels(instance: Instance, shape: Sequence[int]) -> np.ndarray:
    """The voxels `(n, 3)` of the ring around an instance that lie in a volume of `shape`."""
    low = instance.voxels.min(0) - RING_VOXELS
    box = np.zeros(instance.voxels.max(0) + RING_VOXELS + 1 - low, bool)
    box[tuple((instance.voxels - low).T)] = True
    ring = np.argwhere(ndimage.binary_dilation(box, _NEIGHBOURS_18, RING_VOXELS) & ~box) + low
    return ring[((ring >= 0) & (ring < np.array(shape[:3]))).all(1)]


def _values_at(values: np.ndarray, start: Sequence[int], voxels: np.ndarray) -> np.ndarray:
    """Values of a cropped map at voxels of the volume; beyond the crop a map is zero."""
    local = voxels - np.array(start)
    held = ((local >= 0) & (local < np.array(values.shape))).all(1)
    found = np.zeros(len(voxels))
    found[held] = values[tuple(local[held].T)]
    return found


def describe_columns(methods: Mapping[str, Method]) -> dict[str, dict[str, str]]:
    """BIDS descriptions of all columns of the table, by the methods' keys."""
    described = {name: {"Description": text} for name, text in LESION_COLUMNS.items()}
    for prefix, method in methods.items():
        for name in method.names:
            for measure, text in MAP_COLUMNS.items():
                entry = {"Description": f"{text} ({prefix}, {name})", "Units": method.unit}
                described[_column(prefix, name, measure)] = entry
        for measure, text in METHOD_COLUMNS.items():
            described[f"{prefix}_{measure}"] = {"Description": f"{text} ({prefix})"}
        for measure in method.extra:
            described[f"{prefix}_{measure}"] = {"Description": f"{EXTRA_COLUMNS[measure]} ({prefix})"}
    return described


def _column(prefix: str, name: str, measure: str) -> str:
    return f"{prefix}_{measure}" if name == prefix else f"{prefix}_{name}_{measure}"
