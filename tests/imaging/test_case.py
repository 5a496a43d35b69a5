"""Cases, scans in model orientation, and the check of all headers."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from xaiseg.errors import InputError
from xaiseg.imaging import nifti
from xaiseg.imaging.case import Case, load_scan, preflight, problems
from xaiseg.imaging.discovery import read_input

SHAPE = (6, 7, 8)
LPI = np.array([[-1.0, 0, 0, 3], [0, -1.5, 0, 4], [0, 0, -2, 5], [0, 0, 0, 1]])
CHANNELS = ["FLAIR", "T1w"]


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, seed: int = 0, shape: tuple = SHAPE, affine: np.ndarray = LPI) -> Path:
        volume = np.random.default_rng(seed).uniform(1, 9, shape).astype(np.float32)
        volume[0] = 0
        nifti.write(tmp_path / name, volume, affine)
        return tmp_path / name

    return make


@pytest.fixture
def case(image: Callable[..., Path]) -> Case:
    return Case("sub-01", {"FLAIR": image("flair.nii.gz", 1), "T1w": image("t1.nii", 2)})


@pytest.mark.parametrize(
    ("name", "subject", "session"),
    [
        ("sub-01", "01", None),
        ("sub-A1_ses-m06", "A1", "m06"),
        ("sub-01_ses-", "sub01ses", None),
        ("sub-01_run-2", "sub01run2", None),
        ("patient 7.b", "patient7b", None),
        ("sub-01\n", "sub01", None),
    ],
)
def test_subject_and_session(name: str, subject: str, session: str | None) -> None:
    assert (Case(name, {}).subject, Case(name, {}).session) == (subject, session)


def test_scan_is_standardised_stacked_and_turned(case: Case) -> None:
    scan = load_scan(case, CHANNELS, "LAS")
    assert scan.image.dtype == np.float32
    assert (scan.grid.axis_codes, scan.stored_grid.axis_codes) == ("LAS", "LPI")
    for c, path in enumerate(case.images.values()):
        stored = np.asarray(nib.load(path).dataobj, np.float64)
        inside = stored[stored != 0]
        expected = np.where(stored != 0, (stored - inside.mean()) / inside.std(), 0)
        # LPI to LAS by hand; float32 rounding of values up to 2
        np.testing.assert_allclose(scan.image[..., c], expected[:, ::-1, ::-1], rtol=0, atol=3e-7)


def test_channels_follow_the_model(case: Case) -> None:
    there, back = load_scan(case, ["FLAIR", "T1w"]).image, load_scan(case, ["T1w", "FLAIR"]).image
    np.testing.assert_array_equal(there, back[..., ::-1])
    assert not np.array_equal(there, back)


@pytest.mark.parametrize("orientation", ["LAS", "RAS", "native", "SPL"])
def test_labels_and_crops_return_to_the_stored_place(case: Case, tmp_path: Path, orientation: str) -> None:
    scan = load_scan(case, CHANNELS, orientation)
    lesions = np.zeros(SHAPE, np.int32)
    lesions[2:4, 1:3, 5:7] = 3
    nifti.write(tmp_path / "lesions.nii.gz", lesions, LPI)
    labels = scan.labels(tmp_path / "lesions.nii.gz")
    assert labels.dtype == np.int32
    assert labels.shape == scan.grid.shape

    whole, affine = scan.to_stored(labels)
    np.testing.assert_array_equal(whole, lesions)
    np.testing.assert_allclose(affine, LPI, rtol=0, atol=1e-12)  # flips of integers: exact but for rounding

    start = tuple(np.argwhere(labels).min(0).tolist())
    stop = np.argwhere(labels).max(0) + 1
    crop, affine = scan.to_stored(labels[tuple(map(slice, start, stop))], start)
    nifti.write(tmp_path / "crop.nii.gz", crop, affine, scan.header)
    written = nib.load(tmp_path / "crop.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.full((2, 2, 2), 3))
    np.testing.assert_allclose(written.affine[:3, :3], LPI[:3, :3], rtol=0, atol=1e-6)
    # stored voxel (2, 1, 5): 3 - 2, 4 - 1.5 and 5 - 10 mm
    np.testing.assert_allclose(written.affine[:3, 3], [1, 2.5, -5], rtol=0, atol=1e-6)


def test_labels_on_another_grid(case: Case, image: Callable[..., Path]) -> None:
    moved = LPI.copy()
    moved[0, 3] += 1
    with pytest.raises(InputError, match=r"mask\.nii: not on the grid of the image \(.*1 mm apart"):
        load_scan(case, CHANNELS).labels(image("mask.nii", affine=moved))


def test_channels_on_two_grids(image: Callable[..., Path]) -> None:
    moved = LPI.copy()
    moved[1, 3] += 0.5
    case = Case("sub-01", {"FLAIR": image("flair.nii"), "T1w": image("t1.nii", affine=moved)})
    for function in (lambda: load_scan(case, CHANNELS), lambda: preflight([case], CHANNELS)):
        with pytest.raises(InputError, match=r"t1\.nii: .*flair\.nii \(.*0\.5 mm apart\).*--resample"):
            function()


def test_resampled_channel_against_interpolation_by_hand(image: Callable[..., Path]) -> None:
    # Half a voxel along the first axis: the mean of neighbours, and 0 beyond the last.
    moved = LPI.copy()
    moved[0, 3] += 0.5
    case = Case("sub-01", {"FLAIR": image("flair.nii", 1), "T1w": image("t1.nii", 2, affine=moved)})
    preflight([case], CHANNELS, resample=True)
    scan = load_scan(case, CHANNELS, resample=True)
    np.testing.assert_allclose(scan.grid.affine, LPI)
    t1 = np.asarray(nib.load(case.images["T1w"]).dataobj, np.float64)
    inside = t1[t1 != 0]
    t1 = np.where(t1 != 0, (t1 - inside.mean()) / inside.std(), 0)  # on its own grid, then moved
    expected = np.concatenate([(t1[:-1] + t1[1:]) / 2, np.zeros((1, *SHAPE[1:]))])
    np.testing.assert_allclose(scan.image[..., 1], expected, rtol=0, atol=1e-6)  # float32 rounding of values up to 3


def test_resampled_channel_that_does_not_overlap(image: Callable[..., Path]) -> None:
    away = LPI.copy()
    away[0, 3] += 500
    case = Case("sub-01", {"FLAIR": image("flair.nii"), "T1w": image("t1.nii", affine=away)})
    with pytest.raises(InputError, match=r"t1\.nii: does not overlap .*flair\.nii"):
        load_scan(case, CHANNELS, resample=True)


def test_preflight_collects_all_problems(case: Case, image: Callable[..., Path], tmp_path: Path) -> None:
    preflight([case], CHANNELS)
    (tmp_path / "broken.nii").write_bytes(b"")
    cases = [
        case,
        Case("a", {"FLAIR": tmp_path / "absent.nii", "T1w": case.images["T1w"]}),
        Case("b", case.images, reference=image("small.nii", shape=(6, 7, 4))),
        Case("c", case.images, instances=tmp_path / "broken.nii"),
    ]
    with pytest.raises(InputError) as caught:
        preflight(cases, CHANNELS)
    message = str(caught.value)
    assert "absent.nii: does not exist" in message
    assert message.endswith("(and 2 more: small.nii, broken.nii)")
    assert "\n" not in message
    with pytest.raises(InputError, match=r"small\.nii: not on the grid of .*6 x 7 x 8 voxels against 6 x 7 x 4"):
        preflight(cases[2:3], CHANNELS, resample=True)
    with pytest.raises(InputError, match=r"and 9 more: (absent\.nii, ){3}…"):
        preflight(cases[1:2] * 10, CHANNELS)


def test_problems_of_one_case(case: Case, image: Callable[..., Path], tmp_path: Path) -> None:
    assert problems(case, CHANNELS) == []
    moved = LPI.copy()
    moved[0, 3] += 1
    images = {"FLAIR": case.images["FLAIR"], "T1w": image("moved.nii", affine=moved)}
    spoilt = Case("a", images, image("mask.nii", affine=moved), tmp_path / "absent.nii")
    found = problems(spoilt, CHANNELS)
    assert [path.name for path, _ in found] == ["absent.nii", "moved.nii", "mask.nii"]
    for (path, message), part in zip(found, ("does not exist", "--resample", "nearest neighbour"), strict=True):
        assert message.startswith(f"{path}: ")
        assert part in message
        assert "\n" not in message
    assert [path.name for path, _ in problems(spoilt, CHANNELS, resample=True)] == ["absent.nii", "mask.nii"]
    # Nothing to compare with: the others are looked at all the same.
    headless = Case("b", {"FLAIR": tmp_path / "absent.nii", "T1w": tmp_path / "absent.nii"}, spoilt.reference)
    assert [path.name for path, _ in problems(headless, CHANNELS)] == ["absent.nii"]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "a folder"),
    "loop": (lambda path: path.symlink_to(path.name), "a link that leads to itself"),
    "dangling link": (lambda path: path.symlink_to("annex"), "a link to a file that is not there"),
    "no bytes": (Path.touch, "empty, 0 bytes"),
    "pipe": (os.mkfifo, "a pipe, socket or device"),
    "text": (lambda path: path.write_text("sub-01"), "no NIfTI, it begins with 'sub-01'"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html>"), "it begins with '<!DOCTYPE html>'"),
    "gzip of text": (lambda path: path.write_bytes(gzip.compress(b"x" * 400)), "not a readable NIfTI header"),
    "cut off": (lambda path: path.write_bytes(path.with_name("whole.nii.gz").read_bytes()[:-9]), "truncated"),
    "cut off at once": (lambda path: path.write_bytes(b"\x1f\x8b\x08"), "truncated"),
    "garbage": (lambda path: path.write_bytes(path.with_name("whole.nii.gz").read_bytes() + b"?"), "other bytes"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_no_file_is_so_broken_that_checking_it_fails(tmp_path: Path, image: Callable[..., Path], kind: str) -> None:
    whole, path = image("whole.nii.gz"), tmp_path / "broken.nii.gz"
    make, part = BROKEN[kind]
    make(path)
    for channel, other in (CHANNELS, CHANNELS[::-1]):
        case = Case("a", {channel: path, other: whole}, reference=path)
        ((found, message),) = problems(case, CHANNELS)
        assert found == path
        assert part in message
        assert message.startswith(f"{path}: ")
        assert "\n" not in message


def test_a_name_too_long(tmp_path: Path) -> None:
    path = tmp_path / f"{'n' * 300}.nii.gz"
    assert "File name too long" in problems(Case("a", {"FLAIR": path}), ["FLAIR"])[0][1]


@pytest.mark.parametrize("closed", ["folder/a.nii", "folder"])
def test_without_permission(
    image: Callable[..., Path], tmp_path: Path, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    path = image("folder/a.nii")
    (tmp_path / closed).chmod(0)
    if os.access(path, os.R_OK):  # as root

        def denied(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "stat" if closed == "folder" else "open", denied)
    ((_, message),) = problems(Case("a", {"FLAIR": path}), ["FLAIR"])
    monkeypatch.undo()
    (tmp_path / closed).chmod(0o755)
    assert message.startswith(f"{path}: no permission to read it")


def test_a_wrong_checksum_shows_when_the_voxels_are_read(case: Case) -> None:
    content = bytearray(case.images["FLAIR"].read_bytes())
    content[-8] ^= 1
    case.images["FLAIR"].write_bytes(content)
    assert problems(case, CHANNELS) == []
    with pytest.raises(InputError, match=r"flair\.nii\.gz: cannot be read, damaged \(CRC"):
        load_scan(case, CHANNELS)


@pytest.mark.data
def test_real_scan(shared: Path, tmp_path: Path) -> None:
    cases = read_input(shared / "data" / "mslesseg", CHANNELS)
    preflight(cases, CHANNELS)
    case = next(c for c in cases if c.name == "sub-18_ses-1")
    assert case.reference is not None
    scan = load_scan(case, CHANNELS, "RAS")
    assert scan.grid.axis_codes == "RAS"
    whole, affine = scan.to_stored(scan.labels(case.reference))
    nifti.write(tmp_path / "mask.nii.gz", whole, affine, scan.header, "uint8")
    oracle, written = nib.load(case.reference), nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(oracle.dataobj))
    np.testing.assert_array_equal(written.affine, nib.load(case.images["FLAIR"]).affine)
    for c in range(2):
        inside = scan.image[..., c][scan.image[..., c] != 0].astype(np.float64)
        # float32 rounding of about 1e6 values
        assert (inside.mean(), inside.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
