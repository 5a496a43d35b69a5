"""Training patches. The batch of a step is a pure function of seed and step: an interrupted run goes on with the same ones."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from training.config import Config
from training.volumes import Volume

_OFF_CENTRE = 1 / 6  # of the patch: the paper cuts 96³ at random out of the 128³ around the voxel
_SHIFT, _SCALE = 0.1, 0.1
_DEGREES = 15.0


def sample(config: Config, volumes: Sequence[Volume], step: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch of a step: images `(B, *patch, C)` float32 and references `(B, *patch)` float32, 0 or 1.

    Each item comes from a volume drawn uniformly. With probability `positive_fraction` it lies around a voxel of a lesion, if
    the volume has one, else around one elsewhere in the brain. Beyond the volume it is zero.
    """
    images, references = [], []
    for item in range(config.batch):
        rng = np.random.default_rng((config.seed, step, item))
        image, reference = _crop(rng, config, volumes[int(rng.integers(len(volumes)))])
        image, reference = _augment(rng, config, image, reference)
        images.append(image)
        references.append(reference)
    return np.stack(images), np.stack(references).astype(np.float32)


def _crop(rng: Generator, config: Config, volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    positive = rng.random() < config.positive_fraction
    pool = volume.lesion if len(volume.lesion) and (positive or not len(volume.other)) else volume.other
    shape = volume.reference.shape
    voxel = np.array(np.unravel_index(pool[rng.integers(len(pool))], shape))
    sides = np.array(config.patch)
    reach = (sides * _OFF_CENTRE).astype(int)
    start = voxel - sides // 2 + rng.integers(-reach, reach + 1)
    # Inside the volume where it is large enough; a smaller side is centred, as the stitched prediction pads it.
    room = np.array(shape) - sides
    start = np.where(room >= 0, np.clip(start, 0, np.maximum(room, 0)), -((-room) // 2))
    stop = np.minimum(start + sides, shape)
    inside = tuple(slice(max(a, 0), b) for a, b in zip(start.tolist(), stop.tolist(), strict=True))
    padding = [(max(-a, 0), int(n - (b - a))) for a, b, n in zip(start.tolist(), stop.tolist(), sides, strict=True)]
    image = np.pad(volume.image[inside], [*padding, (0, 0)])
    return image, np.pad(volume.reference[inside], padding)


def _augment(rng: Generator, config: Config, image: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if rng.random() < config.affine:
        image, reference = _affine(rng, image, reference)
    for plane in combinations(range(3), 2):
        if rng.random() < config.quarter_turns:
            image, reference = np.rot90(image, axes=plane), np.rot90(reference, axes=plane)
    for axis in range(3):
        if rng.random() < config.flips:
            image, reference = np.flip(image, axis), np.flip(reference, axis)
    if rng.random() < config.intensity:
        image = image + np.float32(rng.uniform(-_SHIFT, _SHIFT))
    if rng.random() < config.intensity:
        image = image * np.float32(1 + rng.uniform(-_SCALE, _SCALE))
    return image, reference


def _affine(rng: Generator, image: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn and scale about the centre of the patch; beyond its border the border is repeated."""
    matrix = np.diag(rng.uniform(1 - _SCALE, 1 + _SCALE, size=3))
    for (a, b), degrees in zip(combinations(range(3), 2), rng.uniform(-_DEGREES, _DEGREES, size=3), strict=True):
        turn = np.eye(3)
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
        matrix = matrix @ turn
    centre = (np.array(reference.shape) - 1) / 2
    offset = centre - matrix @ centre
    channels = [
        ndimage.affine_transform(image[..., c], matrix, offset, order=1, mode="nearest") for c in range(image.shape[-1])
    ]
    turned = ndimage.affine_transform(reference.astype(np.uint8), matrix, offset, order=0, mode="nearest")
    return np.stack(channels, axis=-1), turned > 0
