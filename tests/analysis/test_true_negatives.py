"""TN regions: they have the shapes of lesions, keep away from all of them, and are drawn evenly among the places there are."""

import itertools

import numpy as np
import pytest

from xaiseg.analysis.true_negatives import label_map, near, normal_white_matter, sample_true_negatives
from xaiseg.errors import InputError
from xaiseg.instances import instances_of, label_components

SPACING = (1.0, 1.0, 3.0)
SHAPE = (20, 22, 12)


def scene(seed=0):
    """Tissue with holes, a predicted and a reference lesion, three shapes."""
    rng = np.random.default_rng(seed)
    tissue = np.zeros(SHAPE, bool)
    tissue[2:-2, 2:-2, 1:-1] = rng.random((16, 18, 10)) > 0.01
    lesions = np.zeros(SHAPE, int)
    lesions[4:7, 4:7, 3:5] = 1
    lesions[12:14, 12, 6] = 2
    like = np.zeros(SHAPE, int)
    like[0, 0:4, 0] = like[1, 0, 0:2] = 1  # without symmetry
    like[5:7, 5:7, 5] = 2
    like[9, 9, 9] = 3
    return tissue, lesions, instances_of(like)


def poses(voxels, spacing):
    """All flips, and turns among axes of one spacing, as sets of voxels from the corner."""
    found = set()
    for axes in itertools.permutations(range(3)):
        if all(spacing[a] == spacing[n] for n, a in enumerate(axes)):
            for signs in itertools.product((1, -1), repeat=3):
                moved = voxels[:, axes] * np.array(signs)
                found.add(tuple(sorted(map(tuple, (moved - moved.min(0)).tolist()))))
    return found


def test_regions_have_the_shapes_of_lesions_and_keep_away():
    tissue, lesions, like = scene()
    regions = sample_true_negatives(lesions, tissue, SPACING, np.random.default_rng(3), like, distance_mm=3.0)
    assert [region.label for region in regions] == [1, 2, 3]
    taken = np.argwhere(lesions)
    for region, lesion in zip(regions, like, strict=True):
        voxels = region.voxels
        assert tissue[tuple(voxels.T)].all()
        assert tuple(sorted(map(tuple, (voxels - voxels.min(0)).tolist()))) in poses(lesion.voxels, SPACING)
        apart = np.sqrt((((voxels[:, None] - taken) * np.array(SPACING)) ** 2).sum(-1))
        assert apart.min() > 3  # from lesions and earlier regions, by a loop over pairs
        assert voxels.dtype == np.int32
        assert voxels.tolist() == sorted(voxels.tolist())  # C order
        taken = np.concatenate([taken, voxels])
    again = instances_of(label_map(regions, SHAPE))
    assert all((a.voxels == b.voxels).all() for a, b in zip(regions, again, strict=True))


def test_deterministic_in_the_generator():
    tissue, lesions, like = scene()
    first, same, other = (
        label_map(sample_true_negatives(lesions, tissue, SPACING, np.random.default_rng(seed), like), SHAPE)
        for seed in (1, 1, 2)
    )
    assert (first == same).all()
    assert (first != other).any()


def test_the_only_place_is_found_and_none_is_no_region():
    """A shape without symmetry fits one hole in one pose; once it is taken nothing is left."""
    _, _, like = scene()
    tissue = np.zeros(SHAPE, bool)
    hole = like[0].voxels * np.array([-1, 1, 1]) + np.array([10, 6, 4])
    tissue[tuple(hole.T)] = True
    empty = np.zeros(SHAPE, int)
    regions = sample_true_negatives(empty, tissue, SPACING, np.random.default_rng(0), [like[0], like[0]])
    assert [sorted(r.voxels.tolist()) for r in regions] == [sorted(hole.tolist())]
    assert sample_true_negatives(empty, ~tissue & False, SPACING, np.random.default_rng(0), like) == []


def test_places_are_drawn_evenly():
    """A pair of voxels in a row of 8: 7 places, each in 1/7 of the draws, by a chi-squared test that fails one time in 1000."""
    from scipy import stats

    tissue = np.zeros((10, 3, 3), bool)
    tissue[1:9, 1, 1] = True
    pair = instances_of(np.pad(np.ones((2, 1, 1), int), ((3, 5), (1, 1), (1, 1))))
    counts = np.zeros(7, int)
    for seed in range(700):
        (region,) = sample_true_negatives(
            np.zeros(tissue.shape, int), tissue, (1, 2, 3), np.random.default_rng(seed), pair
        )
        counts[region.voxels[0, 0] - 1] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_near_is_a_loop_over_pairs():
    mask = np.random.default_rng(1).random((7, 6, 5)) > 0.97
    voxels, inside = np.argwhere(np.ones(mask.shape, bool)), np.argwhere(mask)
    apart = np.sqrt((((voxels[:, None] - inside) * np.array(SPACING)) ** 2).sum(-1)).min(1)
    np.testing.assert_array_equal(near(mask, SPACING, 3.0).ravel(), apart <= 3.0)
    assert not near(np.zeros((3, 3, 3), bool), SPACING, 3.0).any()


def test_white_matter_of_a_phantom():
    """Of the phantom's own white matter, without lesions: nearly all that is found is, and much of it is found."""
    from xaiseg.imaging.phantom import phantom

    made = phantom(3, (48, 56, 48), 3.5)
    image = np.stack([made.flair, made.t1w], -1)
    found = normal_white_matter(image, made.lesions)
    white = (made.tissue == 3) & (made.lesions == 0)
    assert not (found & (made.lesions > 0)).any()
    assert (found & white).sum() / found.sum() > 0.93
    assert (found & white).sum() / white.sum() > 0.4
    # hyperintense places on FLAIR are no normal tissue, whoever marks them
    hidden = normal_white_matter(image, np.zeros_like(made.lesions))
    assert (hidden & (made.lesions > 0)).sum() < 0.2 * (made.lesions > 0).sum()
    regions = sample_true_negatives(
        made.lesions, found, (3.5,) * 3, np.random.default_rng(0), instances_of(label_components(made.lesions > 0)), 4.0
    )
    assert len(regions) >= 3
    with pytest.raises(InputError, match="t1w_channel is 2"):
        normal_white_matter(image, made.lesions, 2)
    with pytest.raises(InputError, match="lesions of shape"):
        normal_white_matter(image, made.lesions[1:])
    with pytest.raises(InputError, match="fewer than 3 intensities"):
        normal_white_matter(np.ones((4, 4, 4, 2)), np.zeros((4, 4, 4)))
