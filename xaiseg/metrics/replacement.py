"""What stands in for voxels that are taken from an image: a reference image, or what their neighbours suggest."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.sparse.linalg import cg

from xaiseg.metrics.instance_score import generator
from xaiseg.saliency.baselines import Baseline, reference_image

Replace = Callable[[np.ndarray], Array]
"""From a mask `(X, Y, Z, C)` of what is taken away to the image without it."""

Replacement = Callable[[Array, Array], Replace]
"""`(key, image) -> replace`: what is needed of an image `(X, Y, Z, C)` is prepared once, then masks are given one by one."""

# Of the right-hand side: far below the noise that is added.
_TOLERANCE = 1e-5
_STEP = 16


def by_baseline(baseline: Baseline) -> Replacement:
    """Masked elements take the value of a reference image, see `saliency.baselines`."""

    def prepare(key: Array, image: Array) -> Replace:
        reference = reference_image(baseline, image)
        return lambda mask: jnp.where(mask, reference, image)

    return prepare


def noisy_linear(noise: float = 0.01) -> Replacement:
    """Noisy linear imputation (ROAD; Rong et al., ICML 2022), in three dimensions: each masked voxel is the weighted mean of its
    26 neighbours, masked ones included, plus noise. Where the mask was can then hardly be seen.

    Weights are as one over the squared distance in voxels, which in 2-D are the paper's: 1 through faces, 1/2 through edges, 1/3
    through corners; what lies beyond the volume does not count. The equations of all masked voxels of a channel are solved
    together by conjugate gradients, in float32, to 1e-5 of the right-hand side. Where no voxel is known, all take the channel's
    mean.

    noise: standard deviation of the noise, in units of the image; one draw for an image, whatever the mask.
    Raises ValueError for a noise below 0.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> image = jnp.arange(5.0).reshape(5, 1, 1, 1)
    >>> mask = np.zeros(image.shape, bool)
    >>> mask[1:4] = True
    >>> filled = noisy_linear(noise=0)(jax.random.key(0), image)(mask)
    >>> [f"{v:.3f}" for v in filled.ravel().tolist()]
    ['0.000', '1.000', '2.000', '3.000', '4.000']
    """
    if not noise >= 0:
        raise ValueError(f"noise is {noise}, expected at least 0")

    def prepare(key: Array, image: Array) -> Replace:
        values = np.asarray(image, np.float64)
        drawn = noise * generator(key, 0).standard_normal(values.shape)

        def replace(mask: np.ndarray) -> Array:
            filled = values.copy()
            for c in range(values.shape[-1]):
                held = np.broadcast_to(mask, values.shape)[..., c]
                if held.any():
                    filled[held, c] = linear_imputation(values[..., c], held) + drawn[held, c]
            return jnp.asarray(filled.astype(image.dtype))

        return replace

    return prepare


def linear_imputation(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The imputed values `(n,)`, without noise, of the masked voxels of one channel `(X, Y, Z)`, in C order."""
    if mask.all():
        return np.full(mask.size, values.mean())
    # every group of masked voxels touches a known one, for the grid is connected: the equations have one solution
    level = values[~mask].mean()
    place = np.argwhere(mask)
    low, high = np.maximum(place.min(0) - 1, 0), np.minimum(place.max(0) + 2, mask.shape)
    box = tuple(map(slice, low.tolist(), high.tolist()))
    # few shapes, so that programs are compiled for few
    room = [(0, -(-n // _STEP) * _STEP - n) for n in (high - low).tolist()]
    # counted from the level, so that float32 and the tolerance are of what differs from it
    known, masked, weight = (
        np.pad(v, room) for v in (np.where(mask, 0, values - level)[box], mask[box], _weights(mask.shape, box))
    )
    found, left = _solve(known.astype(np.float32), masked, weight.astype(np.float32))
    if not float(left) < 1e-3:
        raise ValueError(f"imputation of {len(place)} voxels did not converge: are there values that are not finite?")
    return level + np.asarray(found, np.float64)[masked]


def _weights(shape: Sequence[int], box: tuple[slice, ...]) -> np.ndarray:
    """The weights of all neighbours of each voxel of a box that lie in the volume, added up."""
    inner = [np.arange(n)[part] for n, part in zip(shape, box, strict=True)]
    x, y, z = np.ix_(*((i > 0).astype(float) + (i < n - 1) for i, n in zip(inner, shape, strict=True)))
    return x + y + z + (x * y + x * z + y * z) / 2 + x * y * z / 3


@jax.jit
def _solve(known: Array, mask: Array, weight: Array) -> tuple[Array, Array]:
    """The masked values, and what is left of the right-hand side, as a share of it, by conjugate gradients."""
    scale = jnp.where(mask, 1 / jnp.sqrt(jnp.where(mask, weight, 1.0)), 0.0)  # symmetric: then the diagonal is one

    def system(x: Array) -> Array:
        return x - scale * _neighbour_sum(scale * x)

    right = scale * _neighbour_sum(known)
    found, _ = cg(system, right, tol=_TOLERANCE, maxiter=1000)
    size, left = jnp.linalg.norm(right), jnp.linalg.norm(right - system(found))
    return scale * found, jnp.where(size == 0, 0.0, left / size)


def _neighbour_sum(values: Array) -> Array:
    """Of each voxel's 26 neighbours, each over its squared distance in voxels; zero lies beyond the array."""
    x, y, z = (partial(_beside, axis=axis) for axis in range(3))
    along_x, along_y = x(values), y(values)
    corners = y(along_x)
    edges = corners + z(along_x + along_y)
    return along_x + along_y + z(values) + edges / 2 + z(corners) / 3


def _beside(values: Array, axis: int) -> Array:
    """The sum of both neighbours along an axis."""
    count = values.shape[axis]
    wider = jnp.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(values.ndim)])
    first, last = (jax.lax.slice_in_dim(wider, start, start + count, axis=axis) for start in (0, 2))
    return first + last
