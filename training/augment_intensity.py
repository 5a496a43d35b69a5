"""Augmentation of intensities. Pure functions of one image `(X, Y, Z, C)` with explicit parameters, drawn in `augment`.

Where a parameter is `(C,)`, each channel has its own. Sums run over all voxels of the patch, background included, as in nnU-Net.

Blurring and the simulation of low resolution are linear and separable, so each is three small matrices: a product with them
takes the same time whatever the parameters are, and on a CPU a third of that of shifted copies.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_SMALLEST = 1e-7  # of a range or deviation that is divided by, as in nnU-Net
_TRUNCATE = 4.0  # σ at which a Gaussian is cut off, as in SciPy


def shift(image: Array, offset: Array) -> Array:
    """`x + offset`, a scalar or `(C,)`."""
    return image + _per_channel(offset)


def scale(image: Array, factor: Array) -> Array:
    """`x · factor`, a scalar or `(C,)`. nnU-Net calls it brightness."""
    return image * _per_channel(factor)


def contrast(image: Array, factor: Array) -> Array:
    """`mean + (x - mean) · factor` `(C,)`, clipped to the range that the channel had."""
    mean = image.mean(axis=(0, 1, 2), keepdims=True)
    low, high = image.min(axis=(0, 1, 2), keepdims=True), image.max(axis=(0, 1, 2), keepdims=True)
    return jnp.clip(mean + (image - mean) * _per_channel(factor), low, high)


def gamma(image: Array, exponent: Array, invert: bool = False, retain: bool = True) -> Array:
    """`low + range · ((x - low) / range)^γ`, where low and range are those of the channel.

    Args:
        image: `(X, Y, Z, C)`.
        exponent: γ, positive, `(C,)`.
        invert: apply it to -x, and negate again: bright voxels are spread where dark ones would be.
        retain: give each channel its former mean and standard deviation afterwards.
    """
    axes = (0, 1, 2)
    x = -image if invert else image
    low = x.min(axis=axes, keepdims=True)
    extent = x.max(axis=axes, keepdims=True) - low
    y = low + extent * ((x - low) / jnp.maximum(extent, _SMALLEST)) ** _per_channel(exponent)
    if retain:
        deviation = jnp.maximum(y.std(axis=axes, keepdims=True), _SMALLEST)
        y = (y - y.mean(axis=axes, keepdims=True)) * (x.std(axis=axes, keepdims=True) / deviation)
        y = y + x.mean(axis=axes, keepdims=True)
    return -y if invert else y


def noise(key: Array, image: Array, deviation: Array) -> Array:
    """With independent Gaussian noise of a standard deviation, a scalar or `(C,)`, added."""
    return image + jax.random.normal(key, image.shape, image.dtype) * _per_channel(deviation)


def blur(image: Array, sigma: Array, largest: float) -> Array:
    """Convolved with a Gaussian, cut off at 4σ; at its border the image is mirrored about the centre of the last voxel.

    Args:
        image: `(X, Y, Z, C)`.
        sigma: `(C, 3)`, of each channel along each axis, in voxels; 0 leaves it as it is.
        largest: upper bound of sigma; a static number.
    """
    radius = int(_TRUNCATE * largest + 0.5)
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)

    def matrix(side: int, sigmas: Array) -> Array:
        """`(C, side, side)`"""
        width = jnp.maximum(sigmas, 1e-3)[:, None]  # so narrow that only the voxel itself has weight
        taps = jnp.exp(-((offsets[None, :] / width) ** 2) / 2)
        taps = jnp.where(jnp.abs(offsets)[None, :] <= jnp.floor(_TRUNCATE * width + 0.5), taps, 0.0)
        taps = taps / taps.sum(axis=1, keepdims=True)
        source = np.pad(np.arange(side), radius, mode="reflect")
        columns = source[np.arange(side)[:, None] + np.arange(2 * radius + 1)]
        rows = np.broadcast_to(np.arange(side)[:, None], columns.shape)
        weights = jnp.broadcast_to(taps[:, None, :], (len(taps), *columns.shape))
        return jnp.zeros((len(taps), side, side)).at[:, rows, columns].add(weights)

    return along_axes(image, [matrix(side, sigma[:, axis]) for axis, side in enumerate(image.shape[:3])])


def low_resolution(image: Array, zoom: Array) -> Array:
    """Taken down to `round(side · zoom)` voxels by the nearest voxel, and up again by linear interpolation, as nnU-Net does.

    Args:
        image: `(X, Y, Z, C)`.
        zoom: `(C,)`, above 0 and up to 1; 1 leaves the channel as it is.
    """

    def matrix(side: int) -> Array:
        """`(C, side, side)`. Voxel j of n lies at `(j + 1/2)·m/n - 1/2` of m; in whole numbers, which do not round."""
        fewer = jnp.maximum(jnp.round(side * zoom), 1).astype(jnp.int32)[:, None]
        numerator = jnp.maximum((2 * jnp.arange(side, dtype=jnp.int32)[None, :] + 1) * fewer - side, 0)
        low = numerator // (2 * side)
        weight = (numerator % (2 * side)).astype(jnp.float32) / (2 * side)
        nearest = [(2 * k + 1) * side // (2 * fewer) for k in (low, jnp.minimum(low + 1, fewer - 1))]
        columns = jnp.arange(side, dtype=jnp.int32)[None, None, :]
        lower, upper = ((k[..., None] == columns).astype(jnp.float32) for k in nearest)
        return lower * (1 - weight[..., None]) + upper * weight[..., None]

    return along_axes(image, [matrix(side) for side in image.shape[:3]])


def bias_field(image: Array, coefficients: Array) -> Array:
    """Multiplied by `exp(Σ c_ijk · x^i · y^j · z^k)` over `i + j + k` up to the order; x, y and z run from -1 to 1 over the patch.

    Args:
        image: `(X, Y, Z, C)`.
        coefficients: `(C, order + 1, order + 1, order + 1)`; those of a higher total degree are passed over.
    """
    powers = np.arange(coefficients.shape[1])
    low_order = np.add.outer(np.add.outer(powers, powers), powers) < len(powers)
    bases = [jnp.linspace(-1.0, 1.0, side)[:, None] ** powers[None, :].astype(np.float32) for side in image.shape[:3]]
    x, y, z = (jnp.broadcast_to(basis, (len(coefficients), *basis.shape)) for basis in bases)
    return image * jnp.exp(along_axes(jnp.moveaxis(jnp.where(low_order[None], coefficients, 0.0), 0, -1), [x, y, z]))


def along_axes(image: Array, matrices: list[Array]) -> Array:
    """The product with a matrix `(C, new side, side)` along each of the three axes, each channel with its own."""
    x = jnp.moveaxis(image, -1, 0)  # so that the products are of large matrices
    x = jnp.einsum("cix,cxyz->ciyz", matrices[0], x, precision="highest")
    x = jnp.einsum("ciy,cxyz->cxiz", matrices[1], x, precision="highest")
    x = jnp.einsum("ciz,cxyz->cxyi", matrices[2], x, precision="highest")
    return jnp.moveaxis(x, 0, -1)


def _per_channel(value: Array) -> Array:
    return jnp.reshape(value, (1, 1, 1, -1))
