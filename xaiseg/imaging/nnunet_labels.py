"""Label maps onto the grid of a network's image, with no label lost."""

import numpy as np

_REACH = 2  # voxels in which a label that would vanish may look for a free one


def resize_labels(labels: np.ndarray, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> np.ndarray:
    """Nearest neighbour: each new voxel takes the label of the old one in which its centre lies.

    A label that this leaves without a voxel is given one, since a lesion below the size of a new voxel must still be
    found under its number: the new voxel in which the old voxel nearest to the label's centroid lies. If that one has
    another label already, it is the nearest background voxel among those up to 2 away; if there is none, the nearest
    whose label has others left.

    Args:
        labels: (X, Y, Z) integer, 0 the background.
        shape: (X', Y', Z'), over the same field of view.
        spacing: of the new grid, in mm; distances are measured in mm.

    Returns:
        (X', Y', Z') int32.
    """
    # Integers throughout: a centre that falls on the face between two voxels belongs to the upper one.
    nearest = [(2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(labels.shape, shape, strict=True)]
    out = labels[np.ix_(*nearest)].astype(np.int32)
    scale = np.divide(shape, labels.shape)
    for label in np.setdiff1d(labels[labels != 0], out):
        voxels = np.argwhere(labels == label)
        away = (voxels - voxels.mean(axis=0)) * scale * spacing
        centre = (voxels[np.argmin(np.square(away).sum(axis=1))] + 0.5) * scale - 0.5
        out[_place(out, centre, np.asarray(spacing))] = label
    return out


def _place(out: np.ndarray, centre: np.ndarray, spacing: np.ndarray) -> tuple[int, ...]:
    """The voxel of `out` for a label centred at `centre`, in voxels of `out`."""
    home = np.floor(centre + 0.5).astype(int)
    ranges = [range(max(i - _REACH, 0), min(i + _REACH + 1, n)) for i, n in zip(home, out.shape, strict=True)]
    candidates = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, 3)
    distance = np.square((candidates - centre) * spacing).sum(axis=1)
    taken = out[tuple(candidates.T)]
    alone = [label for label in np.unique(taken) if np.count_nonzero(out == label) == 1]
    best = np.lexsort((distance, np.isin(taken, alone), taken != 0))[0]
    return tuple(candidates[best].tolist())
