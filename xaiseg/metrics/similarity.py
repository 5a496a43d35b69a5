"""How alike two maps are, and how complex one is."""

from collections.abc import Sequence

import numpy as np
import scipy  # whose stats are loaded when they are asked for: `import xaiseg` needs none
from scipy import ndimage

from xaiseg._types import SaliencyMap


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two lists of numbers; NaN where one of them does not vary or is not finite."""
    if not (np.ptp(a) > 0 and np.ptp(b) > 0):
        return np.nan
    x, y = a - a.mean(), b - b.mean()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's ρ of two arrays of one shape, equal values sharing their mean rank; NaN where one is constant or not finite."""
    if a.size == 0 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.nan
    return pearson(scipy.stats.rankdata(a), scipy.stats.rankdata(b))


def ssim(
    a: np.ndarray, b: np.ndarray, *, data_range: float, sigma: float = 1.5, mask: np.ndarray | None = None
) -> float:
    """Structural similarity of two arrays `(X, Y, Z)` (Wang et al. 2004): its mean over the mask, by default over all voxels.

    `((2 μ_a μ_b + C₁)(2 σ_ab + C₂)) / ((μ_a² + μ_b² + C₁)(σ_a² + σ_b² + C₂))` with `C₁ = (0.01 L)²`, `C₂ = (0.03 L)²`,
    `L = data_range`; moments under a Gaussian of `sigma` voxels, cut off at 3.5 σ, the array mirrored at its border, as in
    scikit-image's `gaussian_weights` but for the border, which counts.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def local(v: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(v, sigma, truncate=3.5, mode="reflect")

    mean_x, mean_y = local(x), local(y)
    var_x, var_y, both = local(x * x) - mean_x**2, local(y * y) - mean_y**2, local(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    index = ((2 * mean_x * mean_y + c1) * (2 * both + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(index.mean() if mask is None else index[mask].mean())


def histogram_entropy(values: np.ndarray, bins: int = 100) -> float:
    """The entropy in nats of the histogram of an array, `bins` between its smallest and largest value: how complex a map is."""
    if not np.isfinite(values).all():
        return np.nan
    return float(scipy.stats.entropy(np.histogram(values, bins)[0]))


def instance_similarity(a: SaliencyMap, b: SaliencyMap) -> float:
    """Spearman's ρ of the signed maps of two instances of a scan, where either is not zero.

    A map that does not change with the instance does not explain the instance. Each map is zero outside of its crop. NaN where
    both are zero everywhere, or a map is constant there or not finite.
    """
    low = np.minimum(a.start, b.start)
    high = np.maximum(*(np.array(m.start) + m.values.shape[:3] for m in (a, b)))
    one, other = (_within(m, low, (high - low).tolist()) for m in (a, b))
    either = (one != 0) | (other != 0)
    return spearman(one[either], other[either])


def _within(saliency: SaliencyMap, low: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    values = np.asarray(saliency.values, np.float64)
    found = np.zeros((*sides, values.shape[-1]))
    start = [s - lo for s, lo in zip(saliency.start, low.tolist(), strict=True)]
    found[tuple(slice(s, s + n) for s, n in zip(start, values.shape[:3], strict=True))] = values
    return found
