"""Where windows lie and what they weigh: the figures of shared/reference/sliding_window.md and properties."""

import numpy as np
import pytest

from xaiseg.inference import plan_windows


def starts(size, window=96, overlap=0.25):
    """Starts along the second axis of a volume that is one window wide elsewhere."""
    plan = plan_windows((window, size, window), (window,) * 3, overlap)
    assert set(plan.starts[:, 0]) == set(plan.starts[:, 2]) == {0}
    return plan.starts[:, 1].tolist()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (96, [0]),
        (97, [0, 1]),
        (100, [0, 4]),
        (168, [0, 72]),
        (169, [0, 72, 73]),
        (182, [0, 72, 86]),
        (218, [0, 72, 122]),
        (256, [0, 72, 144, 160]),
        (40, [0]),
    ],
)
def test_starts_of_the_papers_window(size, expected):
    assert starts(size) == expected


@pytest.mark.parametrize(
    ("size", "window", "overlap", "expected"),
    [
        (10, 4, 0.0, [0, 4, 6]),
        (10, 4, 0.5, [0, 2, 4, 6]),
        (6, 4, 0.99, [0, 1, 2]),  # a step of int(0.04) becomes one
        (20, 10, 0.333, [0, 6, 10]),  # int(6.67)
    ],
)
def test_starts_of_other_windows(size, window, overlap, expected):
    assert starts(size, window, overlap) == expected


def test_the_first_axis_is_outermost():
    plan = plan_windows((5, 5, 4), (4, 4, 4), 0.25)
    assert plan.starts.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]


def test_short_sides_are_padded_with_the_rest_after():
    plan = plan_windows((7, 12, 16), (16, 12, 12), 0.25)
    assert plan.padding == ((4, 5), (0, 0), (0, 0))
    assert plan.padded_shape == (16, 12, 16)


def test_the_papers_gaussian():
    weight = plan_windows((96, 96, 96), (96, 96, 96), 0.25).weight
    # the three figures that the reference page states
    np.testing.assert_allclose(weight.max(), 0.9974, atol=5e-5)
    assert weight.min() == np.float32(1e-3)
    np.testing.assert_allclose((weight == np.float32(1e-3)).mean(), 0.58, atol=0.005)
    t = np.array([-47.5, -20.5, 3.5])
    # float32 exponentials
    np.testing.assert_allclose(weight[0, 48, 48], max(np.exp(-(47.5**2 + 0.5) / 288), 1e-3), rtol=1e-5)
    np.testing.assert_allclose(weight[27, 48, 51], np.exp(-(t[1] ** 2 + 0.25 + t[2] ** 2) / 288), rtol=1e-5)
    np.testing.assert_array_equal(weight, weight[::-1, ::-1, ::-1])


def test_an_anisotropic_gaussian_scales_with_each_side():
    weight = plan_windows((8, 16, 4), (8, 16, 4), 0.25).weight
    expected = np.exp(-((2.5 / 1) ** 2 + (0.5 / 2) ** 2 + (0.5 / 0.5) ** 2) / 2)
    np.testing.assert_allclose(weight[1, 8, 2], expected, rtol=1e-5)


def test_constant_blending_is_a_mean():
    plan = plan_windows((5, 4, 4), (4, 4, 4), 0.25, "constant")
    assert (plan.weight == 1).all()
    assert plan.total_weight[:, 0, 0].tolist() == [1, 2, 2, 2, 1]


@pytest.mark.parametrize("blending", ["gaussian", "constant"])
@pytest.mark.parametrize("shape", [(19, 23, 13), (16, 16, 16), (40, 17, 5)])
def test_shares_of_every_voxel_add_to_one_and_are_the_blend_weights(shape, blending):
    plan = plan_windows(shape, (16, 16, 16), 0.25, blending)
    voxels = np.argwhere(np.ones(shape, bool)).astype(np.int32)[::7]
    local, share = plan.coverage(voxels)
    np.testing.assert_allclose(share.sum(0), 1, rtol=1e-6)
    low = np.array([lo for lo, _ in plan.padding])
    for window, start in enumerate(plan.starts):
        held = share[window] > 0
        np.testing.assert_array_equal(local[window] + start, voxels + low)
        np.testing.assert_array_equal(held, ((local[window] >= 0) & (local[window] < 16)).all(1))
        # the denominator is added up in float32 there, in float64 here
        weights = plan.weight[tuple(local[window][held].T)] / plan.total_weight[tuple((voxels[held] + low).T)]
        np.testing.assert_allclose(share[window][held], weights, rtol=1e-6)


def test_a_voxel_lies_in_up_to_eight_windows_of_an_ordinary_volume():
    plan = plan_windows((168, 168, 168), (96, 96, 96), 0.25)
    _, share = plan.coverage(np.array([[80, 80, 80], [0, 80, 80], [0, 0, 0], [71, 72, 95]], np.int32))
    assert (share > 0).sum(0).tolist() == [8, 4, 1, 4]
