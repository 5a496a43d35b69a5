"""`training` runs from a checkout and is not installed; a tiny dataset to train on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from training.augment import Augmentation
from training.config import Config, check
from xaiseg.imaging import write

TINY = check(
    Config(
        options={"channels": [4, 8], "strides": [2], "norm": "batch"},
        window=(16, 16, 16),
        patch=(8, 8, 8),
        batch=2,
        augmentation=Augmentation(flips=(0.5, 0.5, 0.5), shift=0.5),
        steps=4,
        dice_r=0.1,  # a lesion fills a tenth of these small patches, not a thousandth
        optimiser="adamw",
        learning_rate=1e-2,
        schedule="cosine",
        weight_decay=1e-2,
        validate_every=2,
        checkpoint_every=2,
        log_every=1,
        thresholds=(0.3, 0.5),
    )
)

AddCase = Callable[..., None]


@pytest.fixture
def tiny() -> Config:
    return TINY


@pytest.fixture
def bids(tmp_path: Path) -> tuple[Path, AddCase]:
    """A BIDS folder and `add(name, lesion=True, reference=True, origin=0)`, which puts a case of 18 x 16 x 14 voxels into it."""
    folder = tmp_path / "dataset"

    def add(name: str, lesion: bool = True, reference: bool = True, origin: float = 0.0) -> None:
        subject, _, session = name.partition("_")
        rng = np.random.default_rng(sum(name.encode()))
        mask = np.zeros((18, 16, 14), np.uint8)
        mask[4:8, 5:9, 6:9] = lesion
        place = Path(subject, session, "anat")
        for parent in (folder / place, folder / "derivatives" / "manual" / place):
            parent.mkdir(parents=True)
        for channel, contrast in (("FLAIR", 3.0), ("T1w", -1.0)):
            image = (10 + contrast * mask + rng.normal(size=mask.shape)).astype(np.float32)
            image[:2] = 0
            write(folder / place / f"{name}_{channel}.nii.gz", image, np.eye(4))
        if reference:
            affine = np.eye(4)
            affine[0, 3] = origin
            write(folder / "derivatives" / "manual" / place / f"{name}_label-L_mask.nii.gz", mask, affine)

    return folder, add
