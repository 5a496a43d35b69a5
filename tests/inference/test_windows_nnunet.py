"""nnU-Net's tiles: the example of its own source, its rule by brute force, and a closed form of its weights."""

import math

import numpy as np
import pytest

from xaiseg.inference import plan_windows


def starts(shape, window, overlap=0.5):
    plan = plan_windows(shape, window, overlap, "gaussian", "nnunet")
    return [sorted(set(plan.starts[:, axis].tolist())) for axis in range(3)]


def test_the_example_of_its_source():
    """Side 110, tile 64, step 0.5: 0, 23, 46 (comment in `compute_steps_for_sliding_window`)."""
    assert starts((110, 64, 65), (64, 64, 64)) == [[0, 23, 46], [0], [0, 1]]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_as_few_windows_as_the_step_allows_evenly_spread(overlap):
    for size in range(8, 60):
        (found, _, _) = starts((size, 8, 8), (8, 8, 8), overlap)
        fewest = next(
            n for n in range(1, 100) if (n == 1 and size == 8) or (n > 1 and (size - 8) / (n - 1) <= 8 * (1 - overlap))
        )
        assert len(found) == fewest
        assert (found[0], found[-1]) == (0, size - 8)
        exact = np.linspace(0, size - 8, fewest)
        assert np.abs(np.array(found) - exact).max() <= 0.5


def test_slices_of_a_two_dimensional_network_come_once_each():
    assert starts((5, 8, 12), (1, 8, 8)) == [[0, 1, 2, 3, 4], [0], [0, 4]]


@pytest.mark.parametrize("window", [(16, 24, 9), (1, 16, 12)])
def test_weights_are_a_cut_off_gaussian(window):
    """A point filtered with σ = n/8: exp(-t²/2σ²) within 4 σ of voxel n//2, its maximum 10; elsewhere its smallest value."""
    expected = np.ones(window)
    for axis, n in enumerate(window):
        t, sigma = np.arange(n) - n // 2, n / 8
        line = np.where(np.abs(t) <= int(4 * sigma + 0.5), np.exp(-(t**2) / (2 * sigma**2)), 0)
        expected = expected * line.reshape([-1 if a == axis else 1 for a in range(3)])
    expected = 10 * expected / expected.max()
    expected = np.where(expected == 0, expected[expected > 0].min(), expected)
    found = plan_windows(window, window, 0.5, "gaussian", "nnunet").weight
    # float32 rounding of values up to 10
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_small_volumes_are_padded_and_shares_add_up():
    plan = plan_windows((5, 20, 11), (8, 8, 8), 0.5, "gaussian", "nnunet")
    assert plan.padding == ((1, 2), (0, 0), (0, 0))
    voxels = np.argwhere(np.ones(plan.shape)).astype(np.int32)
    _, share = plan.coverage(voxels)
    np.testing.assert_allclose(share.sum(0), 1, rtol=1e-6)
    assert len(plan.starts) == math.prod([1, 4, 2])
