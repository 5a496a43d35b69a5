"""Warnings: none for a usual scan, one line for each thing that looks wrong."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from xaiseg.imaging.case import Case, load_scan
from xaiseg.imaging.discovery import read_input
from xaiseg.imaging.normalise import zscore_nonzero
from xaiseg.imaging.phantom import phantom
from xaiseg.imaging.plausibility import contrast, warnings

CHANNELS = ["FLAIR", "T1w"]
MARGIN = 0.5  # the threshold is 0.4 on the other side of 0


def named(flair: str = "a_FLAIR.nii.gz", t1w: str = "a_T1w.nii.gz") -> Case:
    return Case("a", {"FLAIR": Path("x", flair), "T1w": Path("x", t1w)})


def drawn(seed: int) -> np.ndarray:
    """(X, Y, Z, 2) of a phantom, as `Scan.image`."""
    made = phantom(seed, (84, 102, 84), spacing=2.0)
    return np.stack([zscore_nonzero(made.flair, "flair"), zscore_nonzero(made.t1w, "t1w")], axis=-1)


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    return drawn(0)


def right_and_swapped(image: np.ndarray) -> None:
    found = contrast(image[..., 0], image[..., 1])
    assert found is not None
    assert found > MARGIN
    assert contrast(image[..., 1], image[..., 0]) == pytest.approx(-found, rel=1e-5)  # float32 medians
    assert warnings(named(), image, CHANNELS) == []
    (line,) = warnings(named(), image[..., ::-1], CHANNELS)
    assert line.startswith("x/a_FLAIR.nii.gz: looks like T1w, and x/a_T1w.nii.gz like FLAIR: ")
    assert "check that the channels are not swapped" in line
    # The order of the channels is the model's.
    assert warnings(named(), image[..., ::-1], CHANNELS[::-1]) == []
    assert len(warnings(named(), image, CHANNELS[::-1])) == 1


@pytest.mark.parametrize("seed", range(5))
def test_contrast_of_phantoms(seed: int) -> None:
    right_and_swapped(drawn(seed))


@pytest.mark.data
def test_contrast_of_real_scans(shared: Path) -> None:
    cases = [case for folder in ("open_ms", "mslesseg") for case in read_input(shared / "data" / folder, CHANNELS)]
    assert len(cases) == 5
    for case in cases:
        image = load_scan(case, CHANNELS).image
        right_and_swapped(image)
        before = time.perf_counter()
        assert warnings(case, image, CHANNELS) == []
        assert time.perf_counter() - before < 1  # it takes 0.03 s; the rest is for a busy machine


def variants(image: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    inside = (image != 0).all(axis=-1)
    yield "cropped", image[tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(inside))]
    yield "turned", image.transpose(2, 0, 1, 3)[::-1]
    thick = image[:, :, : image.shape[2] // 3 * 3].reshape(*image.shape[:2], -1, 3, 2).mean(axis=3)
    yield "slices of 6 mm", thick * (thick != 0).all(axis=-1, keepdims=True)
    noise = np.random.default_rng(0).normal(0, 0.5, image.shape).astype(np.float32)
    yield "noise", np.where(image != 0, image + noise, 0)
    shading = 1 + 0.2 * np.linspace(-1, 1, image.shape[1], dtype=np.float32)[:, None, None]
    yield "uneven coil", np.where(image != 0, (image + 6) * shading - 6, 0)


def test_contrast_of_other_grids_and_scanners(brain: np.ndarray) -> None:
    for what, image in variants(brain):
        found = contrast(image[..., 0], image[..., 1])
        assert found is not None, what
        assert found > MARGIN, what
    assert contrast(brain[::6, ::6, ::6, 0], brain[::6, ::6, ::6, 1]) is None  # too few voxels to tell
    assert contrast(brain[:, :, 42:43, 0], brain[:, :, 42:43, 1]) is None
    assert contrast(np.zeros((9, 9, 9)), np.zeros((9, 9, 9))) is None


def test_contrast_is_looked_at_for_its_two_channels_only(brain: np.ndarray) -> None:
    case = Case("a", {"FLAIR": Path("f.nii"), "T2w": Path("t.nii")})
    assert warnings(case, brain[..., ::-1], ["FLAIR", "T2w"]) == []
    assert warnings(case, brain[..., :1], ["FLAIR"]) == []
    assert warnings(named(), brain[..., ::-1], CHANNELS, zero_is_background=False) == []


@pytest.mark.parametrize(
    ("flair", "t1w", "named_wrong"),
    [
        ("sub-01_FLAIR.nii.gz", "sub-01_T1w.nii.gz", []),
        ("sub-01_T1w.nii.gz", "sub-01_FLAIR.nii.gz", CHANNELS),
        ("scan t1.nii", "scan.nii", ["FLAIR"]),
        ("3-MPRAGE.nii", "t1.nii", ["FLAIR"]),
        ("a.nii", "4 flair.nii", ["T1w"]),
        ("FLAIR_to_T1.nii", "MPRAGE_to_FLAIR.nii", []),
        ("t2flair_in_T1.nii", "3DT1_in_flair.nii", []),
        ("subjectT1.nii", "flairish.nii", []),  # no words of their own
        ("sub-T1a_x.nii", "PAT12_FLAIR.nii", ["T1w"]),
        ("x.nii", "y.nii", []),
    ],
)
def test_names(brain: np.ndarray, flair: str, t1w: str, named_wrong: list[str]) -> None:
    case = named(flair, t1w)
    found = warnings(case, brain, CHANNELS)
    assert [line.split(";")[0] for line in found] == [
        f"{case.images[channel]}: named like a {other} image, given for channel {channel}"
        for channel, other in zip(CHANNELS, CHANNELS[::-1], strict=True)
        if channel in named_wrong
    ]


def test_folders_are_no_names(brain: np.ndarray) -> None:
    case = Case("a", {"FLAIR": Path("T1/x.nii"), "T1w": Path("FLAIR/x.nii")})
    assert warnings(case, brain, CHANNELS) == []


def test_one_image_for_two_channels(brain: np.ndarray) -> None:
    scaled = zscore_nonzero(np.where(brain[..., 0] != 0, brain[..., 0] * np.float32(300) + 5000, 0), "")
    for second in (brain[..., 0], scaled):
        (line,) = warnings(named(), np.stack([brain[..., 0], second], axis=-1), CHANNELS)
        assert line.startswith(
            "x/a_T1w.nii.gz: the same voxels as x/a_FLAIR.nii.gz, given for the channels T1w and FLAIR"
        )
    other = brain[..., 0].copy()
    other[41, 51, 43] += 1  # between the voxels that are looked at first
    assert warnings(named(), np.stack([brain[..., 0], other], axis=-1), CHANNELS) == []


def test_amounts(brain: np.ndarray) -> None:
    skull = brain.copy()
    skull[..., 1] += 0.5
    assert (skull[..., 1] != 0).all()
    (line,) = warnings(named(), skull, CHANNELS)
    assert line.startswith("x/a_T1w.nii.gz: 100.0% of the voxels are not zero; expected zeros around a brain")
    assert warnings(named(), skull, CHANNELS, zero_is_background=False) == []

    nearly_nothing = brain.copy()
    nearly_nothing[..., 0] = 0
    nearly_nothing[38:46, 46:58, 38:46, 0] = 1
    (line,) = warnings(named(), nearly_nothing, CHANNELS)
    assert line.startswith("x/a_FLAIR.nii.gz: 0.1% of the voxels are not zero; ")
    assert "expected a brain: check that it is the right file" in line

    box = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero((brain != 0).all(axis=-1)))
    assert warnings(named(), brain[box], CHANNELS) == []  # as tight as can be
