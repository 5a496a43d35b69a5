"""Lesions of training scans, kept as shapes and contrasts, to be put into white matter elsewhere."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from training.volumes import Volume
from xaiseg.errors import InputError
from xaiseg.imaging.white_matter import channel_of, robust, white_matter
from xaiseg.instances import label_components
from xaiseg.instances.lesion_filling import EDGE, grown, local

_DENOISE = 1.0  # σ of the blur within the lesion: the place it is put to has noise of its own
_VISIBLE = 1.0  # standard deviations of white matter that a lesion's mean FLAIR exceeds it by, or it is not kept


class BankLesion(NamedTuple):
    """source: the volume's name. mask: `(x, y, z)` bool with 2 empty voxels on each side.

    contrast: `(x, y, z, C)` float32, intensity minus the median of the normal-appearing white matter nearby, in its robust
    standard deviations, blurred within the lesion and continued beyond it; at least 0 on FLAIR, at most 0 on T1w.
    spread: `(C,)`, those standard deviations.
    """

    source: str
    mask: np.ndarray
    contrast: np.ndarray
    spread: np.ndarray


@dataclass(frozen=True, eq=False)
class LesionBank:
    """The lesions of some volumes, in their order.

    Build it from the volumes that are trained on, after the split by patient, and from no others: then no lesion of a held-out
    patient can come into training. `sources` tells whose lesions it holds, by volume, for a check of that.
    """

    lesions: tuple[BankLesion, ...]
    channels: tuple[str, ...]

    @classmethod
    def of(
        cls, volumes: Iterable[Volume], channels: Sequence[str] = ("FLAIR", "T1w"), min_voxels: int = 5
    ) -> "LesionBank":
        """The lesions (18-connected, of `min_voxels` or more) of volumes with these channels that stand out on FLAIR.

        Where white matter is less than 300 voxels within 8 of a lesion, it is sought farther away. Volumes without a lesion are
        passed over. Raises InputError where FLAIR or T1w is missing, a volume shows no white matter, or no lesion is found in
        any.
        """
        signs = _signs(channels)
        found: list[BankLesion] = []
        names: list[str] = []
        for volume in volumes:
            names.append(volume.name)
            if volume.image.shape[-1] != len(channels):
                raise InputError(
                    f"synthesis: {volume.name} has {volume.image.shape[-1]} channels, expected {', '.join(channels)}: name them all"
                )
            labels = label_components(volume.reference, 18, min_voxels)
            if labels.any():
                white = white_matter(volume.image, volume.reference, channels).mask
                found += _lesions(volume, labels, white, signs, channel_of(channels, "FLAIR"))
        if not found:
            raise InputError(
                f"synthesis: no lesion of {min_voxels} voxels or more stands out on FLAIR in {', '.join(names) or 'no volume'}, "
                "expected at least one to copy: give training cases with lesions"
            )
        return cls(tuple(found), tuple(channels))

    @property
    def sources(self) -> frozenset[str]:
        """The names of the volumes that its lesions come from."""
        return frozenset(lesion.source for lesion in self.lesions)


def _signs(channels: Sequence[str]) -> np.ndarray:
    """Which way a lesion may differ from white matter: 1 up, -1 down, 0 both."""
    signs = np.zeros(len(channels))
    signs[channel_of(channels, "FLAIR")], signs[channel_of(channels, "T1w")] = 1, -1
    return signs


def _lesions(volume: Volume, labels: np.ndarray, white: np.ndarray, signs: np.ndarray, flair: int) -> list[BankLesion]:
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        near = local(box, white)
        middle, spread = robust(np.asarray(volume.image[near])[white[near]])
        spread = np.maximum(spread, 1e-6)  # an image without noise
        own = grown(box, 0, labels.shape)
        mask = np.pad(labels[own] == number, EDGE)
        values = np.pad((np.asarray(volume.image[own]) - middle) / spread, [(EDGE, EDGE)] * 3 + [(0, 0)])
        if values[mask][:, flair].mean() > _VISIBLE:
            found.append(BankLesion(volume.name, mask, _contrast(values, mask, signs), spread))
    return found


def _contrast(values: np.ndarray, mask: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """The mean over the lesion's voxels nearby, which continues it beyond its border, with the wrong signs cut off."""
    weight = ndimage.gaussian_filter(mask.astype(float), _DENOISE, mode="constant", truncate=6.0)
    inside = np.where(mask[..., None], values, 0)
    total = ndimage.gaussian_filter(inside, (_DENOISE, _DENOISE, _DENOISE, 0), mode="constant", truncate=6.0)
    contrast = total / np.maximum(weight, 1e-12)[..., None]
    contrast = np.where(weight[..., None] > 1e-12, contrast, 0)
    contrast = np.where(signs > 0, np.maximum(contrast, 0), np.where(signs < 0, np.minimum(contrast, 0), contrast))
    return contrast.astype(np.float32)
