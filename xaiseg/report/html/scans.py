"""The scans and maps of a run, turned to right, anterior, superior, as pictures and the viewer show them."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from xaiseg.analysis.reopened import run_input, run_spec
from xaiseg.analysis.run_tables import MapKind, Run
from xaiseg.cohort.stages import INSTANCES
from xaiseg.cohort.work import load_scan
from xaiseg.errors import InputError
from xaiseg.imaging import Case, read_cohort
from xaiseg.report.lesion import grey_window


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan. image: `(X, Y, Z, C)`, normalised, 0 outside the brain. labels: `(X, Y, Z)`, its lesions. affine: to RAS+ mm.
    windows: black and white of each channel's grey."""

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    windows: tuple[tuple[float, float], ...]

    @property
    def spacing(self) -> tuple[float, float, float]:
        x, y, z = voxel_sizes(self.affine).tolist()
        return x, y, z


@dataclass(frozen=True, eq=False)
class Crop:
    """A saliency map `(x, y, z, C)` that begins at voxel `start` of the scan's grid, and is zero beyond."""

    values: np.ndarray
    start: tuple[int, int, int]


class Scans:
    """The scans of a run, from its own input or from where that was moved to.

    Raises InputError where the input cannot be read.
    """

    def __init__(self, run: Run, source: str | Path | None = None) -> None:
        self.run, self.spec = run, run_spec(run)
        self.given = Path(source) if source is not None else run_input(run)
        self.cases: dict[str, Case] = {case.name: case for case in read_cohort(self.given, self.spec.channels).cases}

    def volume(self, place: int) -> Volume:
        """The scan of a lesion, by its place in the run's table. Raises InputError where it, or its label map, cannot be read."""
        name = str(self.run.lesions["case"][place])
        if name not in self.cases:
            raise InputError(
                f"{self.given}: no case {name}, which {self.run.root} has: give the run's own input as --source"
            )
        scan = load_scan(self.cases[name], self.spec, bool(self.run.identity.get("resample")))
        labels = scan.labels_to_image(scan.labels(self.run.file(place, INSTANCES)))
        turn = io_orientation(scan.grid.affine)
        image = apply_orientation(scan.image, turn)
        windows = tuple(grey_window(image[..., c]) for c in range(image.shape[-1]))
        return Volume(
            image, apply_orientation(labels, turn), scan.grid.affine @ inv_ornt_aff(turn, scan.image.shape[:3]), windows
        )


def map_file(run: Run, place: int, method: MapKind) -> Path:
    """Where the map of a lesion is, if maps were saved."""
    number = int(run.lesions["lesion"][place])
    return run.file(place, f"space-orig_desc-{method.key}_lesion-{number:03d}_saliency.nii.gz")


def read_map(path: Path, volume: Volume) -> Crop:
    """A saved map on the grid of its scan. Raises InputError where it cannot be read, has other voxels, or is not finite."""
    try:
        image = nib.load(path)
        values = np.asarray(image.dataobj, np.float32)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a map: explain this lesion again") from error
    values = values[..., None] if values.ndim == 3 else values
    turn = io_orientation(image.affine)
    affine = image.affine @ inv_ornt_aff(turn, values.shape[:3])
    across = np.linalg.inv(volume.affine) @ affine
    start = np.rint(across[:3, 3])
    if not np.allclose(across[:3, :3], np.eye(3), atol=1e-3) or np.abs(across[:3, 3] - start).max() > 0.1:
        raise InputError(f"{path}: not on the voxels of its scan; expected a crop of them: explain this lesion again")
    if not np.isfinite(values).all():
        raise InputError(f"{path}: values are not finite; expected finite ones: explain this lesion again")
    x, y, z = start.astype(int).tolist()
    return Crop(apply_orientation(values, turn), (x, y, z))


def lesion_voxels(volume: Volume) -> dict[int, np.ndarray]:
    """The voxels `(n, 3)` of every label, in the array's order."""
    places = np.argwhere(volume.labels > 0)
    numbers = volume.labels[tuple(places.T)]
    order = np.argsort(numbers, kind="stable")
    found, first = np.unique(numbers[order], return_index=True)
    return {int(n): part for n, part in zip(found, np.split(places[order], first[1:]), strict=True)}
