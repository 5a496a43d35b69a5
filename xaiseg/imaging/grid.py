"""Where voxels lie: the grid of a volume, how two grids differ, and the change between stored and model orientation.

A change of orientation is nibabel's `(3, 2)` orientation transform: flips and a permutation of the voxel axes, never an
interpolation. It is worked out once, from the stored affine, and inverted rather than worked out again on the way back:
on a scan turned by 45 degrees the axis codes of a crop could otherwise fall the other way.
"""

from dataclasses import dataclass
from itertools import product

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.affines import apply_affine, voxel_sizes

from xaiseg.errors import InputError

TOLERANCE = 1e-3  # mm; float32 headers place the corners of a head within about 1e-4 mm
NATIVE = "native"


@dataclass(frozen=True, eq=False)
class Grid:
    """The voxel grid of a volume.

    Attributes:
        shape: voxels along each axis, (X, Y, Z).
        affine: (4, 4) float64, voxel indices to world millimetres (R, A, S); read-only.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        x, y, z = (int(n) for n in self.shape)
        affine = np.array(self.affine, np.float64)
        affine.flags.writeable = False
        object.__setattr__(self, "shape", (x, y, z))
        object.__setattr__(self, "affine", affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Length of a voxel along each of its axes, in mm."""
        x, y, z = voxel_sizes(self.affine).tolist()
        return x, y, z

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel in mm³, right also for sheared grids."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def axis_codes(self) -> str:
        """The anatomical direction in which each voxel axis mostly runs, as in "LAS"."""
        return "".join(nib.aff2axcodes(self.affine))

    def to_world(self, ijk: np.ndarray) -> np.ndarray:
        """World coordinates in mm of voxel indices, (..., 3) to (..., 3)."""
        return apply_affine(self.affine, ijk)

    def crop(self, start: tuple[int, int, int], shape: tuple[int, ...]) -> "Grid":
        """The grid of the sub-array that begins at voxel `start` and has `shape` (axes after the third are ignored)."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(np.asarray(start, np.float64))
        return Grid((shape[0], shape[1], shape[2]), affine)


def difference(a: Grid, b: Grid, tolerance: float = TOLERANCE) -> str | None:
    """How two grids differ, as one phrase, or None where they agree.

    Grids of one shape are compared by how far apart they place the eight corners of the field of view: a small error in
    a rotation is then weighed by what it does to the volume.

    Args:
        tolerance: largest distance between corresponding corners that still counts as one grid, in mm.
    """
    if a.shape != b.shape:
        return f"{_by(a.shape)} voxels against {_by(b.shape)}"
    corners = np.array(list(product(*((-0.5, n - 0.5) for n in a.shape))))
    apart = np.linalg.norm(a.to_world(corners) - b.to_world(corners), axis=1).max()
    if apart <= tolerance:
        return None
    codes = "" if a.axis_codes == b.axis_codes else f", axes {a.axis_codes} against {b.axis_codes}"
    return f"corners of the field of view up to {apart:.3g} mm apart{codes}"


def reorientation(grid: Grid, codes: str) -> np.ndarray:
    """The transform from the axes of `grid` to those named by `codes`.

    Args:
        codes: three letters such as "LAS" or "RAS", or "native" for the axes as they are.

    Returns:
        nibabel's orientation transform, (3, 2).

    Raises:
        InputError: `codes` names no orientation.
    """
    if codes == NATIVE:
        return np.array([[0, 1], [1, 1], [2, 1]])
    if sorted(min(c, opposite) for c, opposite in _opposites(codes)) != ["A", "I", "L"]:
        raise InputError(
            f"orientation {codes!r}: expected {NATIVE!r} or three letters, one each of L/R, A/P and I/S, such as 'LAS'"
        )
    return orientations.ornt_transform(orientations.io_orientation(grid.affine), orientations.axcodes2ornt(codes))


def invert(transform: np.ndarray) -> np.ndarray:
    """The orientation transform that undoes `transform`, (3, 2) to (3, 2)."""
    inverse = np.empty((3, 2), int)
    for axis, (target, flip) in enumerate(transform.astype(int)):
        inverse[target] = axis, flip
    return inverse


def reorient(array: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Flip and permute the first three axes of (X, Y, Z) or (X, Y, Z, C); contiguous, of the same dtype."""
    return np.ascontiguousarray(orientations.apply_orientation(array, transform))


def reorient_grid(grid: Grid, transform: np.ndarray) -> Grid:
    """The grid of `reorient(array, transform)` for an array on `grid`: every voxel keeps its world coordinates."""
    shape = [0, 0, 0]
    for n, target in zip(grid.shape, transform[:, 0].astype(int), strict=True):
        shape[target] = n
    return Grid((shape[0], shape[1], shape[2]), grid.affine @ orientations.inv_ornt_aff(transform, grid.shape))


def _opposites(codes: str) -> list[tuple[str, str]]:
    return list(zip(codes, codes.translate(str.maketrans("LRAPIS", "RLPASI")), strict=True))


def _by(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))
