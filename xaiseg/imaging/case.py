"""A case, the scan loaded from it, and the check of all headers before any compute."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

from xaiseg.errors import InputError
from xaiseg.imaging import nifti
from xaiseg.imaging.grid import NATIVE, Grid, difference, invert, reorient, reorient_grid, reorientation
from xaiseg.imaging.nnunet import NnunetPreprocessing, Prepared, prepare
from xaiseg.imaging.normalise import zscore_nonzero

_BIDS_NAME = re.compile(r"sub-([A-Za-z0-9]+)(?:_ses-([A-Za-z0-9]+))?")
_BIDS_SUBJECT = re.compile(r"sub-([A-Za-z0-9]+)(?:_|$)")


@dataclass(frozen=True)
class Case:
    """One examination of one patient: the files of its channels, and what is known about its lesions.

    Attributes:
        name: as in "sub-01_ses-2" or the manifest's own.
        images: channel to file, in the model's order.
        reference: the expert's lesion mask.
        instances: the expert's map of numbered lesions.
        patient: whose examination it is. Where nobody says so it is the subject of a name that begins as in BIDS, `sub-01_…`, and
            else the letters and digits of the name: a patient of its own.
    """

    name: str
    images: dict[str, Path]
    reference: Path | None = None
    instances: Path | None = None
    patient: str = ""

    def __post_init__(self) -> None:
        if not self.patient:
            match = _BIDS_SUBJECT.match(self.name)
            object.__setattr__(self, "patient", match[1] if match else self.subject)

    @property
    def subject(self) -> str:
        """The BIDS label of the patient; for a name outside BIDS, its letters and digits."""
        match = _BIDS_NAME.fullmatch(self.name)
        return match[1] if match else re.sub("[^A-Za-z0-9]", "", self.name)

    @property
    def session(self) -> str | None:
        """The BIDS label of the session, where the name has one."""
        match = _BIDS_NAME.fullmatch(self.name)
        return match[2] if match else None


@dataclass(frozen=True, eq=False)
class Scan:
    """The images of a case as the model takes them.

    Segmentations live on the grid of labels, which is that of the image but for a preprocessing that crops or resamples: then
    it is the stored grid. `restore`, `insert` and `labels_to_image` lead from one to the other, and change nothing elsewhere.

    Attributes:
        name: the case's.
        image: (X, Y, Z, C) float32, normalised, in model orientation.
        grid: of `image`.
        stored_grid: of the first channel's file; results are written on it.
        header: of the first channel's file, for `nifti.write`.
        reorientation: (3, 2) orientation transform from stored to model orientation.
        prepared: how nnU-Net's preprocessing made `image`; None where it only was standardised and reoriented.
    """

    name: str
    image: np.ndarray
    grid: Grid
    stored_grid: Grid
    header: nib.Nifti1Header
    reorientation: np.ndarray
    prepared: Prepared | None = None

    @property
    def label_grid(self) -> Grid:
        """The grid of probabilities, masks and label maps."""
        return self.grid if self.prepared is None else self.stored_grid

    def labels(self, path: Path) -> np.ndarray:
        """Read a mask or label map of this scan: (X, Y, Z) int32 on the label grid.

        Raises:
            InputError: as `nifti.read_labels`; among others, the map is not on the stored grid.
        """
        labels = nifti.read_labels(path, self.stored_grid)
        return reorient(labels, self.reorientation) if self.prepared is None else labels

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Logits (X, Y, Z, classes) of the image at the resolution of the label grid; what was cropped away is left out."""
        return values if self.prepared is None else self.prepared.restore(values)

    def insert(self, values: np.ndarray) -> np.ndarray:
        """What was made from restored logits, (x, y, z), on the whole label grid: 0 where the image was cropped away."""
        return values if self.prepared is None else self.prepared.insert(values, 0)

    def labels_to_image(self, labels: np.ndarray) -> np.ndarray:
        """A label map (X, Y, Z) on the image's grid: nearest neighbour, no label inside the crop is lost."""
        return labels if self.prepared is None else self.prepared.labels_to_image(labels)

    def labels_to_stored(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An array on the label grid as `to_stored` takes one on the image's."""
        return self.to_stored(array) if self.prepared is None else (array, self.stored_grid.affine)

    def to_stored(self, array: np.ndarray, start: tuple[int, int, int] = (0, 0, 0)) -> tuple[np.ndarray, np.ndarray]:
        """Take a result, or a crop of one, from model orientation to the stored one.

        Args:
            array: (X, Y, Z) or (X, Y, Z, C).
            start: the voxel of `image` at which `array` begins.

        Returns:
            The array with its axes as stored, and the (4, 4) affine that places it in mm.
        """
        back = invert(self.reorientation)
        return reorient(array, back), reorient_grid(self.grid.crop(start, array.shape), back).affine


def load_scan(
    case: Case,
    channels: Sequence[str],
    orientation: str = NATIVE,
    resample: bool = False,
    preprocessing: NnunetPreprocessing | None = None,
) -> Scan:
    """Read, align, normalise, reorient and stack the channels of a case.

    Args:
        channels: in the model's order.
        orientation: of the voxel axes as the model was trained, such as "LAS"; "native" leaves them as stored.
        resample: bring the other channels onto the first one's grid by trilinear interpolation, 0 outside their field
            of view. Without it, one grid is required.
        preprocessing: nnU-Net's, in place of z-scores over the non-zero voxels and of `orientation`.

    Raises:
        InputError: a file cannot be used, or the channels are on different grids.
    """
    paths = [case.images[channel] for channel in channels]
    first, grid, header = nifti.read(paths[0])

    def standardised(volume: np.ndarray, path: Path) -> np.ndarray:
        return zscore_nonzero(volume, str(path)) if preprocessing is None else volume

    volumes = [standardised(first, paths[0])]
    for path in paths[1:]:
        volume, own, _ = nifti.read(path)
        # Standardised on its own grid: interpolation leaves residues in the background, which would count as brain.
        volume = standardised(volume, path)
        if unlike := difference(grid, own):
            if not resample:
                raise InputError(_apart(paths[0], path, unlike))
            moved = resample_from_to(nib.Nifti1Image(volume, own.affine), (grid.shape, grid.affine), order=1)
            volume = np.asarray(moved.dataobj, np.float32)
            if not volume.any():
                raise InputError(
                    f"{path}: does not overlap {paths[0]} once resampled; check that both are in one space"
                )
        volumes.append(volume)
    if preprocessing is not None:
        prepared = prepare(volumes, grid, preprocessing, [str(path) for path in paths], header.get_zooms()[:3])
        return Scan(case.name, prepared.image, prepared.grid, grid, header, prepared.transform, prepared)
    transform = reorientation(grid, orientation)
    image = reorient(np.stack(volumes, axis=-1), transform)
    return Scan(case.name, image, reorient_grid(grid, transform), grid, header, transform)


def preflight(cases: Sequence[Case], channels: Sequence[str], resample: bool = False) -> None:
    """Check the header of every file of every case, so that a night's run does not fail on its last case.

    Raises:
        InputError: one line for all problems: the first in full, the others by file name.
    """
    found = [problem for case in cases for problem in problems(case, channels, resample)]
    if found:
        message = found[0][1]
        if others := [path.name for path, _ in found[1:]]:
            message += f" (and {len(others)} more: {', '.join(others[:3])}{', …' if len(others) > 3 else ''})"
        raise InputError(message)


def problems(case: Case, channels: Sequence[str], resample: bool = False) -> list[tuple[Path, str]]:
    """Everything that is wrong with the headers of a case: files that cannot be used, and grids that differ.

    Args:
        resample: the channels may be on different grids; lesion maps may not.

    Returns:
        File and message of one line, each; none where the case can be loaded, as far as headers tell. Whatever a file is,
        nothing is raised.
    """
    found: list[tuple[Path, str]] = []
    paths = [case.images[channel] for channel in channels]
    maps = [path for path in (case.reference, case.instances) if path]
    grids: dict[Path, Grid] = {}
    for path in dict.fromkeys([*paths, *maps]):
        try:
            grids[path] = nifti.check_header(path)
        except InputError as error:
            found.append((path, str(error)))
    first = grids.get(paths[0])
    for path in dict.fromkeys([*(paths[1:] if not resample else []), *maps]):
        own = grids.get(path)
        if first and own and (unlike := difference(first, own)):
            hint = _apart if path not in maps else _map_apart
            found.append((path, hint(paths[0], path, unlike)))
    return found


def _apart(first: Path, path: Path, unlike: str) -> str:
    return f"{path}: not on the grid of {first} ({unlike}); expected one grid: register the images, or use --resample"


def _map_apart(first: Path, path: Path, unlike: str) -> str:
    return (
        f"{path}: not on the grid of {first} ({unlike}); expected the image's own grid: "
        "resample the map onto it with nearest neighbour"
    )
