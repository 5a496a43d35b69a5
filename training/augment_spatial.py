"""Augmentation of the place of voxels: mirrored, turned, or moved smoothly, image and reference alike.

Pure functions of one item with explicit parameters; what is random is drawn in `augment`. An image is `(X, Y, Z, C)`, a mask
`(X, Y, Z)`. Lengths are in voxels.

A movement is a map from each voxel of the result to the place in the input it is read from. Quarter turns, affine and elastic
movements are composed as maps first, so that each voxel is interpolated once.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

PLANES = ((0, 1), (0, 2), (1, 2))

# Places (X, Y, Z) along each of the three axes, float32, in voxels of the array that is read.
Places = tuple[Array, Array, Array]

# A cubic B-spline with knots h apart has the variance h²/3, so this many σ between knots make it as wide as a Gaussian of σ.
_KNOTS_PER_SIGMA = math.sqrt(3.0)


def flip(array: Array, axes: Array) -> Array:
    """Mirrored along each of the first three axes whose entry of `axes`, bool `(3,)`, is set."""
    for axis in range(3):
        array = jax.lax.cond(axes[axis], lambda x, axis=axis: jnp.flip(x, axis), lambda x: x, array)
    return array


def turn_matrix(turns: Array) -> Array:
    """The map `(3, 3)` of quarter turns in the planes xy, xz and yz, one after the other, as of `np.rot90`; `turns`: int `(3,)`.

    All of its entries are 0, 1 or -1, so that what is read through it and no other matrix is exact.
    """
    cosine, sine = jnp.array([1.0, 0.0, -1.0, 0.0])[turns % 4], jnp.array([0.0, 1.0, 0.0, -1.0])[turns % 4]
    total = jnp.eye(3)
    for i, (a, b) in enumerate(PLANES):
        matrix = jnp.eye(3).at[a, a].set(cosine[i]).at[a, b].set(sine[i]).at[b, a].set(-sine[i]).at[b, b].set(cosine[i])
        total = jnp.dot(total, matrix, precision="highest")
    return total


def affine_matrix(degrees: Array, scales: Array, shears: Array) -> Array:
    """`Rz·Ry·Rx·H·S` `(3, 3)`, the map from places of the result to places of the input, both seen from the centre.

    Args:
        degrees: `(3,)`, of the right-handed rotations Rx, Ry, Rz about the axes.
        scales: `(3,)`, the diagonal of S; above 1, things become smaller, as in nnU-Net.
        shears: `(3,)`, the entries xy, xz, yz of H, which is 1 on the diagonal and 0 below it.
    """
    (cx, cy, cz), (sx, sy, sz) = jnp.cos(jnp.radians(degrees)), jnp.sin(jnp.radians(degrees))
    one, zero = jnp.ones_like(cx), jnp.zeros_like(cx)
    rx = jnp.array([[one, zero, zero], [zero, cx, -sx], [zero, sx, cx]])
    ry = jnp.array([[cy, zero, sy], [zero, one, zero], [-sy, zero, cy]])
    rz = jnp.array([[cz, -sz, zero], [sz, cz, zero], [zero, zero, one]])
    shear = jnp.array([[one, shears[0], shears[1]], [zero, one, shears[2]], [zero, zero, one]])
    product = jnp.linalg.multi_dot([rz, ry, rx, shear], precision="highest")
    return product * scales[None, :]


def elastic_grid(shape: Sequence[int], sigma: float) -> tuple[int, int, int]:
    """Knots along each axis that a displacement of `shape` needs where its σ is `sigma` voxels or more."""
    x, y, z = (math.ceil((side - 1) / (_KNOTS_PER_SIGMA * sigma)) + 3 for side in shape)
    return x, y, z


def elastic_displacement(knots: Array, shape: Sequence[int], sigma: Array, amplitude: Array) -> Array:
    """A smooth displacement `(X, Y, Z, 3)` in voxels, the cubic B-spline through a coarse grid of random numbers.

    Each component is scaled so that its largest magnitude is `amplitude`. Below σ, roughly, it does not fold.

    Args:
        knots: `elastic_grid` x 3, drawn from a normal distribution.
        shape: of the result.
        sigma: of the Gaussian that is as wide as the spline, in voxels; not less than that of the grid.
        amplitude: in voxels.
    """
    spacing = _KNOTS_PER_SIGMA * sigma
    bases = [
        _spline_basis(jnp.arange(side), count, spacing) for side, count in zip(shape, knots.shape[:3], strict=True)
    ]
    # Axis by axis: 96³ x 3 values from 9³ x 3 in a few million multiplications.
    values = jnp.einsum("abcd,xa->xbcd", knots, bases[0], precision="highest")
    values = jnp.einsum("xbcd,yb->xycd", values, bases[1], precision="highest")
    values = jnp.einsum("xycd,zc->xyzd", values, bases[2], precision="highest")
    largest = jnp.abs(values).max(axis=(0, 1, 2), keepdims=True)
    return values * (amplitude / jnp.maximum(largest, 1e-6))


def places(
    shape: Sequence[int],
    source: Sequence[int],
    matrix: Array,
    translation: Array | None = None,
    displacement: Array | None = None,
) -> Places:
    """Where each voxel of the result is read: `matrix · (v - centre + displacement(v)) + translation + centre of the source`.

    The centres of result and source are at `(side - 1) / 2` of each axis. Displacement first, then the affine map, as in nnU-Net.

    Args:
        shape: of the result.
        source: of the array that is read.
        matrix: `(3, 3)`.
        translation: `(3,)`, in voxels of the source.
        displacement: `(X, Y, Z, 3)`.
    """
    centred = []
    for axis, side in enumerate(shape):
        line = (jnp.arange(side, dtype=jnp.float32) - (side - 1) / 2).reshape(
            [-1 if a == axis else 1 for a in range(3)]
        )
        centred.append(line if displacement is None else line + displacement[..., axis])
    centre = jnp.array([(side - 1) / 2 for side in source], jnp.float32)
    offset = centre if translation is None else centre + translation
    x, y, z = (sum((matrix[a, b] * centred[b] for b in range(3)), start=offset[a]) for a in range(3))
    return x, y, z


def read_linear(image: Array, where: Places) -> Array:
    """An image `(X, Y, Z, C)` read at places by trilinear interpolation; beyond its border the border is repeated."""
    channels = image.shape[-1]
    flat = image.reshape(-1, channels)
    corners = []
    for place, side in zip(where, image.shape, strict=False):
        inside = jnp.clip(place, 0, side - 1)
        low = jnp.floor(inside)
        index = low.astype(jnp.int32)
        corners.append(((index, 1 - (inside - low)), (jnp.minimum(index + 1, side - 1), inside - low)))
    total: Array | None = None
    for i, wx in corners[0]:
        for j, wy in corners[1]:
            row = (i * image.shape[1] + j) * image.shape[2]
            for k, wz in corners[2]:
                part = flat.at[row + k].get(mode="promise_in_bounds") * (wx * wy * wz)[..., None]
                total = part if total is None else total + part
    assert total is not None
    return total


def read_nearest(mask: Array, where: Places) -> Array:
    """A mask `(X, Y, Z)` read at the nearest voxel of each place (halves go up); beyond its border the border is repeated."""
    index = [
        jnp.floor(jnp.clip(place, 0, side - 1) + 0.5).astype(jnp.int32)
        for place, side in zip(where, mask.shape, strict=True)
    ]
    flat = (index[0] * mask.shape[1] + index[1]) * mask.shape[2] + index[2]
    return mask.reshape(-1).at[flat].get(mode="promise_in_bounds")


def affine(image: Array, matrix: Array, translation: Array | None = None) -> Array:
    """An image `(X, Y, Z, C)` moved by the map of `places`."""
    return read_linear(image, places(image.shape[:3], image.shape[:3], matrix, translation))


def affine_mask(mask: Array, matrix: Array, translation: Array | None = None) -> Array:
    """A mask `(X, Y, Z)` moved as `affine` moves its image."""
    return read_nearest(mask, places(mask.shape, mask.shape, matrix, translation))


def centre_crop(array: Array, margin: int) -> Array:
    """Without `margin` voxels at each end of the first three axes."""
    inside = tuple(slice(margin, side - margin) for side in array.shape[:3])
    return array[inside]


def _spline_basis(voxels: Array, count: int, spacing: Array) -> Array:
    """Values `(voxels, count)` of the cubic B-splines around knots at -1, 0, 1, … times `spacing`."""
    knots = jnp.arange(count, dtype=jnp.float32) - 1
    t = jnp.abs(voxels.astype(jnp.float32)[:, None] / spacing - knots[None, :])
    near = 2 / 3 - t**2 + t**3 / 2
    far = jnp.maximum(2 - t, 0) ** 3 / 6
    return jnp.where(t < 1, near, far)
