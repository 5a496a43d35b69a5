"""Shapes of synthetic lesions: volumes and borders in closed form, on voxels of any size; real voxels come back as they were."""

import doctest

import numpy as np
import pytest
from scipy import ndimage

from xaiseg.analysis import lesion_shape
from xaiseg.analysis.lesion_shape import ellipsoid, free_centres, like_lesion, signed_distance, to_voxel
from xaiseg.errors import InputError

SHAPE = (40, 36, 30)
ISOTROPIC, THICK = (1.0, 1.0, 1.0), (0.8, 1.0, 2.5)


def test_examples():
    assert doctest.testmod(lesion_shape).failed == 0


def offsets(lesion, spacing, centre):
    """Of each voxel of the crop from the centre, mm."""
    grid = np.stack(np.meshgrid(*map(np.arange, lesion.weight.shape), indexing="ij"), -1)
    return (grid + np.array(lesion.start) - centre) * np.array(spacing)


@pytest.mark.parametrize("spacing", [ISOTROPIC, THICK])
@pytest.mark.parametrize("edge", [1.0, 4.0])
def test_a_ball_in_closed_form(spacing, edge):
    """Weight is linear in the distance; the volume of such a ball is 4/3 π (R³ + R e²/4)."""
    centre, radius = (20.3, 17.6, 14.2), 7.0
    lesion = ellipsoid(SHAPE, spacing, centre, 2 * radius, edge_mm=edge)
    away = np.linalg.norm(offsets(lesion, spacing, centre), axis=-1)
    np.testing.assert_allclose(lesion.weight, np.clip(0.5 - (away - radius) / edge, 0, 1), atol=1e-6)
    expected = 4 / 3 * np.pi * (radius**3 + radius * edge**2 / 4)
    # sampling at voxel centres, up to 2.5 mm apart along one axis
    assert lesion.volume_mm3(spacing) == pytest.approx(expected, rel=0.03)
    mask = np.zeros(SHAPE, bool)
    mask[tuple(lesion.voxels.T)] = True
    inside = np.linalg.norm((np.indices(SHAPE).transpose(1, 2, 3, 0) - centre) * spacing, axis=-1) <= radius
    assert (mask == inside).mean() > 0.9999
    assert (lesion.voxels == lesion.instance(4).voxels).all()


def test_an_ellipsoid_of_three_axes_keeps_each_axis():
    spacing, centre = THICK, (20, 18, 15)
    lesion = ellipsoid(SHAPE, spacing, centre, (16.0, 10.0, 20.0), edge_mm=0.0)
    away = offsets(lesion, spacing, centre) / np.array([8.0, 5.0, 10.0])
    np.testing.assert_array_equal(lesion.weight > 0, np.linalg.norm(away, axis=-1) <= 1)
    assert set(np.unique(lesion.weight)) <= {0, 1}


@pytest.mark.parametrize(("seed", "turned"), [(0, False), (2, True)])
def test_roughness_and_turns_change_the_shape_and_not_the_volume(seed, turned):
    diameters = (14.0, 10.0, 18.0)
    options = {"roughness": 0.15, "turned": turned, "edge_mm": 0.5, "seed": seed}
    lesion = ellipsoid((60, 60, 60), (0.5, 0.5, 0.5), (30, 30, 30), diameters, **options)
    # 0.5 mm voxels; the first-order distance shifts weight within a border of 0.5 mm
    assert lesion.volume_mm3((0.5, 0.5, 0.5)) == pytest.approx(np.pi / 6 * np.prod(diameters), rel=0.03)
    smooth = ellipsoid((60, 60, 60), (0.5, 0.5, 0.5), (30, 30, 30), diameters, edge_mm=0.5)
    a, b = ({tuple(v) for v in one.voxels.tolist()} for one in (lesion, smooth))
    assert 0.4 < len(a & b) / len(a | b) < 0.95
    whole = np.zeros((60, 60, 60), bool)
    whole[tuple(lesion.voxels.T)] = True
    assert ndimage.label(whole)[1] == 1
    again = ellipsoid((60, 60, 60), (0.5, 0.5, 0.5), (30, 30, 30), diameters, **options)
    other = ellipsoid((60, 60, 60), (0.5, 0.5, 0.5), (30, 30, 30), diameters, **{**options, "seed": 99})
    np.testing.assert_array_equal(lesion.weight, again.weight)
    assert lesion.weight.shape != other.weight.shape or (lesion.weight != other.weight).any()


def blobby(seed=0):
    """A real-looking voxel set, (n, 3)."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(18, 16, 12)), 2)
    labels, _ = ndimage.label(noise > np.quantile(noise, 0.8))
    return np.argwhere(labels == np.bincount(labels.ravel())[1:].argmax() + 1)


@pytest.mark.parametrize("spacing", [ISOTROPIC, THICK])
@pytest.mark.parametrize("edge", [0.0, 1.0, 3.0])
def test_a_real_lesion_comes_back_voxel_for_voxel(spacing, edge):
    real = blobby()
    moved = real + np.array([9, 11, 8])
    lesion = like_lesion(SHAPE, spacing, moved.mean(0), real, edge_mm=edge)
    np.testing.assert_array_equal(lesion.voxels, moved)
    if edge == 0:
        assert lesion.volume_mm3(spacing) == pytest.approx(len(real) * np.prod(spacing), rel=1e-6)


@pytest.mark.parametrize("factor", [0.8, 1.5])
def test_a_real_lesion_of_another_grid_and_size(factor):
    real, own = blobby(), (1.2, 1.0, 2.0)
    diameter = np.cbrt(6 / np.pi * len(real) * np.prod(own)) * factor
    centre = (40, 40, 40)
    lesion = like_lesion((80, 80, 80), (0.7, 0.7, 0.7), centre, real, voxels_spacing=own, diameter_mm=diameter)
    assert lesion.volume_mm3((0.7, 0.7, 0.7)) == pytest.approx(np.pi / 6 * diameter**3, rel=0.03)
    np.testing.assert_allclose(lesion.voxels.mean(0), centre, atol=0.7)


@pytest.mark.parametrize("diameter", [4.0, 6.0, 9.0])
def test_a_lesion_of_few_voxels_has_the_volume_that_is_asked_for(diameter):
    """33 voxels, of which trilinear interpolation rounds off a tenth. The soft border adds as to a ball, see `ellipsoid`."""
    real = np.argwhere(np.ones((5, 5, 5)))
    real = real[((real - 2) ** 2).sum(1) <= 4]
    rng = np.random.default_rng(0)
    options = {"voxels_spacing": (1.5, 1.25, 1.5), "diameter_mm": diameter}
    found = [
        like_lesion((30, 30, 30), ISOTROPIC, 15 + rng.uniform(-0.5, 0.5, 3), real, **options).volume_mm3(ISOTROPIC)
        for _ in range(8)
    ]
    assert np.mean(found) == pytest.approx(np.pi / 6 * diameter**3 * (1 + 1 / diameter**2), rel=0.02)


def test_signed_distance_is_that_to_the_faces_by_brute_force():
    spacing = np.array(THICK)
    mask = np.random.default_rng(3).random((6, 5, 4)) < 0.3
    found = signed_distance(mask, spacing)
    places = np.argwhere(np.ones_like(mask))
    for place in places:
        other = places[mask.ravel() != mask[tuple(place)]]
        centres = np.linalg.norm((other - place) * spacing, axis=1)
        faces = np.linalg.norm(np.maximum(np.abs(other - place) - 0.5, 0) * spacing, axis=1)
        nearest = faces[np.isclose(centres, centres.min())]
        sign = -1 if mask[tuple(place)] else 1
        # of voxels equally far by their centres any may be taken
        assert np.isclose(nearest, sign * found[tuple(place)]).any()


def test_places_in_world_and_in_tissue():
    affine = np.array([[-1.0, 0, 0, 90], [0, 0, 2, -30], [0, 1.5, 0, -50], [0, 0, 0, 1]])
    voxel = (10.5, 20.0, 7.25)
    np.testing.assert_allclose(to_voxel(affine, affine[:3, :3] @ voxel + affine[:3, 3]), voxel)
    tissue = np.zeros(SHAPE, bool)
    tissue[4:34, 5:30, 3:28] = True
    centres = free_centres(tissue, THICK, 4.0, 12, seed=1)
    assert len(centres) == 12
    np.testing.assert_array_equal(centres, free_centres(tissue, THICK, 4.0, 12, seed=1))
    assert (centres != free_centres(tissue, THICK, 4.0, 12, seed=2)).any()
    every = np.argwhere(np.ones(SHAPE, bool))
    for n, centre in enumerate(centres):
        ball = every[np.linalg.norm((every - centre) * THICK, axis=1) <= 4.0]
        assert tissue[tuple(ball.T)].all()
        assert (np.linalg.norm((centres[:n] - centre) * THICK, axis=1) > 8).all()
    assert len(free_centres(tissue, THICK, 40.0, 3)) == 0


def test_what_is_refused():
    with pytest.raises(InputError, match="no voxel of it lies in the volume"):
        ellipsoid(SHAPE, ISOTROPIC, (100, 5, 5), 5.0)
    with pytest.raises(InputError, match="expected positive diameters"):
        ellipsoid(SHAPE, ISOTROPIC, (5, 5, 5), 0.0)
    with pytest.raises(InputError, match="no voxels"):
        like_lesion(SHAPE, ISOTROPIC, (5, 5, 5), np.zeros((0, 3), int))
    with pytest.raises(InputError, match="expected a positive diameter"):
        like_lesion(SHAPE, ISOTROPIC, (5, 5, 5), blobby(), diameter_mm=-1)
