"""Reading NIfTI: every dtype and scaling that is legal, one line for everything that is not."""

import contextlib
import gzip
import os
import shutil
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from xaiseg.errors import InputError
from xaiseg.imaging import nifti
from xaiseg.imaging.grid import Grid
from xaiseg.imaging.header import MAX_VOXELS

AFFINE = np.array([[-1.0, 0, 0, 90], [0, 1.5, 0, -126], [0, 0, 2.5, -72], [0, 0, 0, 1]])
SHAPE = (5, 6, 7)


def raw_nifti(
    dtype: str = "float32",
    values: np.ndarray | None = None,
    image: type = nib.Nifti1Image,
    affine: np.ndarray = AFFINE,
    **fields: object,
) -> bytes:
    """The bytes of a file, with header fields set after nibabel has filled them in."""
    if values is None:
        values = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 97
    made = image(values.astype(dtype), affine, dtype=np.dtype(dtype))
    raw = made.to_bytes()
    header = image.header_class(raw[: image.header_class.sizeof_hdr], check=False)
    for field, value in fields.items():
        header[field] = value
    return header.binaryblock + raw[len(header.binaryblock) :]


def save(path: Path, raw: bytes) -> Path:
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def refused(path: Path, *parts: str) -> None:
    """`check_header` and `read` refuse the file, in one line that names it."""
    for function in (nifti.check_header, nifti.read, nifti.read_labels):
        with pytest.raises(InputError) as caught:
            function(path)
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        for part in parts:
            assert part in message, message


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("image", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("scaling", [(0, 0), (np.nan, np.nan), (1, 0), (0.25, -3)])
def test_values_and_grid(tmp_path: Path, name: str, image: type, dtype: str, scaling: tuple[float, float]) -> None:
    path = tmp_path / name
    raw = raw_nifti(dtype, image=image, scl_slope=scaling[0], scl_inter=scaling[1])
    path.write_bytes(gzip.compress(raw) if name.lower().endswith("gz") else raw)
    slope, inter = scaling if scaling[0] > 0 else (1, 0)
    volume, grid, header = nifti.read(path)
    assert volume.dtype == np.float32
    np.testing.assert_array_equal(volume, (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 97) * slope + inter)
    assert grid.shape == SHAPE
    np.testing.assert_array_equal(grid.affine, AFFINE)
    np.testing.assert_array_equal(nifti.check_header(path).affine, AFFINE)
    assert isinstance(header, image.header_class)


def test_against_nibabel_on_big_endian_oblique(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    turned = AFFINE.copy()
    turned[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ AFFINE[:3, :3]
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    made = nib.Nifti1Image(rng.normal(0, 400, SHAPE).astype(np.float32), turned, header)
    nib.save(made, tmp_path / "a.nii.gz")  # nibabel picks a slope and an intercept to fit int16
    oracle = nib.load(tmp_path / "a.nii.gz")
    assert oracle.dataobj.slope not in (0, 1)
    volume, grid, _ = nifti.read(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume, oracle.get_fdata(dtype=np.float64).astype(np.float32))
    np.testing.assert_array_equal(grid.affine, oracle.affine)


def test_scaling_is_computed_in_float64(tmp_path: Path) -> None:
    # In float32, 16777217 is 16777216 and the difference to the intercept is lost.
    values = np.full(SHAPE, 16777217)
    path = save(tmp_path / "a.nii", raw_nifti("int32", values, scl_slope=1, scl_inter=-16777216))
    np.testing.assert_array_equal(nifti.read(path)[0], 1)


def test_trailing_axes_of_one_are_dropped(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", raw_nifti(values=np.arange(210).reshape(*SHAPE, 1, 1)))
    assert nifti.check_header(path).shape == SHAPE
    np.testing.assert_array_equal(nifti.read(path)[0], np.arange(210).reshape(SHAPE))
    np.testing.assert_array_equal(nifti.read_labels(path), np.arange(210).reshape(SHAPE))


def test_gzip_of_several_members_and_with_bytes_after_the_volume(tmp_path: Path) -> None:
    raw = raw_nifti()
    path = tmp_path / "a.nii.gz"
    for content in (gzip.compress(raw[:500]) + gzip.compress(raw[500:]), gzip.compress(raw + b"more")):
        path.write_bytes(content)
        assert nifti.check_header(path).shape == SHAPE
        assert nifti.read(path)[0].shape == SHAPE


def test_check_header_does_not_decompress(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = raw_nifti(values=rng.normal(size=(40, 40, 40)))
    path = save(tmp_path / "a.nii.gz", raw)
    damaged = bytearray(path.read_bytes())
    damaged[100_000] ^= 255  # beyond what a header needs
    path.write_bytes(damaged)
    assert nifti.check_header(path).shape == (40, 40, 40)
    with pytest.raises(InputError, match="cannot be read"):
        nifti.read(path)


def test_length_of_a_compressed_file_beyond_4_gib(tmp_path: Path) -> None:
    # A gzip file ends in its length modulo 2**32; here that of the 6.8 GB which the header announces.
    shape = (1700, 1000, 1000)
    length = 352 + 4 * 1700 * 10**6
    packed = gzip.compress(raw_nifti(dim=[3, *shape, 1, 1, 1, 1]))
    filling = bytes(length // 1032 + 1)  # gzip packs no more than 1032 to 1
    path = tmp_path / "a.nii.gz"
    path.write_bytes(packed[:-8] + filling + packed[-8:])
    with pytest.raises(InputError, match="damaged"):
        nifti.check_header(path)
    path.write_bytes(packed[:-8] + filling + packed[-8:-4] + (length % 2**32).to_bytes(4, "little"))
    assert nifti.check_header(path).shape == shape
    path.write_bytes(packed[:-8] + filling[:-1000] + packed[-8:-4] + (length % 2**32).to_bytes(4, "little"))
    with pytest.raises(
        InputError, match=r"truncated or no scan, 6588\d{3} bytes where its header announces 6800000352"
    ):
        nifti.check_header(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.6, 0.99])
def test_truncated(tmp_path: Path, name: str, keep: float) -> None:
    path = save(tmp_path / name, raw_nifti(values=np.random.default_rng(0).normal(size=SHAPE)))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(path)
    if keep > 0.5:
        refused(path, "truncated")


def test_truncated_before_compression(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.nii.gz", raw_nifti()[:-1]), "truncated", "1191 bytes", "1192")


def test_wrong_checksum(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", raw_nifti())
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="CRC"):
        nifti.read(path)


def test_files_that_are_no_nifti(tmp_path: Path) -> None:
    refused(tmp_path / "absent.nii.gz", "does not exist")
    (tmp_path / "folder.nii.gz").mkdir()
    refused(tmp_path / "folder.nii.gz", "a folder")
    refused(tmp_path / "a\0b.nii.gz", "does not exist")
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "annex")
    refused(tmp_path / "link.nii.gz", "a link to a file that is not there")
    (tmp_path / "loop.nii.gz").symlink_to("loop.nii.gz")
    refused(tmp_path / "loop.nii.gz", "Too many levels of symbolic links", "a link that leads to itself")
    refused(tmp_path / f"{'n' * 300}.nii.gz", "File name too long", "check the path")
    os.mkfifo(tmp_path / "pipe.nii.gz")  # opening it would wait for ever
    refused(tmp_path / "pipe.nii.gz", "a pipe, socket or device")
    refused(Path("/dev/zero"), "a pipe, socket or device")
    for name in ("empty.nii", "empty.nii.gz"):
        (tmp_path / name).touch()
        refused(tmp_path / name, "empty")
    (tmp_path / "scan.mgz").write_bytes(b"x")
    refused(tmp_path / "scan.mgz", ".nii or .nii.gz")
    (tmp_path / "plain.nii.gz").write_bytes(raw_nifti())
    refused(tmp_path / "plain.nii.gz", "not gzip", "rename it to .nii")
    (tmp_path / "packed.nii").write_bytes(gzip.compress(raw_nifti()))
    refused(tmp_path / "packed.nii", "gzip", "rename it to .nii.gz")
    (tmp_path / "page.nii.gz").write_bytes(b"<!DOCTYPE html>\n<html><head><title>404</title>")
    refused(tmp_path / "page.nii.gz", "not gzip and no NIfTI, it begins with '<!DOCTYPE html>\\n<html><h'", "web page")
    (tmp_path / "words.nii.gz").write_text("version https://git-lfs.github.com/spec/v1")
    refused(tmp_path / "words.nii.gz", "it begins with 'version https://git-lfs.'", "pointer")
    (tmp_path / "zip.nii.gz").write_bytes(b"PK\x03\x04\xff")
    refused(tmp_path / "zip.nii.gz", r"it begins with b'PK\x03\x04\xff'")
    refused(save(tmp_path / "page.nii", b"<html>" * 100), "not a readable NIfTI header")
    refused(save(tmp_path / "text.nii", b"sub-01 " * 100), "not a readable NIfTI header")
    refused(save(tmp_path / "text.nii.gz", b"sub-01"), "6 bytes", "too few")
    refused(save(tmp_path / "pair.nii", raw_nifti(magic=b"ni1", vox_offset=0)), "voxels begin at byte 0")


def test_no_permission_as_user(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", raw_nifti())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user, such as root, may read everything")
    refused(path, "permission")


@pytest.mark.parametrize("method", ["open", "stat"])  # of the file, of its folder
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path / "a.nii", raw_nifti())
    monkeypatch.setattr(Path, method, closed)
    refused(path, "permission", "those of its folder")


def test_a_disk_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    path = save(tmp_path / "a.nii", raw_nifti())
    monkeypatch.setattr(Path, "open", broken)
    refused(path, "cannot be read (Input/output error)")


@pytest.mark.parametrize("garbage", [b"more", b"x" * 100_000])
def test_bytes_after_the_gzip_stream(tmp_path: Path, garbage: bytes) -> None:
    path = save(tmp_path / "a.nii.gz", raw_nifti())
    packed = path.read_bytes()
    path.write_bytes(packed + garbage)
    refused(path, "the gzip stream is followed by other bytes")
    path.write_bytes(packed + bytes(512))  # tapes and archives fill up with zeros
    assert nifti.read(path)[0].shape == SHAPE
    assert nifti.check_header(path).shape == SHAPE


@contextlib.contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """What Python allocates within stays below `limit` bytes at every moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("members", [True, False])
@pytest.mark.parametrize("length_fits", [True, False])
def test_a_bomb_is_not_unpacked(tmp_path: Path, members: bool, length_fits: bool) -> None:
    raw = raw_nifti("uint8", np.zeros((64, 64, 64)))
    ten_gb, path = 10 * 2**30, tmp_path / "a.nii.gz"
    if members:  # gzip files one after the other, each of them honest
        with path.open("wb") as file:
            file.write(gzip.compress(raw))
            packed = gzip.compress(bytes(2**24))
            for _ in range(ten_gb // 2**24):
                file.write(packed)
    else:
        stream = zlib.compressobj(9, zlib.DEFLATED, 31)
        with path.open("wb") as file:
            file.write(stream.compress(raw) + stream.flush(zlib.Z_FULL_FLUSH))
            # Flushed in full, a piece stands for itself and can be repeated; the checksum at the end is never reached.
            piece = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed = piece.compress(bytes(2**24)) + piece.flush(zlib.Z_FULL_FLUSH)
            for _ in range(ten_gb // 2**24):
                file.write(packed)
            file.write(stream.flush())
    with path.open("r+b") as file:  # the length at the end may lie: then it shows when the voxels are read
        file.seek(-4, os.SEEK_END)
        file.write((len(raw) if length_fits else 0).to_bytes(4, "little"))
    functions = [nifti.read, nifti.read_labels] + ([] if length_fits else [nifti.check_header])
    for function in functions:
        # The volume, a megabyte beyond it, and copies.
        with (
            memory_below(8 * 2**20),
            pytest.raises(InputError, match=r"a\.nii\.gz: holds more data than .* 262496 bytes"),
        ):
            function(path)


def test_a_megabyte_after_the_volume_is_passed_over(tmp_path: Path) -> None:
    raw = raw_nifti()
    path = save(tmp_path / "a.nii.gz", raw + bytes(2**20))
    assert nifti.check_header(path).shape == nifti.read(path)[0].shape == SHAPE
    refused(save(tmp_path / "a.nii.gz", raw + bytes(2**20 + 1)), "holds more data")
    path = save(tmp_path / "a.nii", raw + bytes(2**22))  # nothing unpacks: what follows is not read
    assert nifti.check_header(path).shape == nifti.read(path)[0].shape == SHAPE


def test_a_volume_packed_as_far_as_gzip_can(tmp_path: Path) -> None:
    raw = raw_nifti("uint8", np.zeros((200, 200, 200)))
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(raw, 9))
    assert len(raw) > 1000 * path.stat().st_size
    assert nifti.check_header(path).shape == nifti.read(path)[0].shape == (200, 200, 200)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    "shape", [(1291, 1291, 1291), (32767, 32767, 3), (32768, 1, 1), (2**40, 2**40, 2**40), (2**31, 2**31, 4)]
)
def test_headers_that_announce_too_much(tmp_path: Path, name: str, shape: tuple[int, int, int]) -> None:
    raw = raw_nifti("uint8", image=nib.Nifti2Image, dim=[3, *shape, 1, 1, 1, 1])
    with memory_below(2**22):
        refused(save(tmp_path / name, raw), f"header announces shape {shape}", "at most 32767 voxels along an axis")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_header_that_announces_just_little_enough(tmp_path: Path, name: str) -> None:
    shape = (2**10, 2**10, 2**11)
    assert np.prod(shape, dtype=np.int64) == MAX_VOXELS
    with memory_below(2**22):
        refused(save(tmp_path / name, raw_nifti("float64", dim=[3, *shape, 1, 1, 1, 1])), "truncated", "17179869536")


def two_forms(sform: np.ndarray, qform: np.ndarray, codes: tuple[int, int], image: type = nib.Nifti1Image) -> bytes:
    made = image(np.zeros(SHAPE, np.int16), None)
    made.header.set_sform(sform, codes[0])
    made.header.set_qform(qform, codes[1])
    return image(made.dataobj, None, made.header).to_bytes()


MIRRORED = np.diag([-1.0, 1, 1, 1]) @ AFFINE


@pytest.mark.parametrize("image", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_forms_that_disagree_about_left_and_right(tmp_path: Path, image: type, name: str) -> None:
    path = save(tmp_path / name, two_forms(AFFINE, MIRRORED, (4, 1), image))
    found = "the axes of its sform (code 4) run LAS, those of its qform (code 1) RAS"
    refused(path, "left and right are uncertain", found, "fslorient -copyqform2sform", "nibabel")


@pytest.mark.parametrize("codes", [(0, 1), (1, 0), (0, 0)])
def test_a_form_without_a_code_is_not_heeded(tmp_path: Path, codes: tuple[int, int]) -> None:
    assert nifti.check_header(save(tmp_path / "a.nii", two_forms(AFFINE, MIRRORED, codes))).shape == SHAPE


def test_forms_of_different_spaces_may_differ_but_for_their_handedness(tmp_path: Path) -> None:
    turned = np.array([[0, -1.0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]) @ AFFINE  # a rotation and a swap
    assert np.sign(np.linalg.det(turned)) == np.sign(np.linalg.det(MIRRORED))
    refused(save(tmp_path / "a.nii", two_forms(AFFINE, turned, (4, 1))), "left and right are uncertain")
    path = save(tmp_path / "b.nii", two_forms(MIRRORED, turned, (4, 1)))
    np.testing.assert_array_equal(nifti.check_header(path).affine, MIRRORED)


def test_a_qform_that_cannot_be_worked_out_is_not_heeded(tmp_path: Path) -> None:
    raw = raw_nifti(sform_code=1, qform_code=1, quatern_b=2)
    np.testing.assert_array_equal(nifti.check_header(save(tmp_path / "a.nii", raw)).affine, AFFINE)


def test_a_slice_without_a_third_axis_has_no_handedness(tmp_path: Path) -> None:
    for qfac in (1, -1):
        raw = raw_nifti(
            values=np.zeros((5, 6)),
            sform_code=1,
            qform_code=1,
            srow_x=[-1, 0, 0, 0],
            srow_y=[0, 1.5, 0, 0],
            srow_z=[0, 0, 0, 0],
            pixdim=[qfac, 1, 1.5, 1, 1, 1, 1, 1],
        )
        assert nifti.check_header(save(tmp_path / "a.nii", raw)).axis_codes == "LAS"


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (raw_nifti(values=np.zeros((4, 4, 4, 2))), "4-D, shape (4, 4, 4, 2)"),
        (raw_nifti(values=np.zeros(4)), "1-D, shape (4,)"),
        (raw_nifti(dim=[2, 5, 0, 7, 1, 1, 1, 1]), "shape (5, 0, 1)"),
        (raw_nifti(values=np.zeros((4, 4, 1)), srow_x=[1, 1, 1, 0], srow_y=[0] * 4, srow_z=[0] * 4), "degenerate"),
        (raw_nifti(values=np.zeros((4, 4)), srow_x=[1, 2, 0, 0], srow_y=[0] * 4, srow_z=[0] * 4), "degenerate"),
        (raw_nifti(values=np.zeros((4, 4)), srow_x=[1, 0, np.nan, 0]), "finite lengths"),
        (raw_nifti(srow_x=[-1, 0, 0, 0], srow_y=[0, 1, 0, 0], srow_z=[0] * 4), "degenerate"),
        (raw_nifti(dim=[3, 5, 0, 7, 1, 1, 1, 1]), "shape (5, 0, 7)"),
        (raw_nifti("complex64"), "complex64"),
        (raw_nifti("uint8", datatype=128, bitpix=24), "RGB"),
        (raw_nifti(scl_slope=np.inf), "slope inf"),
        (raw_nifti(scl_slope=2, scl_inter=np.nan), "intercept nan"),
        (raw_nifti(srow_x=[0, 0, 0, 0]), "degenerate"),
        (raw_nifti(srow_x=[0, 1.5, 0, 0]), "degenerate"),
        (raw_nifti(srow_x=[np.nan, 0, 0, 0]), "finite lengths"),
        (raw_nifti(srow_x=[np.inf, 0, 0, 0]), "finite lengths"),
        (raw_nifti(xyzt_units=1), "metres"),
        (raw_nifti(xyzt_units=3 + 8), "micrometres"),
        (raw_nifti(vox_offset=100), "readable NIfTI header"),
        (raw_nifti(vox_offset=np.inf), "readable NIfTI header"),
        (raw_nifti(vox_offset=np.nan), "readable NIfTI header"),
        (raw_nifti(sform_code=0, qform_code=1, quatern_b=2), "readable NIfTI header"),
        (raw_nifti(datatype=12345), "12345"),
    ],
)
def test_headers_that_cannot_be_used(tmp_path: Path, raw: bytes, part: str) -> None:
    refused(save(tmp_path / "a.nii", raw), part)
    refused(save(tmp_path / "a.nii.gz", raw), part)


def test_flaws_that_nibabel_repairs_are_not_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "a.nii", raw_nifti(pixdim=[0, 0, 1.5, 2.5, 1, 1, 1, 1]))
    nifti.read(path)
    refused(save(tmp_path / "b.nii", raw_nifti(datatype=12345)))
    assert capfd.readouterr() == ("", "")


def test_voxels_that_are_not_finite(tmp_path: Path) -> None:
    values = np.zeros(SHAPE)
    values[1, 2, 3], values[4, 0, 0] = np.nan, np.inf
    with pytest.raises(InputError, match=r"a\.nii: .*float32: 2, the first at \(1, 2, 3\) with value nan"):
        nifti.read(save(tmp_path / "a.nii", raw_nifti(values=values)))
    values = np.zeros(SHAPE)
    values[2, 0, 5] = 1e39
    with pytest.raises(InputError, match=r"float32: 1, the first at \(2, 0, 5\) with value 1e\+39"):
        nifti.read(save(tmp_path / "b.nii", raw_nifti("float64", values)))
    with pytest.raises(InputError, match=r"float32: 208, the first at \(0, 0, 2\) with value 6e\+38"):
        nifti.read(save(tmp_path / "c.nii", raw_nifti("int16", np.arange(210).reshape(SHAPE), scl_slope=3e38)))


def test_labels(tmp_path: Path) -> None:
    values = np.zeros(SHAPE)
    values[1, 1, 1], values[2, 2, 2] = 1, 70000
    for dtype in ("int32", "float32"):
        labels = nifti.read_labels(save(tmp_path / "a.nii.gz", raw_nifti(dtype, values)), Grid(SHAPE, AFFINE))
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, values)
    nearly = nifti.read_labels(save(tmp_path / "a.nii.gz", raw_nifti("float64", values + 5e-7)))
    np.testing.assert_array_equal(nearly, values)
    # A table per label would not fit into memory.
    with pytest.raises(InputError, match=r"a\.nii\.gz: largest label 2000070000; expected at most 1000000"):
        nifti.read_labels(save(tmp_path / "a.nii.gz", raw_nifti("int32", values + 2_000_000_000)))


@pytest.mark.parametrize("wrong", [0.5, -1.0, np.nan, np.inf, 2.0**31])
def test_values_that_are_no_labels(tmp_path: Path, wrong: float) -> None:
    values = np.zeros(SHAPE)
    values[0, 0, :2] = wrong
    with pytest.raises(InputError, match=r"a\.nii: voxels without a valid label: 2, values") as caught:
        nifti.read_labels(save(tmp_path / "a.nii", raw_nifti("float64", values)))
    assert f"values {wrong:g};" in str(caught.value)


def test_labels_on_another_grid(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", raw_nifti("uint8"))
    moved = AFFINE.copy()
    moved[2, 3] += 2
    with pytest.raises(InputError, match=r"a\.nii: not on the grid of the image \(.*up to 2 mm apart"):
        nifti.read_labels(path, Grid(SHAPE, moved))
    with pytest.raises(InputError, match="5 x 6 x 8 voxels against 5 x 6 x 7"):
        nifti.read_labels(path, Grid((5, 6, 8), AFFINE))


@pytest.mark.data
def test_real_scans_against_nibabel(shared: Path, tmp_path: Path) -> None:
    for path in ("open_ms/sub-19/anat/sub-19_space-MNI_FLAIR.nii.gz",):
        source = shared / "data" / path
        oracle = nib.load(source)
        volume, grid, _ = nifti.read(source)
        np.testing.assert_array_equal(volume, np.asarray(oracle.dataobj, np.float32))
        np.testing.assert_array_equal(grid.affine, oracle.affine)
        copy = tmp_path / source.name
        shutil.copyfile(source, copy)
        copy.chmod(0o644)
        copy.write_bytes(copy.read_bytes()[:-100_000])
        refused(copy, "truncated")


def slice_of(affine: np.ndarray, shape: tuple[int, ...], **fields: object) -> bytes:
    return raw_nifti(values=np.arange(30).reshape(shape), affine=affine, **fields)


@pytest.mark.parametrize("image", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 1, 1)])
def test_one_slice_is_a_volume_of_one(tmp_path: Path, shape: tuple[int, ...], image: type) -> None:
    path = save(tmp_path / "a.nii.gz", slice_of(AFFINE, shape, image=image))
    volume, grid, header = nifti.read(path)
    np.testing.assert_array_equal(volume, np.arange(30).reshape(5, 6, 1))
    assert grid.shape == nifti.check_header(path).shape == (5, 6, 1)
    np.testing.assert_array_equal(grid.affine, AFFINE)
    np.testing.assert_array_equal(nifti.read_labels(path, grid), volume)
    nifti.write(tmp_path / "b.nii.gz", volume, grid.affine, header)
    again, same, _ = nifti.read(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(again, volume)
    np.testing.assert_array_equal(same.affine, AFFINE)
    assert nib.load(tmp_path / "b.nii.gz").shape == (5, 6, 1)


@pytest.mark.parametrize(
    ("columns", "axis"),
    [
        (((-1, 0, 0), (0, 1.5, 0)), (0, 0, 1)),  # axial: the normal to S, though LAS axes are left-handed
        (((1, 0, 0), (0, 1.5, 0)), (0, 0, 1)),
        (((0, -1, 0), (0, 0, 1.5)), (1, 0, 0)),  # sagittal: to R
        (((-1, 0, 0), (0, 0, 1.5)), (0, 1, 0)),  # coronal: to A
        (((0.8, 0.6, 0), (0, 0, 2)), (-0.6, 0.8, 0)),  # oblique: mostly to A
    ],
)
@pytest.mark.parametrize(("thickness", "length"), [(0, 1), (np.nan, 1), (3, 3), (-3, 3)])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1)])
def test_a_slice_without_a_third_axis_gets_the_normal(
    tmp_path: Path,
    columns: tuple[tuple[float, ...], ...],
    axis: tuple[float, ...],
    thickness: float,
    length: float,
    shape: tuple[int, ...],
) -> None:
    rows = {f"srow_{a}": [columns[0][i], columns[1][i], 0, 10 + i] for i, a in enumerate("xyz")}
    path = save(tmp_path / "a.nii", slice_of(AFFINE, shape, pixdim=[1, 1, 1.5, thickness, 1, 1, 1, 1], **rows))
    volume, grid, header = nifti.read(path)
    expected = np.column_stack([*columns, np.multiply(axis, length), (10, 11, 12)])
    np.testing.assert_allclose(grid.affine[:3], expected, rtol=0, atol=1e-6)  # stored as float32
    nifti.write(tmp_path / "b.nii", volume, grid.affine, header)
    assert nifti.check_header(tmp_path / "b.nii").axis_codes == grid.axis_codes


@pytest.mark.parametrize("thickness", [0, np.nan, np.inf])
@pytest.mark.parametrize("qform_code", [0, 1])
def test_a_slice_placed_by_its_voxel_sizes(tmp_path: Path, thickness: float, qform_code: int) -> None:
    pixdim = [1, 2, 3, thickness, 1, 1, 1, 1]
    raw = slice_of(np.diag([2.0, 3, 1, 1]), (5, 6), sform_code=0, qform_code=qform_code, pixdim=pixdim)
    np.testing.assert_allclose(nifti.check_header(save(tmp_path / "a.nii", raw)).spacing, (2, 3, 1), rtol=1e-6)
