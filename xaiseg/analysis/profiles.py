"""The sign of saliency against the distance from the lesion's border: positive inside, negative around?"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from xaiseg.analysis.saved_maps import SavedMap, around
from xaiseg.metrics.bootstrap import bootstrap_interval, resample_weights, sum_by_patient
from xaiseg.metrics.voxels import ratio

INSIDE_MM, OUTSIDE_MM, STEP_MM = 10.0, 20.0, 1.0
_ROUNDING = 1e-4  # of a bin: float32 headers give a voxel of 1 mm as 0.99999994
PROFILE_COLUMNS = {
    "method": "Key of the method, as in lesions.tsv",
    "group": "Group of the lesions",
    "channel": "Channel of the map",
    "from_mm": "Inner end of the bin, mm from the border, negative inside the lesion",
    "to_mm": "Outer end of the bin. Distances are between voxel centres: outside to the nearest voxel of the lesion, inside to the "
    "nearest that is not; a bin holds the end that is farther from the border",
    "mean": "Mean over lesions of the mean over the voxels in the bin; 0 where no window of the lesion reaches",
    "low": "Lower end of its 95 % percentile interval over resampled patients",
    "high": "Upper end of that interval",
    "lesions": "Lesions with voxels in the bin",
    "patients": "Patients of these lesions",
}


class Profile(NamedTuple):
    """The mean saliency of one lesion in each bin, `(bins, C)`, NaN where it has no voxels, and how many it has, `(bins,)`."""

    mean: np.ndarray
    voxels: np.ndarray


def bin_edges(inside: float = INSIDE_MM, outside: float = OUTSIDE_MM, step: float = STEP_MM) -> np.ndarray:
    """Multiples of `step` in mm from `-inside` to `outside`; 0, the border, is one of them.

    >>> bin_edges(2, 3, 1).tolist()
    [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    """
    return step * np.arange(-round(inside / step), round(outside / step) + 1)


def radial_profile(found: SavedMap, edges: np.ndarray) -> Profile | None:
    """Mean saliency against the signed distance in mm from the border of a lesion; None for a lesion without a voxel on the map's
    grid.

    Distances are between voxel centres, on the grid of the map, whatever its spacing: outside to the nearest voxel of the lesion,
    inside minus that to the nearest voxel that is not of it. Voxels outside of the label map do not count, other lesions do.

    edges: of the bins in mm, ascending, from `bin_edges`. Bins outside are `(from, to]`, inside `[from, to)`.
    """
    reach = np.ceil(edges[-1] / np.array(found.grid.spacing)).astype(int) + 1
    box = around(found, reach)
    if box is None or not (box.known & ~box.mask).any():
        return None
    bins = _bins(signed_distance(box.mask, box.known, found.grid.spacing).ravel(), edges)
    counted = box.known.ravel() & (bins >= 0)
    count = len(edges) - 1
    voxels = np.bincount(bins[counted], minlength=count)
    flat = box.values.reshape(-1, box.values.shape[-1])[counted]
    sums = np.stack([np.bincount(bins[counted], channel, minlength=count) for channel in flat.T], -1)
    return Profile(ratio(sums, voxels[:, None]), voxels)


def signed_distance(mask: np.ndarray, known: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance in mm between voxel centres: outside to the nearest voxel of the mask, inside minus that to the nearest known one
    that is not of it. A lesion that the scan's field of view cuts has no border there."""
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing)
    return np.where(mask, -ndimage.distance_transform_edt(mask | ~known, sampling=spacing), outside)


def mean_profiles(
    profiles: np.ndarray,
    patients: np.ndarray,
    groups: np.ndarray,
    channels: Sequence[str],
    edges: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The columns of `PROFILE_COLUMNS` but the method, for every group, channel and bin that lesions reach.

    profiles: `(lesions, bins, C)`, the means of `Profile`. Each lesion counts once, whatever its size; patients are resampled.
    """
    rows = []
    for group in dict.fromkeys(groups.tolist()):
        where = groups == group
        names, count = patients[where], len(set(patients[where].tolist()))
        weights = resample_weights(np.random.default_rng(seed), count, resamples)
        for c, channel in enumerate(channels):
            for n, values in enumerate(profiles[where, :, c].T):
                known = np.isfinite(values)
                if not known.any():
                    continue
                terms = np.stack([np.where(known, values, 0), known.astype(float)], -1)
                found = bootstrap_interval(_mean, sum_by_patient(terms, names.tolist()), weights)
                row: dict[str, Any] = {"group": group, "channel": channel}
                row |= {"from_mm": edges[n], "to_mm": edges[n + 1], "mean": found.estimate, "low": found.low}
                row |= {"high": found.high, "lesions": int(known.sum()), "patients": len(set(names[known].tolist()))}
                rows.append(row)
    return rows


def sign_of_profile(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The distance in mm from which the mean of one group and channel is negative, going outward; None where it never is."""
    outside = [row for row in rows if row["from_mm"] >= 0]
    return next((float(row["from_mm"]) for row in outside if row["mean"] < 0), None)


def _bins(distance: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin of each distance, -1 beyond all."""
    step = edges[1] - edges[0]
    steps = np.ceil(np.abs(distance) / step - _ROUNDING).astype(int)  # 1 for the bins beside the border
    zero = int(np.searchsorted(edges, -step / 2))
    bins = np.where(distance > 0, zero + steps - 1, zero - steps)
    return np.where((bins >= 0) & (bins < len(edges) - 1), bins, -1)


def _mean(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0], sums[..., 1])
