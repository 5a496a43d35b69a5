"""Lesions filled with what the normal-appearing white matter around them suggests: its smooth course and its texture.

For negatives, for places to put a synthetic lesion, and for the counterfactual "this scan without that lesion". The idea of
filling from neighbouring white matter is that of Chard et al., J Magn Reson Imaging 2010;32:223-228, doi:10.1002/jmri.22214;
intensities are not drawn from a histogram here but interpolated, so that they follow a bias field.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from xaiseg.errors import InputError
from xaiseg.imaging.white_matter import channel_of, robust, upsampled
from xaiseg.instances.components import label_components

EDGE = 2  # voxels beyond a mask that its soft edge reaches
FILLED_EDGE = 1 + EDGE  # experts draw a lesion tighter than its halo: without one more voxel a bright shell is left
_EDGE_SIGMA = 0.8
_REACH, _ENOUGH = 8, 300  # voxels around a lesion that count as local; white ones among them, or the reach is doubled
_KERNEL = ((1.5, 1.0), (3.0, 0.1), (6.0, 0.01), (12.0, 0.001))  # σ and weight of the Gaussians whose sum interpolates
_HIGH_PASS = 3.0  # σ of what is subtracted before texture is measured
# Spreads of white matter: beside a lesion, what is darker than it by the first is fluid and left alone, by the second filled,
# and between them in part. A lesion's soft edge is bright on FLAIR, and on T1w less dark than the lesion, which seldom exceeds 6.
_DARK = {"FLAIR": (3.0, 1.0), "T1w": (10.0, 6.0)}
_NEIGHBOURS = ndimage.generate_binary_structure(3, 2)

Box = tuple[slice, ...]


class Texture(NamedTuple):
    """What is left of white matter without its smooth course, by channel.

    spread: `(C,)` standard deviation. sigma: `(C, 3)` voxels, of the Gaussian that makes white noise as correlated between
    neighbours along each axis. Channels are independent.
    """

    spread: np.ndarray
    sigma: np.ndarray


def fill(
    rng: Generator,
    image: np.ndarray,
    lesions: np.ndarray,
    white: np.ndarray,
    channels: Sequence[str] = ("FLAIR", "T1w"),
) -> np.ndarray:
    """The image with every lesion filled, to 3 voxels beyond its mask with falling weight; elsewhere it is unchanged.

    A filled voxel is the mean of the white matter around it, weighted by a sum of Gaussians of 1.5 to 12 voxels, the nearer
    the heavier, plus noise with the local texture's spread and correlation between neighbours. Voxels that are 0 stay 0,
    and fluid beside the mask, much darker than white matter, stays as it is.

    image: `(X, Y, Z, C)`, not changed. lesions: `(X, Y, Z)` bool, what to fill. white: `(X, Y, Z)` bool, normal-appearing white
      matter; lesions and what lies within 3 voxels of them are never taken for it.
    Limits: a lesion that reaches into the cortex is filled with white matter all the same, and where its halo is wider than 2
    voxels a faint shell is left. Raises InputError where no white matter is given, or FLAIR or T1w is not among the channels.
    """
    dark = {channel_of(channels, name): drops for name, drops in _DARK.items()}
    known = white.copy()
    out = np.array(image, np.float32)
    labels = numbered(lesions)
    boxes = ndimage.find_objects(labels)
    for box in boxes:
        around = grown(box, FILLED_EDGE, lesions.shape)
        known[around] &= ~ndimage.maximum_filter(lesions[around].astype(np.uint8), 2 * FILLED_EDGE + 1).view(bool)
    if not known.any():
        raise InputError(
            "lesion filling: no voxel of white matter is left outside the lesions, expected some to fill them from: "
            "give the white matter of the whole scan"
        )
    for number, box in enumerate(boxes, start=1):
        near = local(box, known)
        mask = labels[near] == number
        # what is filled before is no source, and a neighbour's soft edge is kept
        smooth = interpolated(image[near], known[near])
        new = smooth + drawn(rng, texture_of(image[near], known[near]), mask.shape)
        _, spread = robust(image[near][known[near]])
        weight = edge_weight(ndimage.binary_dilation(mask, _NEIGHBOURS))
        blend = weight[..., None] * (image[near] != 0)
        for c, (most, least) in dark.items():
            drop = (smooth[..., c] - image[near][..., c]) / max(spread[c], 1e-6)
            blend[..., c] *= np.where(mask, 1, np.clip((most - drop) / (most - least), 0, 1))
        out[near] += blend * (new - out[near])
    return out


def numbered(lesions: np.ndarray) -> np.ndarray:
    """`label_components(lesions, 18)`, of the box they lie in only: lesions fill a small part of a scan."""
    labels = np.zeros(lesions.shape, np.int32)
    for box in ndimage.find_objects(lesions.astype(np.uint8)):
        labels[box] = label_components(lesions[box], 18)
    return labels


def grown(box: Box, reach: int, shape: Sequence[int]) -> Box:
    """The box with `reach` more voxels on each side, where the array has them."""
    return tuple(slice(max(b.start - reach, 0), min(b.stop + reach, n)) for b, n in zip(box, shape, strict=True))


def local(box: Box, white: np.ndarray) -> Box:
    """The box and what is near, 8 voxels, or twice, four times … as many until there is enough white matter in it."""
    reach = _REACH
    while True:
        near = grown(box, reach, white.shape)
        if white[near].sum() >= _ENOUGH or all(s == slice(0, n) for s, n in zip(near, white.shape, strict=True)):
            return near
        reach *= 2


def edge_weight(mask: np.ndarray) -> np.ndarray:
    """1 in the mask, falling to 0 within `EDGE` voxels of it along every axis: twice the Gaussian-smoothed mask, at most 1."""
    blurred = ndimage.gaussian_filter(mask.astype(np.float32), _EDGE_SIGMA, mode="constant", radius=EDGE)
    return np.where(mask, np.float32(1), np.minimum(2 * blurred, 1))


def interpolated(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Each channel's mean over the known voxels, weighted by `_KERNEL` of the distance, their median far from all."""
    middle = np.median(image[known], axis=0)
    weight = np.full(known.shape, 1e-9, np.float32)
    total = np.zeros(image.shape, np.float32)
    source = np.where(known[..., None], image - middle, 0).astype(np.float32)
    for sigma, share in _KERNEL:
        step = max(int(sigma / 3), 1)  # every such voxel is enough for what is so smooth
        thin, width = (slice(None, None, step),) * 3, sigma / step
        blurred = ndimage.gaussian_filter(known[thin].astype(np.float32), width, mode="constant")
        weight += share * upsampled(blurred, known.shape, step)
        blurred = ndimage.gaussian_filter(source[thin], (width, width, width, 0), mode="constant")
        total += share * upsampled(blurred, known.shape, step)
    return middle + total / weight[..., None]


def texture_of(image: np.ndarray, white: np.ndarray) -> Texture:
    """The texture of the white voxels of an image `(x, y, z, C)`, by robust standard deviations: anatomy is the minority."""

    def blurred(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values.astype(np.float32), _HIGH_PASS, mode="constant", truncate=2.0)

    weight = blurred(white) + 1e-6
    sigmas = np.zeros((image.shape[-1], 3))
    spreads = np.zeros(image.shape[-1])
    for c in range(image.shape[-1]):
        source = np.where(white, image[..., c] - np.median(image[..., c][white]), 0)
        residual = source - blurred(source) / weight
        _, spreads[c] = robust(residual[white])
        for axis in range(3):
            rows, inside = np.moveaxis(residual, axis, 0), np.moveaxis(white, axis, 0)
            pairs = inside[1:] & inside[:-1]
            if pairs.any():
                _, step = robust((rows[1:] - rows[:-1])[pairs])
                # var(a - b) = 2 var (1 - ρ), and neighbours in white noise blurred by σ correlate by ρ = exp(-1 / 4σ²)
                correlation = 1 - step**2 / max(2 * spreads[c] ** 2, 1e-12)
                sigmas[c, axis] = np.sqrt(-1 / (4 * np.log(min(correlation, 0.9)))) if correlation > 0.02 else 0
    return Texture(spreads, sigmas)


def drawn(rng: Generator, texture: Texture, shape: Sequence[int]) -> np.ndarray:
    """Noise `(x, y, z, C)` float32 of that spread and correlation."""
    noise = np.empty((*shape, len(texture.spread)), np.float32)
    for c, (spread, sigma) in enumerate(zip(texture.spread, texture.sigma, strict=True)):
        reach = int(np.ceil(4 * sigma.max()))
        values = rng.standard_normal([n + 2 * reach for n in shape], np.float32)
        for axis in range(3):
            if sigma[axis]:
                values = ndimage.gaussian_filter1d(values, sigma[axis], axis)
                kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma[axis]) ** 2)
                values *= kernel.sum() / np.sqrt((kernel**2).sum())  # what blurring takes from the spread
        noise[..., c] = spread * values[tuple(slice(reach, reach + n) for n in shape)]
    return noise
