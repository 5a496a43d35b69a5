"""Writing NIfTI: placement kept, complete files only, the same bytes for the same result."""

import gzip
import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from xaiseg.errors import InputError
from xaiseg.imaging import nifti
from xaiseg.imaging.grid import Grid, difference

SHAPE = (5, 6, 7)
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0] @ np.diag([1, 1.5, 2.5])
OBLIQUE[:3, 3] = 90, -126, -72
SHEARED = OBLIQUE @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def scan(tmp_path: Path, image: type = nib.Nifti1Image, sform: tuple = (OBLIQUE, 1), qform: tuple = (OBLIQUE, 1)):
    """The header, as read, of a scan with these forms and codes."""
    made = image(np.ones(SHAPE, np.int16), None)
    made.header.set_qform(*qform)
    made.header.set_sform(*sform)
    made.header["cal_max"], made.header["descrip"], made.header["intent_code"] = 138, b"patient", 1001
    made.header.set_xyzt_units("mm", "sec")
    nib.save(image(made.dataobj, None, made.header), tmp_path / "scan.nii")
    return nifti.read(tmp_path / "scan.nii")[2]


def codes(header: nib.Nifti1Header) -> tuple[int, int]:
    return int(header["sform_code"]), int(header["qform_code"])


@pytest.mark.parametrize("image", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("given", [(1, 1), (4, 4), (2, 0), (0, 1), (4, 1), (0, 0)])
def test_same_grid_keeps_both_forms_bit_for_bit(tmp_path: Path, image: type, given: tuple[int, int]) -> None:
    like = scan(tmp_path, image, (OBLIQUE, given[0]), (OBLIQUE, given[1]))
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    nifti.write(tmp_path / "map.nii.gz", array, like.get_best_affine(), like)
    back = nib.load(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), array)
    assert type(back) is image
    assert codes(back.header) == given
    for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "pixdim"):
        np.testing.assert_array_equal(back.header[field], like[field])
    assert back.get_data_dtype() == np.float32
    assert back.header.get_xyzt_units()[0] == "mm"
    assert (back.header["cal_max"], back.header["intent_code"]) == (0, 0)
    assert back.header["descrip"] == b"xaiseg"


@pytest.mark.parametrize("image", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("given", "kept"), [((1, 1), (1, 1)), ((2, 0), (2, 0)), ((0, 3), (0, 3)), ((4, 1), (4, 1)), ((0, 0), (2, 2))]
)
def test_crop_moves_both_forms(tmp_path: Path, image: type, given: tuple[int, int], kept: tuple[int, int]) -> None:
    like = scan(tmp_path, image, (OBLIQUE, given[0]), (OBLIQUE, given[1]))
    crop = Grid(SHAPE, like.get_best_affine()).crop((1, 2, 3), (3, 2, 2))
    nifti.write(tmp_path / "crop.nii", np.ones(crop.shape, np.float32), crop.affine, like)
    header = nib.load(tmp_path / "crop.nii").header
    assert codes(header) == kept
    for affine, code in ((header.get_sform(), kept[0]), (header.get_qform(), kept[1])):
        if code:
            assert difference(Grid(crop.shape, affine), crop, tolerance=1e-4) is None  # mm; float32 at 130 mm
    np.testing.assert_allclose(header["pixdim"][1:4], crop.spacing, rtol=1e-6)
    assert difference(nifti.check_header(tmp_path / "crop.nii"), crop, tolerance=1e-4) is None


def test_crop_with_flipped_axes(tmp_path: Path) -> None:
    like = scan(tmp_path)
    flipped = like.get_best_affine() @ np.array([[-1, 0, 0, 4], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    nifti.write(tmp_path / "a.nii", np.ones((5, 7, 6), np.float32), flipped, like)
    header = nib.load(tmp_path / "a.nii").header
    for affine in (header.get_sform(), header.get_qform()):
        np.testing.assert_allclose(affine, flipped, rtol=0, atol=1e-4)  # float32 at 130 mm


def test_forms_of_different_spaces_each_move_in_their_own(tmp_path: Path) -> None:
    scanner = np.diag([1.0, 1.5, 2.5, 1])
    like = scan(tmp_path, sform=(OBLIQUE, 4), qform=(scanner, 1))
    crop = Grid(SHAPE, like.get_best_affine()).crop((1, 2, 3), (3, 2, 2))
    nifti.write(tmp_path / "crop.nii", np.ones(crop.shape, np.float32), crop.affine, like)
    header = nib.load(tmp_path / "crop.nii").header
    assert codes(header) == (4, 1)
    np.testing.assert_allclose(header.get_sform(), crop.affine, rtol=0, atol=1e-4)
    # Voxel (1, 2, 3) of the scan lies at (1, 3, 7.5) mm in the scanner.
    np.testing.assert_allclose(header.get_qform()[:3, 3], [1, 3, 7.5], rtol=0, atol=1e-4)


def test_shear_stays_in_the_sform(tmp_path: Path) -> None:
    nifti.write(tmp_path / "a.nii", np.ones(SHAPE, np.float32), SHEARED)
    header = nib.load(tmp_path / "a.nii").header
    assert codes(header) == (2, 0)
    np.testing.assert_allclose(header.get_sform(), SHEARED, rtol=0, atol=1e-5)

    like = scan(tmp_path, sform=(OBLIQUE, 0), qform=(OBLIQUE, 3))  # a sheared result of a scan with a qform only
    nifti.write(tmp_path / "b.nii", np.ones(SHAPE, np.float32), SHEARED, like)
    header = nib.load(tmp_path / "b.nii").header
    assert codes(header) == (3, 0)
    np.testing.assert_allclose(header.get_sform(), SHEARED, rtol=0, atol=1e-5)


def test_unusable_qform_beside_a_good_sform(tmp_path: Path) -> None:
    like = scan(tmp_path)
    like["quatern_b"] = 2
    crop = Grid(SHAPE, like.get_best_affine()).crop((1, 2, 3), (3, 2, 2))
    nifti.write(tmp_path / "crop.nii", np.ones(crop.shape, np.float32), crop.affine, like)
    assert codes(nib.load(tmp_path / "crop.nii").header) == (1, 0)
    assert difference(nifti.check_header(tmp_path / "crop.nii"), crop) is None


@pytest.mark.parametrize(
    ("given", "stored"), [("float64", "float32"), ("int64", "int32"), ("bool", "uint8"), ("int16", "int16")]
)
def test_default_dtypes(tmp_path: Path, given: str, stored: str) -> None:
    nifti.write(tmp_path / "a.nii", np.ones(SHAPE, given), OBLIQUE)
    image = nib.load(tmp_path / "a.nii")
    assert image.get_data_dtype() == stored
    assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    np.testing.assert_array_equal(np.asarray(image.dataobj), 1)


def test_channels_and_order(tmp_path: Path) -> None:
    array = np.arange(420, dtype=np.float32).reshape(*SHAPE, 2)
    nifti.write(tmp_path / "a.nii.gz", array, OBLIQUE, scan(tmp_path))
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj), array)


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    for array, dtype in [
        (np.full(SHAPE, 300), "uint8"),
        (np.full(SHAPE, 0.5), "uint8"),
        (np.full(SHAPE, np.nan), "int16"),
        (np.full(SHAPE, 2**40), None),
        (np.full(SHAPE, 1e39), None),
    ]:
        with pytest.raises(ValueError, match="do not fit"):
            nifti.write(tmp_path / "a.nii", array, OBLIQUE, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["map.nii", "map.nii.gz"])
def test_the_same_result_gives_the_same_bytes(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    like = scan(tmp_path)
    nifti.write(tmp_path / name, array, OBLIQUE, like)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    nifti.write(tmp_path / f"other_{name}", np.asfortranarray(array), OBLIQUE, like)
    content = (tmp_path / name).read_bytes()
    assert content == (tmp_path / f"other_{name}").read_bytes()
    if name.endswith("gz"):
        assert content[3] == 0  # RFC 1952: no name among the flags
        assert content[4:8] == bytes(4)  # no time
        content = gzip.decompress(content)
    assert len(content) == 352 + array.nbytes


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    nifti.write(path, np.ones(SHAPE, np.float32), OBLIQUE)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"a\.nii\.gz: cannot be written \(No space left on device\)"):
        nifti.write(path, np.zeros(SHAPE, np.float32), OBLIQUE)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
    assert path.read_bytes() == before


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.nii").mkdir()
    for path in (tmp_path / "absent" / "a.nii", tmp_path / "file" / "a.nii", tmp_path / "folder.nii"):
        with pytest.raises(InputError, match="cannot be written"):
            nifti.write(path, np.ones(SHAPE, np.float32), OBLIQUE)
    with pytest.raises(InputError, match=r"ends in \.nii"):
        nifti.write(tmp_path / "a.mha", np.ones(SHAPE, np.float32), OBLIQUE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.nii"]


def test_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    nifti.write(tmp_path / "a.nii", np.ones(SHAPE, np.float32), OBLIQUE)
    assert (tmp_path / "a.nii").stat().st_mode == (tmp_path / "plain").stat().st_mode
