"""What of an opened scan is lesion, by anyone's word, and what is normal-appearing white matter."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from xaiseg.analysis.reopened import OpenScan
from xaiseg.analysis.run_tables import Run
from xaiseg.cohort.stages import MASK
from xaiseg.errors import InputError
from xaiseg.imaging.white_matter import white_matter


def lesions_of(run: Run, opened: OpenScan) -> np.ndarray:
    """Every voxel `(X, Y, Z)` of a lesion: explained, predicted, or of the reference. Raises InputError for unreadable maps."""
    first = int(np.flatnonzero(run.lesions["case"] == opened.case.name)[0])
    lesions = opened.labels > 0
    for path in (run.file(first, MASK), opened.case.reference):
        if path is not None:
            lesions = lesions | (opened.scan.labels_to_image(opened.scan.labels(path)) > 0)
    return lesions


def white_matter_of(opened: OpenScan, lesions: np.ndarray, channels: Sequence[str]) -> np.ndarray:
    """`imaging.white_matter` of a scan, bool `(X, Y, Z)`.

    Raises InputError where FLAIR or T1w is no channel, nothing tells the brain from the background, or little is found.
    """
    image = opened.scan.image
    if opened.scan.prepared is not None and (image != 0).all():
        raise InputError(
            f"white matter: {opened.case.name} has no background of 0 once it is prepared for the network, expected some, by which "
            "the brain is told: give a network whose normalisation keeps it"
        )
    return white_matter(image, lesions, channels).mask


def seed_of(seed: int, *parts: Any) -> int:
    """A seed of its own for a case, a place, a lesion, whatever the others are."""
    return zlib.crc32(" ".join(map(str, (seed, *parts))).encode())
