"""Movements of voxels against NumPy and SciPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy.interpolate import BSpline

from training.augment_spatial import (
    affine,
    affine_mask,
    affine_matrix,
    centre_crop,
    elastic_displacement,
    elastic_grid,
    flip,
    places,
    read_linear,
    read_nearest,
    turn_matrix,
)

SHAPE = (9, 10, 11)
# Places are good to 1e-6 voxels (float32, some tens of voxels from zero), intensities differ by a few between neighbours.
ATOL = 2e-5


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(*SHAPE, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    """Smooth enough to have an inside, as a lesion has."""
    return (ndimage.gaussian_filter(np.random.default_rng(1).normal(size=SHAPE), 1.0) > 0.1).astype(np.uint8)


def matrix() -> np.ndarray:
    parts = ([12.0, -7.0, 20.0], [1.1, 0.85, 0.95], [0.1, -0.05, 0.07])
    return np.asarray(affine_matrix(*(jnp.array(part) for part in parts)))


def test_affine_matrix_is_the_product_of_its_parts() -> None:
    def turn(a: int, b: int, degrees: float) -> np.ndarray:
        rotation = np.eye(3)
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        rotation[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
        return rotation

    shear = np.array([[1, 0.1, -0.05], [0, 1, 0.07], [0, 0, 1]])
    expected = turn(0, 1, 20) @ turn(2, 0, -7) @ turn(1, 2, 12) @ shear @ np.diag([1.1, 0.85, 0.95])
    np.testing.assert_allclose(matrix(), expected, atol=1e-6)


def test_affine_is_scipy_s(image: np.ndarray, mask: np.ndarray) -> None:
    """Trilinear, nearest for the mask, the border repeated; about the centre."""
    a, move = matrix().astype(float), np.array([0.6, -1.3, 0.4])
    centre = (np.array(SHAPE) - 1) / 2
    offset = centre - a @ centre + move
    moved = jax.jit(affine)(image, jnp.array(a, jnp.float32), jnp.array(move, jnp.float32))
    for c in range(2):
        expected = ndimage.affine_transform(image[..., c].astype(float), a, offset, order=1, mode="nearest")
        np.testing.assert_allclose(moved[..., c], expected, atol=ATOL)
    moved_mask = jax.jit(affine_mask)(mask, jnp.array(a, jnp.float32), jnp.array(move, jnp.float32))
    assert moved_mask.dtype == np.uint8
    np.testing.assert_array_equal(moved_mask, ndimage.affine_transform(mask, a, offset, order=0, mode="nearest"))


def test_affine_and_elastic_are_one_interpolation(image: np.ndarray, mask: np.ndarray) -> None:
    """Displacement first, then the matrix; read for a smaller result whose centre is that of the larger source."""
    shape, a = (5, 6, 7), matrix().astype(float)
    u = np.random.default_rng(2).normal(size=(*shape, 3))
    grid = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij"), -1)
    where = np.einsum("ab,xyzb->axyz", a, grid + u) + ((np.array(SHAPE) - 1) / 2)[:, None, None, None]
    ours = places(shape, SHAPE, jnp.array(a, jnp.float32), None, jnp.array(u, jnp.float32))
    np.testing.assert_allclose(np.stack(ours), where, atol=1e-5)
    for c in range(2):
        expected = ndimage.map_coordinates(image[..., c].astype(float), where, order=1, mode="nearest")
        np.testing.assert_allclose(read_linear(jnp.asarray(image), ours)[..., c], expected, atol=5 * ATOL)
    expected = ndimage.map_coordinates(mask, where, order=0, mode="nearest")
    np.testing.assert_array_equal(read_nearest(jnp.asarray(mask), ours), expected)


def test_a_displacement_is_the_tensor_product_of_b_splines() -> None:
    shape, sigma, amplitude = (12, 9, 7), 2.5, 1.5
    count = elastic_grid(shape, 2.0)  # a grid for σ = 2 serves a larger one
    knots = np.random.default_rng(0).normal(size=(*count, 3)).astype(np.float32)
    ours = jax.jit(elastic_displacement, static_argnums=1)(knots, shape, sigma, amplitude)
    spacing = np.sqrt(3) * sigma
    cubic = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    bases = [
        np.array([[np.nan_to_num(cubic(v / spacing - (k - 1))) for k in range(n)] for v in range(side)])
        for side, n in zip(shape, count, strict=True)
    ]
    # Splines sum to one at every voxel: the grid reaches beyond both ends.
    for basis in bases:
        np.testing.assert_allclose(basis.sum(axis=1), 1, atol=1e-12)
    field = np.einsum("abcd,xa,yb,zc->xyzd", knots, *bases)
    expected = field / np.abs(field).max(axis=(0, 1, 2)) * amplitude
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_allclose(np.abs(ours).max(axis=(0, 1, 2)), amplitude, rtol=1e-6)


def test_a_spline_is_as_wide_as_its_gaussian() -> None:
    """The second moment of one knot's bump is σ² along each axis."""
    sigma = 2.0
    shape = (33, 1, 1)
    knots = np.zeros((*elastic_grid(shape, sigma), 3), np.float32)
    knots[6, 1] = 1
    bump = np.asarray(jax.jit(elastic_displacement, static_argnums=1)(knots, shape, sigma, 1.0))[:, 0, 0, 0]
    x = np.arange(33)
    mean = (bump * x).sum() / bump.sum()
    variance = (bump * (x - mean) ** 2).sum() / bump.sum()
    np.testing.assert_allclose(variance, sigma**2, rtol=0.01)  # sampled at whole voxels


@pytest.mark.parametrize("turns", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 2, 1), (2, 3, 3)])
def test_quarter_turns_are_numpy_s_to_the_bit(turns: tuple[int, int, int]) -> None:
    cube = np.random.default_rng(0).normal(size=(6, 6, 6, 2)).astype(np.float32)
    expected = cube
    for k, plane in zip(turns, ((0, 1), (0, 2), (1, 2)), strict=True):
        expected = np.rot90(expected, k, plane)
    turned = jax.jit(affine)(cube, turn_matrix(jnp.array(turns)))
    np.testing.assert_array_equal(turned, expected)


@pytest.mark.parametrize("axes", [(True, False, False), (False, True, True), (False, False, False)])
def test_flips_are_numpy_s(image: np.ndarray, axes: tuple[bool, bool, bool]) -> None:
    expected = np.flip(image, [a for a in range(3) if axes[a]])
    np.testing.assert_array_equal(jax.jit(flip)(image, jnp.array(axes)), expected)


def test_a_centre_crop(image: np.ndarray) -> None:
    np.testing.assert_array_equal(centre_crop(jnp.asarray(image), 2), image[2:-2, 2:-2, 2:-2])
    np.testing.assert_array_equal(centre_crop(jnp.asarray(image), 0), image)
