"""Reference images: what stands for "nothing there" in path and perturbation methods.

No reference is neutral. Zero is the mean intensity of the brain after z-scoring, not an absence; a blurred scan keeps what is
large; normal-appearing white matter asks what makes this tissue a lesion. A reference depends on the image alone, never on which
instances are explained, so that instances explained together or apart have one reference.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import ndimage

# Voxels around an excluded lesion that may be part of it, or of its penumbra.
_MARGIN = 2
_CLASSES = 3


class Baseline(Protocol):
    """A pure function from an image `(X, Y, Z, C)`, as the network takes it, to the reference image of that shape and dtype.

    The result lies where the image does. Raises ValueError for an image that it cannot be computed from.
    """

    def __call__(self, image: Array, /) -> Array: ...


def zero() -> Baseline:
    """`x' = 0`: in an image z-scored over its non-zero voxels, the background and the mean of the brain.

    >>> import jax.numpy as jnp
    >>> float(zero()(jnp.ones((2, 2, 2, 1))).max())
    0.0
    """
    return jnp.zeros_like


def blur(sigma_voxels: float | Sequence[float] = 4.0) -> Baseline:
    """`x' = G_σ * x` for each channel: the image without what is less than about `3σ` across.

    sigma_voxels: standard deviation in voxels (not mm), one number or one per axis; 0 leaves an axis as it is, which a 2-D image
      needs. A ball of radius `r` keeps less than half of its contrast in its middle if `σ > 0.65·r`.
    The kernel is cut off at 4σ. At the boundary the outermost voxels are repeated. The brain is not told from the background, so
    its rim mixes with it: in a z-scored image, towards the mean of the brain.
    Raises ValueError for a negative σ, none above 0, or neither one nor three of them.

    >>> import jax.numpy as jnp
    >>> point = jnp.zeros((9, 9, 9, 1)).at[4, 4, 4].set(1.0)
    >>> f"{float(blur(1.0)(point).max()):.4f}"  # (2πσ²)^-3/2 is 0.0635
    '0.0635'
    """
    sigma = np.atleast_1d(np.asarray(sigma_voxels, np.float64))
    if sigma.shape not in ((1,), (3,)) or not (np.isfinite(sigma).all() and (sigma >= 0).all() and (sigma > 0).any()):
        raise ValueError(
            f"sigma_voxels is {sigma_voxels}, expected a number above 0, or one of at least 0 for each axis"
        )
    widths = (*np.broadcast_to(sigma, 3).tolist(), 0.0)

    def reference(image: Array) -> Array:
        return _beside(image, ndimage.gaussian_filter(np.asarray(image), widths, mode="nearest", truncate=4.0))

    return reference


def given(array: Array | np.ndarray) -> Baseline:
    """`x' = array` `(X, Y, Z, C)`, whatever the image, in the image's intensities: another scan, an inpainted one.

    Raises ValueError for numbers that are not finite, and, when called, for an image of another shape.

    >>> import jax.numpy as jnp
    >>> given(jnp.full((2, 2, 2, 1), 3.0))(jnp.zeros((2, 2, 2, 1))).shape
    (2, 2, 2, 1)
    """
    kept = np.array(array)
    if not np.isfinite(kept).all():
        raise ValueError("the given reference image has values that are not finite")

    def reference(image: Array) -> Array:
        if kept.shape != image.shape:
            raise ValueError(
                f"the given reference image has shape {kept.shape}, the image {image.shape}: give one on its grid"
            )
        return _beside(image, kept)

    return reference


def normal_appearing_white_matter(
    t1w_channel: int = 1,
    *,
    exclude: Array | np.ndarray | None = None,
    brain: Array | np.ndarray | None = None,
) -> Baseline:
    """`x'[v, c] = median of channel c over white matter` for `v` in the brain, zero outside it.

    t1w_channel: the channel in which white matter is brightest, counted from 0.
    exclude: `(X, Y, Z)` lesions of this scan, a mask or label map; they and what lies within two steps through faces are no white
      matter. Without it nothing is left out: lesions are so small a part of white matter that the median hardly notices (5 %
      of bright voxels move it by 0.07 standard deviations of the tissue).
    brain: `(X, Y, Z)` mask. Without it, the voxels that are not exactly 0 in every channel, as brain extraction and z-scoring over
      non-zero voxels leave them. Noise fills the background: take the reference of the clean image, as
      `smooth_integrated_gradients` does.

    White matter is the brightest of three classes of T1w intensity (fluid, grey, white), found by 1-D k-means in the brain,
    from intensities clipped to their 1st and 99th percentile, beginning at the quantiles 1/6, 1/2 and 5/6: deterministic.

    Limits: it knows intensities only, no anatomy. After contrast agent, vessels and enhancing lesions join the brightest class; in
    a strong bias field so does grey matter where it is bright; thalamus and brain stem are often taken for white matter; in
    infants white matter is not the brightest. A scan that is not brain-extracted has its fat there. One constant per channel
    carries no bias field and no texture. What the median does not absorb of that is in the reference: look at it.

    Raises ValueError where there is no such channel or no background to tell the brain by, where masks have another shape than the
    image, or where T1w has fewer than three intensities in the brain.

    >>> import jax.numpy as jnp
    >>> t1w = jnp.array([0, -2, -2, -1, -1, 1, 1, 1.2])
    >>> flair = jnp.array([0, -1, -1, 1, 1, 0.5, 0.5, 3])  # the last is a lesion
    >>> image = jnp.stack([flair, t1w], -1).reshape(2, 2, 2, 2)
    >>> reference = normal_appearing_white_matter()(image).reshape(8, 2)
    >>> reference[:2].tolist()
    [[0.0, 0.0], [0.5, 1.0]]
    """
    excluded = None if exclude is None else np.asarray(exclude) != 0
    given_brain = None if brain is None else np.asarray(brain) != 0

    def reference(image: Array) -> Array:
        values = np.asarray(image)
        if t1w_channel not in range(values.shape[-1]):
            raise ValueError(
                f"t1w_channel is {t1w_channel}, but the image has {values.shape[-1]} channels, numbered from 0; "
                "without a T1w channel choose another baseline, such as blur"
            )
        for name, mask in (("exclude", excluded), ("brain", given_brain)):
            if mask is not None and mask.shape != values.shape[:3]:
                raise ValueError(f"{name} has shape {mask.shape}, expected that of the image, {values.shape[:3]}")
        inside = (values != 0).any(-1) if given_brain is None else given_brain
        if given_brain is None and inside.all():
            raise ValueError(
                "no voxel of the image is exactly 0 in all channels, so the brain cannot be told from the background; "
                "give brain=, or an image that is brain-extracted and free of added noise"
            )
        # where one channel is 0 it ends before the others: no tissue is seen in it
        tissue = inside & (values != 0).all(-1)
        if excluded is not None and excluded.any():
            tissue &= ~ndimage.binary_dilation(excluded, iterations=_MARGIN)
        white = values[tissue][brightest_class(values[tissue][:, t1w_channel])]
        constant = np.median(white, axis=0).astype(values.dtype)
        return _beside(image, np.where(inside[..., None], constant, np.zeros_like(constant)))

    return reference


BASELINES: dict[str, Callable[[], Baseline]] = {
    "zero": zero,
    "blur": blur,
    "nawm": normal_appearing_white_matter,
}


def reference_image(baseline: Baseline, image: Array) -> Array:
    """`baseline(image)`. Raises ValueError unless it has the shape of the image."""
    reference = baseline(image)
    if reference.shape != image.shape:
        raise ValueError(f"the baseline of an image {image.shape} has shape {reference.shape}, expected the same")
    return reference


def brightest_class(intensities: np.ndarray) -> np.ndarray:
    """Which of the intensities `(n,)` are in the brightest of three classes, by Lloyd's algorithm from quantiles."""
    values = intensities.astype(np.float64)
    if np.unique(values).size < _CLASSES:
        raise ValueError(
            f"T1w has fewer than {_CLASSES} intensities in the brain outside of what is excluded, so tissues cannot be told apart"
        )
    # a few bright vessels or remains of the skull must not make a class of their own
    clipped = np.clip(values, *np.quantile(values, [0.01, 0.99]))
    centres = np.quantile(clipped, (np.arange(_CLASSES) + 0.5) / _CLASSES)
    while True:
        borders = (centres[1:] + centres[:-1]) / 2
        classes = np.searchsorted(borders, clipped)
        counts = np.bincount(classes, minlength=_CLASSES)
        sums = np.bincount(classes, clipped, minlength=_CLASSES)
        # a class that nothing is nearest to stays where it is
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
        if np.allclose(moved, centres, rtol=0, atol=1e-6 * np.ptp(clipped)):
            return classes == classes.max()
        centres = moved


def _beside(image: Array, values: np.ndarray) -> Array:
    """`values` as an array of the image's dtype, on its devices."""
    placed = values.astype(image.dtype)
    return jax.device_put(placed, image.sharding) if isinstance(image, Array) else jnp.asarray(placed)
