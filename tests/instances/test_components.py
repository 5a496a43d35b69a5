"""Connected components against a flood fill, and the voxels of instances against their label map."""

from itertools import product

import numpy as np
import pytest

from xaiseg.instances import instances_of, label_components


def flood_fill(mask, connectivity):
    """Components in C order of their first voxel, by walking from neighbour to neighbour."""
    reach = {6: 1, 18: 2, 26: 3}[connectivity]
    steps = [s for s in product((-1, 0, 1), repeat=3) if 0 < sum(map(abs, s)) <= reach]
    labels = np.zeros(mask.shape, np.int32)
    count = 0
    for seed in np.ndindex(*mask.shape):
        if not mask[seed] or labels[seed]:
            continue
        count += 1
        labels[seed] = count
        front = [seed]
        while front:
            place = front.pop()
            for step in steps:
                n = tuple(a + b for a, b in zip(place, step, strict=True))
                if all(0 <= a < size for a, size in zip(n, mask.shape, strict=True)) and mask[n] and not labels[n]:
                    labels[n] = count
                    front.append(n)
    return labels


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.6])
def test_labels_are_the_flood_fills(connectivity, density):
    mask = np.random.default_rng(int(100 * density)).random((9, 11, 7)) < density
    labels = label_components(mask, connectivity)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, flood_fill(mask, connectivity))


def test_connectivity_is_how_many_coordinates_may_differ():
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 0] = mask[2, 2, 1] = True
    assert [label_components(mask, c).max() for c in (6, 18, 26)] == [3, 2, 1]
    with pytest.raises(ValueError, match="connectivity is 8, expected 6, 18 or 26"):
        label_components(mask, 8)


def test_small_components_go_before_numbering():
    mask = np.zeros((1, 1, 12), bool)
    mask[0, 0, [0, 2, 3, 5, 6, 7, 9, 10]] = True  # of 1, 2, 3 and 2 voxels
    assert label_components(mask, min_voxels=2)[0, 0].tolist() == [0, 0, 1, 1, 0, 2, 2, 2, 0, 3, 3, 0]
    assert label_components(mask, min_voxels=4).max() == 0
    assert label_components(np.zeros((2, 2, 2), bool)).max() == 0


def test_instances_hold_their_voxels_in_c_order():
    labels = np.random.default_rng(1).integers(0, 4, (5, 6, 7))
    labels[labels == 2] = 9
    found = instances_of(labels)
    assert [i.label for i in found] == [1, 3, 9]
    for instance in found:
        assert instance.voxels.dtype == np.int32
        np.testing.assert_array_equal(instance.voxels, np.argwhere(labels == instance.label))


def test_wanted_instances_are_found_or_named():
    labels = np.array([[[1, 0, 3, 7]]])
    assert [i.label for i in instances_of(labels, [7, 1])] == [1, 7]
    assert instances_of(labels, []) == []
    assert instances_of(np.zeros((2, 2, 2), int)) == []
    with pytest.raises(KeyError, match="2"):
        instances_of(labels, [1, 2])
