"""Instances of a binary segmentation: its connected components."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from xaiseg._types import Instance

# Neighbours of a voxel -> how many coordinates may differ at once, as scipy counts it.
_RANK = {6: 1, 18: 2, 26: 3}


def label_components(mask: np.ndarray, connectivity: int = 18, min_voxels: int = 1) -> np.ndarray:
    """Label map int32 `(X, Y, Z)` of the components of `mask`, numbered 1, 2, … in C order of their first voxel.

    Components of fewer than `min_voxels` voxels are removed before numbering. `connectivity` is 6, 18 or 26 neighbours.
    """
    if connectivity not in _RANK:
        raise ValueError(f"connectivity is {connectivity}, expected 6, 18 or 26")
    labels, count = ndimage.label(mask, ndimage.generate_binary_structure(3, _RANK[connectivity]))
    kept = np.bincount(labels.ravel(), minlength=count + 1) >= min_voxels
    kept[0] = False
    numbers = np.zeros(count + 1, np.int32)
    numbers[kept] = np.arange(1, kept.sum() + 1)
    return numbers[labels]


def instances_of(labels: np.ndarray, wanted: Sequence[int] | None = None) -> list[Instance]:
    """The instances of a label map, in order of label; only those `wanted`, if given.

    Raises KeyError for a wanted label that does not occur.
    """
    found: dict[int, Instance] = {}
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or (wanted is not None and number not in wanted):
            continue
        corner = np.array([s.start for s in box])
        found[number] = Instance(number, (np.argwhere(labels[box] == number) + corner).astype(np.int32))
    for number in wanted or ():
        if number not in found:
            raise KeyError(number)
    return list(found.values())
