"""The maps that a run saved, one lesion after another, and the part of a map around its lesion."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from xaiseg.analysis.run_tables import MapKind, Run
from xaiseg.cohort.stages import INSTANCES
from xaiseg.errors import InputError
from xaiseg.imaging import Grid, check_header, nifti


class SavedMap(NamedTuple):
    """A lesion's map as it was saved, `values` `(x, y, z, C)` on `grid`, and the lesion: `labels` that are `label`."""

    values: np.ndarray
    grid: Grid
    labels: np.ndarray
    label_grid: Grid
    label: int


class Around(NamedTuple):
    """A box around a lesion on the grid of its map.

    values: `(x, y, z, C)`, 0 where the map was not computed. mask: `(x, y, z)`, the lesion. known: whether the scan has this voxel.
    """

    values: np.ndarray
    mask: np.ndarray
    known: np.ndarray


def saved_maps(run: Run, method: MapKind, flaws: list[str]) -> Iterator[SavedMap | None]:
    """The map of each lesion of a run, in order; None where none is saved, or it cannot be used, which `flaws` then tells."""
    at: Path | None = None  # lesions of a case are neighbours in the table
    for n, number in enumerate(run.lesions["lesion"].astype(int).tolist()):
        path = run.file(n, f"space-orig_desc-{method.key}_lesion-{number:03d}_saliency.nii.gz")
        found = None
        if path.is_file():
            try:
                if at != (now := run.file(n, INSTANCES)):
                    grid, labels, at = check_header(now), nifti.read_labels(now), now
                found = SavedMap(*read_map(path), labels, grid, number)
            except InputError as error:
                flaws.append(str(error))
        yield found


def read_map(path: Path) -> tuple[np.ndarray, Grid]:
    """A map `(x, y, z, C)` with its grid. Raises InputError for a file that cannot be read, and values that are not finite."""
    try:
        image = nib.load(path)
        values = np.asarray(image.dataobj, np.float64)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a map: explain this lesion again") from error
    if bad := int((~np.isfinite(values)).sum()):
        raise InputError(f"{path}: {bad} values are not finite, expected finite ones: explain this lesion again")
    # one channel may have been stored without an axis of its own
    return (values[..., None] if values.ndim == 3 else values), Grid(values.shape[:3], image.affine)


def around(found: SavedMap, reach: Sequence[int] | np.ndarray) -> Around | None:
    """The box of the lesion and `reach` `(3,)` voxels beyond; None for a lesion without a voxel on the map's grid.

    On another grid than the labels', the map's voxels take the nearest label.
    """
    values, grid, labels, label_grid, label = found
    places = _indices_on(np.argwhere(labels == label), label_grid, grid)
    if not len(places):
        return None
    low, high = np.floor(places.min(0)).astype(int) - reach, np.ceil(places.max(0)).astype(int) + reach + 1
    shape = tuple((high - low).tolist())
    index = np.rint(_indices_on(np.indices(shape).reshape(3, -1).T + low, grid, label_grid)).astype(int)
    known = ((index >= 0) & (index < labels.shape)).all(1)
    lesion = np.zeros(len(index), bool)
    lesion[known] = labels[tuple(index[known].T)] == label
    box = np.zeros((*shape, values.shape[-1]))
    first, last = np.maximum(low, 0), np.minimum(high, values.shape[:3])
    if (first < last).all():
        inner = tuple(slice(a, b) for a, b in zip(first - low, last - low, strict=True))
        box[inner] = values[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
    mask = lesion.reshape(shape)
    return Around(box, mask, known.reshape(shape)) if mask.any() else None


def _indices_on(voxels: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    """Voxel indices `(n, 3)` of one grid as (fractional) indices of another, through world coordinates."""
    across = np.linalg.inv(target.affine) @ source.affine
    return voxels @ across[:3, :3].T + across[:3, 3]
