"""Cases as arrays: normalised once, kept in the run's folder and memory-mapped, so a cohort may exceed the memory."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xaiseg.errors import InputError
from xaiseg.imaging import Case, Grid, load_scan, zscore_nonzero
from xaiseg.imaging.grid import reorient, reorientation
from xaiseg.imaging.nnunet_plan import NnunetPreprocessing
from xaiseg.imaging.phantom import phantom


class Volume(NamedTuple):
    """image: `(X, Y, Z, C)` float32, normalised. reference: `(X, Y, Z)` bool. lesion, other: flat indices, int32, of the voxels of
    lesions and of those elsewhere in the brain (any channel not zero; everywhere if there is none)."""

    name: str
    image: np.ndarray
    reference: np.ndarray
    lesion: np.ndarray
    other: np.ndarray


def volume_of_case(
    folder: Path,
    case: Case,
    channels: Sequence[str],
    orientation: str,
    preprocessing: NnunetPreprocessing | None = None,
) -> Volume:
    """The images of a case, their axes as `orientation` says, and its mask. Raises InputError where a file cannot be used."""

    def load() -> tuple[np.ndarray, np.ndarray]:
        scan = load_scan(case, channels, orientation, preprocessing=preprocessing)
        assert case.reference is not None
        labels = scan.labels(case.reference)
        if labels.max() > 1:
            raise InputError(
                f"{case.reference}: holds the value {labels.max()}, expected a mask of 0 and 1: set every lesion voxel to 1"
            )
        return scan.image, scan.labels_to_image(labels) > 0

    return cached(folder, case.name, load)


def volume_of_phantom(folder: Path, seed: int, orientation: str) -> Volume:
    name = f"phantom-{seed}"

    def draw() -> tuple[np.ndarray, np.ndarray]:
        brain = phantom(seed)
        image = np.stack([zscore_nonzero(brain.flair, name), zscore_nonzero(brain.t1w, name)], axis=-1)
        transform = reorientation(Grid(brain.lesions.shape, brain.affine), orientation)
        return reorient(image, transform), reorient(brain.lesions > 0, transform)

    return cached(folder, name, draw)


def make_volume(name: str, image: np.ndarray, reference: np.ndarray) -> Volume:
    brain = image.any(axis=-1) & ~reference
    other = np.flatnonzero(brain if brain.any() else ~reference)
    return Volume(name, image, reference, np.flatnonzero(reference).astype(np.int32), other.astype(np.int32))


def cached(folder: Path, name: str, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Volume:
    """The volume stored under `folder/name`, made and stored first where it is not there yet.

    It is assembled beside its place and renamed, so that a run killed meanwhile leaves none that is half written. Raises InputError
    where it cannot be written.
    """
    place = folder / name
    if not place.is_dir():
        volume = make_volume(name, *make())
        try:
            staging = Path(tempfile.mkdtemp(prefix=".", dir=folder))
            staging.chmod(0o755)
            for field in Volume._fields[1:]:
                np.save(staging / f"{field}.npy", getattr(volume, field))
            staging.rename(place)
        except OSError as error:
            free = shutil.disk_usage(folder).free // 2**20
            raise InputError(
                f"{place}: cannot be written ({error.strerror or error}; {free} MiB are free): make room, or choose another "
                "folder with --out, and give the same command again"
            ) from error
    return open_volume(place)


def open_volume(folder: Path) -> Volume:
    """A stored volume, memory-mapped. Raises InputError where it is damaged."""
    try:
        return Volume(folder.name, *(np.load(folder / f"{field}.npy", mmap_mode="r") for field in Volume._fields[1:]))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: cannot be read as a stored volume ({error}); expected {', '.join(Volume._fields[1:])}.npy: "
            "remove the folder and start again, it is made anew"
        ) from error
