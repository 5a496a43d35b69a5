"""A synthetic brain with multiple-sclerosis lesions, for users who have no scans at hand.

Contrasts relative to white matter (grey matter, CSF, lesions) follow the scans of Lesjak et al., Neuroinformatics
2018;16:51-63, doi:10.1007/s12021-017-9348-7; no voxel of them is used.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from xaiseg.errors import InputError
from xaiseg.imaging.phantom_anatomy import EXTENT, WHITE, Array, Axes, draw_anatomy, random_field
from xaiseg.imaging.phantom_lesions import draw_lesions, draw_lookalikes, label_lookalikes

# Intensities relative to white matter, by row of Anatomy.fractions.
FLAIR_CONTRAST = (0.27, 1.22, 1.04, 1.0)
T1W_CONTRAST = (0.16, 0.70, 0.83, 1.0)


@dataclass(frozen=True)
class Phantom:
    """A brain-extracted FLAIR and T1w pair with the truth behind it.

    flair, t1w: (X, Y, Z) float32, arbitrary scanner units, zero outside the brain.
    lesions: (X, Y, Z) int32, the true lesions 1..n, each one 18-connected component, none touching another.
    lookalikes: (X, Y, Z) int32, hyperintense places 1..m that are no lesions.
    tissue: (X, Y, Z) uint8, 0 outside, 1 CSF, 2 grey matter, 3 white matter (lesions count as white matter).
    affine: (4, 4) float64, voxel index to RAS+ mm, the origin at the centre of the brain.
    """

    flair: Array
    t1w: Array
    lesions: Array
    lookalikes: Array
    tissue: Array
    affine: Array


def phantom(
    seed: int, shape: tuple[int, int, int] = (112, 136, 112), spacing: float = 1.5, lesions: int | None = None
) -> Phantom:
    """Draws the brain of one imaginary patient; the same arguments give the same patient.

    shape: voxels along x, y, z. spacing: mm, isotropic. A field of view below about 144 x 182 x 152 mm gets a
    proportionally smaller brain with smaller lesions. lesions: how many, drawn when None (4 to 25, median 10);
    fewer where they do not fit. Voxels above about 4 mm are too coarse for most look-alikes.
    Raises InputError for a shape, spacing or number of lesions that cannot be drawn.
    """
    if len(shape) != 3 or min(shape) < 24:
        raise InputError(f"phantom: shape is {shape}, expected three sizes of at least 24 voxels; give a larger shape")
    if not 0 < spacing < np.inf:
        raise InputError(f"phantom: spacing is {spacing}, expected a positive number of mm; give one such as 1.5")
    if lesions is not None and lesions < 0:
        raise InputError(f"phantom: lesions is {lesions}, expected 0 or more; leave it out to have the number drawn")
    rng = np.random.default_rng(seed)
    step = spacing * max(1.0, *(e / (n * spacing) for e, n in zip(EXTENT, shape, strict=True)))
    axes = [(np.arange(n) - (n - 1) / 2) * step for n in shape]
    n = int(np.clip(round(10 * np.exp(rng.normal(0, 0.5))), 4, 25)) if lesions is None else lesions

    anatomy = draw_anatomy(rng, axes, step)
    tissue = np.array([1, 2, 2, 3], np.uint8)[anatomy.fractions.argmax(axis=0)] * anatomy.inside
    labels, lesion_blends = draw_lesions(rng, anatomy, tissue == 3, step, n)
    lookalikes = draw_lookalikes(rng, anatomy, step)

    jitter = rng.normal(1, 0.03, size=(2, 4)) * np.array([1, 1, 1, 0]) + np.array([0, 0, 0, 1])
    contrasts = (jitter * np.array([FLAIR_CONTRAST, T1W_CONTRAST])).astype(np.float32)
    flair, t1w = np.tensordot(contrasts, anatomy.fractions, axes=1)
    texture = random_field(rng, axes, (5, 16)) * anatomy.fractions[WHITE]
    haze = 0.06 * np.exp(-np.maximum(anatomy.ventricle, 0) / 8) * anatomy.fractions[WHITE]
    flair += 0.025 * texture + haze
    t1w -= 0.008 * texture
    for blend in lookalikes + lesion_blends:
        flair[blend.where] += blend.weight * (blend.flair - flair[blend.where])
        if blend.t1w is not None:
            t1w[blend.where] += blend.weight * (blend.t1w - t1w[blend.where])

    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    return Phantom(
        _scan(rng, flair, anatomy.inside, axes),
        _scan(rng, t1w, anatomy.inside, axes),
        labels,
        label_lookalikes(lookalikes, labels, anatomy, step),
        tissue,
        affine,
    )


def _scan(rng: Generator, signal: Array, inside: Array, axes: Axes) -> Array:
    """What a scanner makes of the ideal signal (white matter 1): blur, bias field, Rician noise, its own units."""
    blurred = ndimage.gaussian_filter(signal, 0.6)  # voxels
    bias = random_field(rng, axes, (120, 300))
    bias *= rng.uniform(0.05, 0.15) / np.abs(bias[inside]).max()
    sigma = 1 / rng.uniform(20, 30)
    clean = blurred * (1 + bias)
    noise = rng.normal(0, sigma, size=(2, *signal.shape)).astype(np.float32)
    image = np.hypot(clean + noise[0], noise[1]) * 200 * np.exp(rng.normal(0, 0.5))
    return np.where(inside, image, 0).astype(np.float32)
