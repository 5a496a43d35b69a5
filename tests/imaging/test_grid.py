"""Grids, their comparison, and the way to the model's orientation and back."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from xaiseg.errors import InputError
from xaiseg.imaging.grid import Grid, difference, invert, reorient, reorient_grid, reorientation

SHAPE = (5, 6, 7)
CODES = [
    "".join(pair[s] for pair, s in zip(axes, signs, strict=True))
    for axes in permutations(["LR", "AP", "IS"])
    for signs in product((0, 1), repeat=3)
]


def rotation(degrees: float) -> np.ndarray:
    """About an axis that is none of the grid's."""
    a = np.deg2rad(degrees)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    return x @ z


def affine_of(codes: str, degrees: float = 0.0) -> np.ndarray:
    """Axes as named, spacing 1 x 1.5 x 2.5 mm along them, turned, off the origin."""
    directions = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ np.array([directions[c] for c in codes]).T @ np.diag([1, 1.5, 2.5])
    affine[:3, 3] = 90, -126, -72
    return affine


def test_grid_properties() -> None:
    grid = Grid(SHAPE, affine_of("LAS", 10))
    np.testing.assert_allclose(grid.spacing, (1, 1.5, 2.5), rtol=1e-12)  # a rotation keeps lengths
    assert grid.voxel_volume == pytest.approx(1 * 1.5 * 2.5, rel=1e-12)
    assert grid.axis_codes == "LAS"
    sheared = Grid(SHAPE, np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    assert sheared.voxel_volume == pytest.approx(1, rel=1e-12)  # a shear keeps volume, though not lengths
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 2


def test_grid_does_not_follow_the_array_it_was_made_from() -> None:
    affine = np.eye(4)
    grid = Grid(SHAPE, affine)
    affine[0, 3] = 9
    assert grid.to_world(np.array([0, 0, 0])).tolist() == [0, 0, 0]


def test_difference() -> None:
    grid = Grid((100, 100, 100), np.eye(4))
    assert difference(grid, Grid((100, 100, 100), np.eye(4))) is None
    assert difference(grid, Grid((100, 100, 99), np.eye(4))) == "100 x 100 x 100 voxels against 100 x 100 x 99"
    shifted = np.eye(4)
    shifted[0, 3] = 0.25
    assert "up to 0.25 mm apart" in (difference(grid, Grid(grid.shape, shifted)) or "")
    assert difference(grid, Grid(grid.shape, shifted), tolerance=0.3) is None


def test_difference_weighs_a_small_rotation_at_the_corners() -> None:
    # 2e-5 in an entry is far below the tolerance, but 100 voxels away it moves a corner by 2e-3 mm.
    turned = np.eye(4)
    turned[0, 1] = 2e-5
    assert difference(Grid((100, 100, 100), np.eye(4)), Grid((100, 100, 100), turned)) is not None
    assert difference(Grid((10, 10, 10), np.eye(4)), Grid((10, 10, 10), turned)) is None


def test_difference_names_flipped_axes() -> None:
    phrase = difference(Grid(SHAPE, affine_of("LAS")), Grid(SHAPE, affine_of("RAS")))
    assert phrase is not None
    assert phrase.endswith("axes LAS against RAS")


@pytest.mark.parametrize("stored", CODES)
@pytest.mark.parametrize("degrees", [0, 20])
def test_every_orientation_goes_to_the_model_and_back(stored: str, degrees: float) -> None:
    grid = Grid(SHAPE, affine_of(stored, degrees))
    volume = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    for codes in ("LAS", "RAS", "native"):
        transform = reorientation(grid, codes)
        turned, turned_grid = reorient(volume, transform), reorient_grid(grid, transform)
        assert turned.shape == turned_grid.shape
        if codes != "native" and degrees == 0:
            assert turned_grid.axis_codes == codes
        # Every voxel, told by its value, keeps its world coordinates; 1e-10 mm is float64 rounding at 100 mm.
        for value in (0, 17, 101, 209):
            before, after = np.argwhere(volume == value)[0], np.argwhere(turned == value)[0]
            np.testing.assert_allclose(turned_grid.to_world(after), grid.to_world(before), rtol=0, atol=1e-10)
        back = invert(transform)
        np.testing.assert_array_equal(reorient(turned, back), volume)
        np.testing.assert_allclose(reorient_grid(turned_grid, back).affine, grid.affine, rtol=0, atol=1e-10)

        # A crop of the reoriented volume is, once back, a sub-array of the stored one at the place its affine says.
        start, stop = (1, 2, 0), (4, 4, 3)
        crop = turned[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
        crop_back = reorient(crop, back)
        crop_grid = reorient_grid(turned_grid.crop(start, crop.shape), back)
        corner = np.linalg.solve(grid.affine, crop_grid.affine)  # voxels of the crop to voxels of the stored volume
        np.testing.assert_allclose(corner[:3, :3], np.eye(3), rtol=0, atol=1e-10)
        i, j, k = np.rint(corner[:3, 3]).astype(int)
        a, b, c = crop_back.shape
        np.testing.assert_array_equal(crop_back, volume[i : i + a, j : j + b, k : k + c])


@pytest.mark.parametrize("stored", CODES[::5])
def test_reorientation_agrees_with_nibabel_and_keeps_channels(stored: str) -> None:
    grid = Grid(SHAPE, affine_of(stored))
    channels = np.arange(np.prod(SHAPE) * 2, dtype=np.float32).reshape(*SHAPE, 2)
    transform = reorientation(grid, "RAS")
    oracle = nib.as_closest_canonical(nib.Nifti1Image(channels, grid.affine))
    np.testing.assert_array_equal(reorient(channels, transform), np.asarray(oracle.dataobj))
    np.testing.assert_array_equal(reorient_grid(grid, transform).affine, oracle.affine)
    assert reorient(channels, transform).flags.c_contiguous


@pytest.mark.parametrize("degrees", [45, 45.001, 90])
def test_a_crop_of_a_scan_at_the_tipping_angle_returns(degrees: float) -> None:
    grid = Grid(SHAPE, affine_of("RAS", degrees))
    transform = reorientation(grid, "LAS")
    model = reorient_grid(grid, transform)
    start = (1, 1, 2)
    crop = reorient(np.zeros(SHAPE), transform)[1:4, 1:3, 2:5]
    returned = reorient_grid(model.crop(start, crop.shape), invert(transform))
    assert returned.shape == reorient(crop, invert(transform)).shape
    np.testing.assert_allclose(returned.affine[:3, :3], grid.affine[:3, :3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("codes", ["", "LA", "LLS", "LRS", "las", "XAS", "LASP"])
def test_codes_that_name_no_orientation(codes: str) -> None:
    with pytest.raises(InputError, match="three letters"):
        reorientation(Grid(SHAPE, np.eye(4)), codes)
