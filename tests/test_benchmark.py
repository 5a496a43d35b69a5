"""The lesions that benchmarks measure with lie where they are said to lie."""

import numpy as np
import pytest

from scripts.benchmarks.lesions import PLACES, ball, centre_at, radius, scattered, windows_of
from xaiseg.inference import plan_windows

SCAN = plan_windows((182, 218, 182), (96, 96, 96), 0.25)


@pytest.mark.parametrize("count", [1, 7, 20, 60, 200])
def test_a_ball_is_the_nearest_voxels_in_c_order(count):
    voxels = ball((5, 6, 7), count)
    assert voxels.shape == (count, 3)
    assert voxels.dtype == np.int32
    assert voxels.tolist() == sorted(map(list, {tuple(v) for v in voxels.tolist()}))
    grid = np.argwhere(np.ones((13, 13, 15))) - (5, 6, 7)
    np.testing.assert_array_equal(np.sort(((voxels - (5, 6, 7)) ** 2).sum(1)), np.sort((grid**2).sum(1))[:count])
    assert np.abs(voxels - (5, 6, 7)).max() <= radius(count)


@pytest.mark.parametrize("count", [20, 60, 200])
@pytest.mark.parametrize(("place", "windows"), list(zip(PLACES, (1, 2, 18), strict=True)))
def test_places_of_a_scan(count, place, windows):
    centre = centre_at(SCAN, place, count)
    voxels = ball(centre, count)
    assert windows_of(SCAN, voxels) == windows
    # each window holds all of it
    share = SCAN.coverage(voxels)[1]
    assert ((share > 0).all(1) == (share > 0).any(1)).all()


def test_a_place_may_not_exist():
    one = plan_windows((96, 96, 96), (96, 96, 96), 0.25)
    assert centre_at(one, "one window", 200) == centre_at(one, "most windows", 200) == (47, 47, 47)
    assert centre_at(one, "two windows", 200) is None
    assert centre_at(plan_windows((3, 96, 96), (96, 96, 96), 0.25), "one window", 200) is None


def test_a_small_volume_lies_in_the_middle_of_its_window():
    assert centre_at(plan_windows((20, 96, 96), (96, 96, 96), 0.25), "one window", 20) == (9, 47, 47)


def test_scattered_lesions_are_inside():
    lesions = scattered((20, 30, 25), 10, 60)
    assert [v.shape for v in lesions] == [(60, 3)] * 10
    assert all((v >= 0).all() and (v < (20, 30, 25)).all() for v in lesions)
