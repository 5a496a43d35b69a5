"""Radial profiles against a loop over voxels, on anisotropic, oblique and unlike grids; and their mean over lesions."""

import itertools

import numpy as np
import pytest

from xaiseg.analysis.profiles import bin_edges, mean_profiles, radial_profile, sign_of_profile
from xaiseg.analysis.saved_maps import SavedMap
from xaiseg.imaging import Grid

# Powers of two, so that distances on the grid are exact.
SPACING = np.array([1.0, 0.5, 2.0])


def turned(spacing):
    """An affine turned by 30 degrees about z, with the first axis flipped."""
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(spacing * [-1, 1, 1])
    affine[:3, 3] = 12, -7, 3
    return affine


def lesion(shape, centre, radius):
    places = (np.indices(shape).reshape(3, -1).T - centre) * SPACING
    return ((places**2).sum(1) <= radius**2).reshape(shape)


def by_loop(whole, mask, edges):
    """Every voxel's distance to every other, one by one."""
    voxels = np.argwhere(np.ones(mask.shape, bool))
    inside, outside = np.argwhere(mask), np.argwhere(~mask)
    means = np.full((len(edges) - 1, whole.shape[-1]), np.nan)
    found = {n: [] for n in range(len(means))}
    for voxel in voxels:
        within = mask[tuple(voxel)]
        others = outside if within else inside
        d = np.sqrt((((others - voxel) * SPACING) ** 2).sum(1)).min()
        for n, (a, b) in enumerate(itertools.pairwise(edges)):
            if (a <= -d < b) if within else (a < d <= b):
                found[n].append(whole[tuple(voxel)])
    for n, values in found.items():
        if values:
            means[n] = np.mean(values, 0)
    return means, [len(values) for values in found.values()]


@pytest.mark.parametrize("affine", [np.diag([*SPACING, 1]), turned(SPACING)], ids=["straight", "turned"])
@pytest.mark.parametrize("centre", [(6, 9, 4), (1, 2, 1)], ids=["middle", "corner"])
def test_profile_is_that_of_a_loop(affine, centre):
    """The map is a crop that ends within reach, beyond which it is zero; another lesion is around and counts as surroundings."""
    shape = (12, 20, 8)
    rng = np.random.default_rng(0)
    labels = 3 * lesion(shape, centre, 2.5).astype(int)
    labels[9:, 14:, 5:] = 5
    grid, start = Grid(shape, affine), (1, 0, 1)
    crop = rng.standard_normal((9, 15, 6, 2))
    whole = np.zeros((*shape, 2))
    whole[1:10, 0:15, 1:7] = crop
    edges = bin_edges(3, 5, 1)
    means, counts = by_loop(whole, labels == 3, edges)
    found = radial_profile(SavedMap(crop, grid.crop(start, crop.shape), labels, grid, 3), edges)
    assert found.voxels.tolist() == counts
    np.testing.assert_allclose(found.mean, means, atol=1e-12)


def test_ball_of_known_sign():
    """Positive within 3 mm of its centre, negative beyond: the profile changes sign at the border."""
    shape = (24, 48, 12)
    mask = lesion(shape, (12, 24, 6), 4.0)
    values = np.where(mask, 2.0, -1.0)[..., None]
    grid = Grid(shape, np.diag([*SPACING, 1]))
    found = radial_profile(SavedMap(values, grid, mask.astype(int), grid, 1), bin_edges(4, 6, 0.5))
    zero = 8
    assert (found.mean[:zero][found.voxels[:zero] > 0] == 2).all()
    assert (found.mean[zero:][found.voxels[zero:] > 0] == -1).all()
    assert found.voxels[zero + 1 :].all()


def test_map_on_a_finer_grid_takes_the_nearest_label():
    """Voxels halved along x: the profile is that of the label map repeated on them."""
    shape = (10, 20, 8)
    mask = lesion(shape, (5, 10, 4), 3.0).astype(int)
    coarse = Grid(shape, np.diag([*SPACING, 1]))
    halved = np.diag([0.5, 0.5, 2.0, 1])
    halved[0, 3] = -0.25
    fine = Grid((20, 20, 8), halved)
    rng = np.random.default_rng(1)
    values = rng.standard_normal((20, 20, 8, 1))
    found = radial_profile(SavedMap(values, fine, mask, coarse, 1), bin_edges(4, 4, 1))
    same = radial_profile(SavedMap(values, fine, np.repeat(mask, 2, 0), fine, 1), bin_edges(4, 4, 1))
    assert found.voxels.tolist() == same.voxels.tolist()
    np.testing.assert_allclose(found.mean, same.mean, atol=1e-12)
    assert radial_profile(SavedMap(values, fine, mask, coarse, 2), bin_edges(4, 4, 1)) is None


def test_rounded_headers_move_no_voxel_to_another_bin():
    shape, mask = (9, 9, 9), np.zeros((9, 9, 9), int)
    mask[4, 4, 4] = 1
    values = np.random.default_rng(2).standard_normal((9, 9, 9, 1))
    exact, rounded = (Grid(shape, np.diag([s, s, s, 1])) for s in (1.0, float(np.float32(1) - np.float32(6e-8))))
    found = [
        radial_profile(SavedMap(values, grid, mask, grid, 1), bin_edges(2, 4, 1)).voxels.tolist()
        for grid in (exact, rounded)
    ]
    assert found[0] == found[1]
    assert found[0][2] == 6  # the six neighbours through faces are 1 mm away


def test_mean_over_lesions_and_its_interval():
    """Each lesion counts once; bins that a lesion has no voxels in are left out; a patient is resampled with all lesions."""
    profiles = np.array([[[1.0], [2]], [[3], [np.nan]], [[8], [4]]])
    edges = np.array([-1.0, 0, 1])
    patients, groups = np.array(["p", "p", "q"]), np.array(["TP"] * 3)
    rows = mean_profiles(profiles, patients, groups, ["FLAIR"], edges, 200)
    assert [(row["mean"], row["lesions"], row["patients"]) for row in rows] == [(4, 3, 2), (3, 2, 2)]
    # resamples are of p alone, q alone, or both
    assert (rows[0]["low"], rows[0]["high"]) == (2, 8)
    assert [(row["from_mm"], row["to_mm"]) for row in rows] == [(-1, 0), (0, 1)]
    alone = mean_profiles(profiles[:2], patients[:2], groups[:2], ["FLAIR"], edges, 50)
    assert np.isnan(alone[0]["low"])


def test_where_the_profile_turns_negative():
    rows = [{"from_mm": f, "mean": m} for f, m in ((-1, 2), (0, 1), (1, 0.5), (2, -0.1), (3, -0.2))]
    assert sign_of_profile(rows) == 2
    assert sign_of_profile(rows[:3]) is None
