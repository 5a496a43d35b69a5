"""Surface distances against all pairs of surface voxels, and against a closed form."""

import numpy as np
import pytest

from xaiseg.metrics import surface_distances

STEPS = [s for s in np.ndindex(3, 3, 3) if sum(abs(n - 1) for n in s) == 1]


def surface(mask, axes=(0, 1, 2)):
    """Voxels with a face neighbour outside of the mask or of the array, one by one."""
    found = []
    for place in np.argwhere(mask):
        for step in STEPS:
            move = np.array(step) - 1
            n = place + move
            outside = (n < 0).any() or (n >= mask.shape).any() or not mask[tuple(n)]
            if outside and np.abs(move).argmax() in axes:
                found.append(place)
                break
    return np.array(found)


def by_pairs(predicted, reference, spacing, axes=(0, 1, 2)):
    one, other = (surface(mask, axes) * np.array(spacing) for mask in (predicted, reference))
    apart = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in other] for a in one])
    there, back = apart.min(1), apart.min(0)
    mean = (there.sum() + back.sum()) / (len(there) + len(back))
    return mean, max(np.percentile(there, 95), np.percentile(back, 95))


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.5, 0.7, 3.0)])
@pytest.mark.parametrize("density", [0.05, 0.4, 0.97])
def test_random_masks(density, spacing):
    rng = np.random.default_rng(3)
    predicted, reference = (rng.random((7, 6, 5)) < density for _ in range(2))
    assert surface_distances(predicted, reference, spacing) == pytest.approx(by_pairs(predicted, reference, spacing))


def test_two_boxes_in_millimetres():
    """A cube and the cube moved along z by 2 voxels of 3 mm: the Hausdorff distance is 6 mm, whatever the other axes are."""
    one, other = np.zeros((2, 12, 12, 12), bool)
    one[3:6, 3:6, 3:6] = other[3:6, 3:6, 5:8] = True
    assert surface_distances(one, other, (0.1, 0.1, 3)).hausdorff95 == pytest.approx(6)
    assert surface_distances(one, one, (0.1, 0.1, 3)) == (0, 0)
    assert surface_distances(one, other, (1, 1, 3)) == surface_distances(other, one, (1, 1, 3))


def test_the_border_of_the_array_is_a_surface():
    full, centre = np.ones((5, 5, 5), bool), np.zeros((5, 5, 5), bool)
    centre[2, 2, 2] = True
    assert surface_distances(full, centre) == pytest.approx(by_pairs(full, centre, (1, 1, 1)))


def test_a_slice_has_an_outline():
    """In (X, Y, 1), a filled square and its outline have one surface."""
    square, outline = np.zeros((2, 7, 7, 1), bool)
    square[1:6, 1:6] = outline[1:6, 1:6] = True
    outline[2:5, 2:5] = False
    square[3, 3] = False  # a hole, so that the surfaces differ
    expected = by_pairs(square, outline, (1, 2, 5), axes=(0, 1))
    assert surface_distances(square, outline, (1, 2, 5)) == pytest.approx(expected)
    assert expected[0] > 0


def test_masks_without_a_surface():
    nothing, something = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    for pair in ((nothing, nothing), (nothing, something), (something, nothing)):
        assert np.isnan(surface_distances(*pair)).all()
    with pytest.raises(ValueError, match="masks of shapes"):
        surface_distances(nothing, something[1:])
