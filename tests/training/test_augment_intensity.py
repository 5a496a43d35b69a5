"""Changes of intensity against NumPy and SciPy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from training.augment_intensity import bias_field, blur, contrast, gamma, low_resolution, noise, scale, shift

# Values of a few units, sums of some hundred of them, in float32.
ATOL = 1e-5


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Two channels of different range, one of them never negative, with a background of zeros."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(size=(9, 10, 11)), 3 * rng.random((9, 10, 11))], axis=-1)
    values[:3] = 0
    return values.astype(np.float32)


def per_channel(*values: float) -> jax.Array:
    return jnp.array(values, jnp.float32)


def test_shift_and_scale(image: np.ndarray) -> None:
    np.testing.assert_allclose(shift(jnp.asarray(image), jnp.float32(0.3)), image + 0.3, atol=ATOL)
    np.testing.assert_allclose(shift(jnp.asarray(image), per_channel(0.3, -2)), image + np.array([0.3, -2]), atol=ATOL)
    np.testing.assert_allclose(scale(jnp.asarray(image), jnp.float32(1.1)), image * 1.1, atol=ATOL)
    np.testing.assert_allclose(scale(jnp.asarray(image), per_channel(0.8, 1.2)), image * [0.8, 1.2], atol=ATOL)


def test_contrast_keeps_mean_and_range(image: np.ndarray) -> None:
    changed = contrast(jnp.asarray(image), per_channel(0.7, 1.3))
    for c, factor in enumerate((0.7, 1.3)):
        x = image[..., c].astype(float)
        expected = np.clip(x.mean() + (x - x.mean()) * factor, x.min(), x.max())
        np.testing.assert_allclose(changed[..., c], expected, atol=ATOL)
    assert (np.asarray(changed[..., 1]) == image[..., 1].max()).sum() > 1  # some were clipped


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("retain", [False, True])
def test_gamma(image: np.ndarray, invert: bool, retain: bool) -> None:
    changed = jax.jit(gamma, static_argnums=(2, 3))(image, per_channel(0.7, 1.5), invert, retain)
    for c, exponent in enumerate((0.7, 1.5)):
        x = image[..., c].astype(float) * (-1 if invert else 1)
        y = ((x - x.min()) / np.ptp(x)) ** exponent * np.ptp(x) + x.min()
        if retain:
            y = (y - y.mean()) / y.std() * x.std() + x.mean()
        np.testing.assert_allclose(changed[..., c], -y if invert else y, atol=3 * ATOL)


def test_a_channel_without_contrast_stays_as_it_is() -> None:
    """A patch of background, of which nothing may become NaN."""
    flat = jnp.full((4, 4, 4, 2), 2.0)
    for changed in (gamma(flat, per_channel(0.7, 1.5)), contrast(flat, per_channel(0.7, 1.5))):
        np.testing.assert_allclose(changed, 2.0, rtol=1e-6)


def test_noise_has_its_deviation_and_is_independent(image: np.ndarray) -> None:
    x = jnp.zeros((24, 24, 24, 2))
    added = np.asarray(jax.jit(noise)(jax.random.key(0), x, per_channel(0.1, 0.3)))
    # 13824 voxels: the deviation is known to 0.6 %, a correlation to 0.0085; four of these.
    np.testing.assert_allclose(added.std(axis=(0, 1, 2)), [0.1, 0.3], rtol=0.024)
    for a, b in ((added[1:], added[:-1]), (added[:, 1:], added[:, :-1]), (added[..., 0], added[..., 1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.034
    np.testing.assert_array_equal(noise(jax.random.key(0), jnp.asarray(image), jnp.float32(0)), image)


def test_blur_is_scipy_s(image: np.ndarray) -> None:
    """For each channel and axis its own σ; 0.6 and 1 voxels are cut off at different radii, and one channel may be left out."""
    sigma = np.array([[0.6, 1.0, 0.8], [0.5, 0.0, 0.9]])
    blur_image = jax.jit(partial(blur, largest=1.2))
    blurred = blur_image(image, jnp.array(sigma, jnp.float32))
    for c in range(2):
        expected = ndimage.gaussian_filter(image[..., c].astype(float), sigma[c], mode="mirror")
        np.testing.assert_allclose(blurred[..., c], expected, atol=ATOL)
    np.testing.assert_array_equal(blur_image(image, jnp.zeros((2, 3))), image)


def test_low_resolution_is_the_loop(image: np.ndarray) -> None:
    """Nearest voxel down; linear interpolation between the centres of the larger voxels up."""
    zooms = (0.5, 0.77)
    lowered = jax.jit(low_resolution)(image, per_channel(*zooms))

    def along(x: np.ndarray, axis: int, zoom: float) -> np.ndarray:
        n = x.shape[axis]
        m = round(n * zoom)
        few = np.stack([x.take(int((i + 0.5) * n / m), axis) for i in range(m)], axis)
        result = []
        for j in range(n):
            place = min(max((j + 0.5) * m / n - 0.5, 0), m - 1)
            low = int(place)
            high = min(low + 1, m - 1)
            result.append(few.take(low, axis) * (1 - place + low) + few.take(high, axis) * (place - low))
        return np.stack(result, axis)

    for c, zoom in enumerate(zooms):
        expected = image[..., c].astype(float)
        for axis in range(3):
            expected = along(expected, axis, zoom)
        np.testing.assert_allclose(lowered[..., c], expected, atol=ATOL)
    np.testing.assert_array_equal(jax.jit(low_resolution)(image, per_channel(1, 1)), image)


def test_bias_field_is_a_polynomial_of_low_degree(image: np.ndarray) -> None:
    coefficients = np.random.default_rng(0).uniform(-0.3, 0.3, size=(2, 4, 4, 4)).astype(np.float32)
    changed = jax.jit(bias_field)(image, coefficients)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape[:3]), indexing="ij")
    i, j, k = np.indices((4, 4, 4))
    for c in range(2):
        field = np.polynomial.polynomial.polyval3d(x, y, z, np.where(i + j + k <= 3, coefficients[c], 0.0))
        np.testing.assert_allclose(changed[..., c], image[..., c] * np.exp(field), atol=2 * ATOL)
    assert not np.asarray(changed[:3]).any()  # the background stays zero
