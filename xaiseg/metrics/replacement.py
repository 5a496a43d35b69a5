"""What stands in for voxels that are taken from an image: a reference image, or what their neighbours suggest."""

import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.sparse import coo_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import cg

from xaiseg.metrics.instance_score import generator
from xaiseg.saliency.baselines import Baseline, reference_image

Replace = Callable[[np.ndarray], Array]
"""From a mask `(X, Y, Z, C)` of what is taken away to the image without it."""

Replacement = Callable[[Array, Array], Replace]
"""`(key, image) -> replace`: what is needed of an image `(X, Y, Z, C)` is prepared once, then masks are given one by one."""

_NEIGHBOURS = [step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)]


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
    together by conjugate gradients, to 1e-6 of the right-hand side. What no known voxel surrounds takes the mean of the channel's
    known values; if there are none, of all its values.

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
    place = np.argwhere(mask)
    number = np.full(mask.shape, -1)
    number[mask] = np.arange(len(place))
    total, known_weight, known = np.zeros((3, len(place)))
    links: list[tuple[np.ndarray, np.ndarray, float]] = []
    for step in _NEIGHBOURS:
        weight = 1.0 / sum(abs(s) for s in step)  # the squared length of the step
        beside = place + step
        inside = np.flatnonzero(((beside >= 0) & (beside < mask.shape)).all(1))
        where = tuple(beside[inside].T)
        total[inside] += weight
        other = number[where]
        fixed = other < 0
        known_weight[inside[fixed]] += weight
        known[inside[fixed]] += weight * values[where][fixed]
        links.append((inside[~fixed], other[~fixed], weight))
    rows, columns = (np.concatenate([link[i] for link in links]) for i in (0, 1))
    weights = np.concatenate([np.full(len(link[0]), link[2]) for link in links])
    between = coo_array((weights, (rows, columns)), (len(place), len(place))).tocsr()
    level = values[~mask].mean() if not mask.all() else values.mean()
    # what has no known neighbour, direct or through others, has no equation of its own
    part = connected_components(between, directed=False)[1]
    solved = (np.bincount(part, known_weight) > 0)[part]
    found = np.full(len(place), level)
    if solved.any():
        laplacian = (diags_array(total) - between).tocsr()[solved][:, solved]
        scale = 1 / np.sqrt(total[solved])
        # symmetric scaling: conjugate gradients of a matrix with a unit diagonal
        matrix = diags_array(scale) @ laplacian @ diags_array(scale)
        # counted from the level, so that the tolerance is of what differs from it
        right = (known - level * known_weight)[solved]
        solution, failed = cg(matrix, scale * right, rtol=1e-6, maxiter=10 * len(place) + 100)
        if failed:
            raise ValueError(
                f"imputation of {len(place)} voxels did not converge: are there values that are not finite?"
            )
        found[solved] = level + scale * solution
    return found
