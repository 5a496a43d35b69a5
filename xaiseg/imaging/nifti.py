"""Read and write NIfTI volumes; whatever is wrong with a file becomes an `InputError`.

The bytes are read here and only the header is left to nibabel: a gzip stream read to its end has its checksum checked,
which nibabel's lazy arrays skip, and a file written from the same result twice is the same file.
"""

import contextlib
import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np

from xaiseg.errors import InputError
from xaiseg.imaging.grid import Grid, difference
from xaiseg.imaging.header import SIZE, grid_of, parse, place
from xaiseg.imaging.stream import announced, blocks, is_compressed, last_length, opened, truncated

_LEVEL = 1  # gzip, as nibabel: level 6 takes a float map of a head from 10.9 to 9.5 % in three times the time
MAX_LABEL = 1_000_000  # tables per label are kept; no scan has more lesions


def check_header(path: Path) -> Grid:
    """The grid of a NIfTI file, from its header, checked without decompressing the voxels.

    A truncated `.nii` shows in the file's size, a truncated `.nii.gz` in the length that ends a gzip file. Only where
    that length is not the expected one (gzip files joined together are legal) is the whole file decompressed, though never
    much further than its header announces.

    Raises:
        InputError: the file is absent, unreadable, truncated or no NIfTI; neither 3-D nor one 2-D slice, which is a
            volume (X, Y, 1), or with an axis of length 0; of more voxels than `header.MAX_VOXELS`, or packed so that it
            holds more than it announces; not real numbers; its affine or scaling is unusable; or sform and qform
            disagree about left and right.
    """
    path = Path(path)
    with opened(path) as stream:
        start = stream.read(SIZE)
        header = parse(path, start)
        expected = announced(path, header)
        if is_compressed(path) and last_length(path) != expected % 2**32:
            found = len(start) + sum(map(len, blocks(path, stream, len(start), expected)))
            if found < expected:
                raise truncated(path, expected, found)
    return grid_of(header)


def read(path: Path) -> tuple[np.ndarray, Grid, nib.Nifti1Header]:
    """Read a volume with its scaling applied.

    Returns:
        (X, Y, Z) float32 as stored, its grid, and its header (`Nifti2Header` for NIfTI-2) for `write`.

    Raises:
        InputError: as `check_header`, or a voxel is NaN, infinite or beyond float32 once scaled.
    """
    path = Path(path)
    values, grid, header = _load(path)
    with np.errstate(over="ignore", invalid="ignore"):
        volume = values.astype(np.float32)
    bad = ~np.isfinite(volume)
    if bad.any():
        first = tuple(np.argwhere(bad)[0].tolist())
        raise InputError(
            f"{path}: voxels not finite as float32: {np.count_nonzero(bad)}, the first at {first} with value "
            f"{values[first]:g}; expected finite intensities: set these voxels to 0 or correct the scaling"
        )
    return volume, grid, header


def read_labels(path: Path, grid: Grid | None = None) -> np.ndarray:
    """Read a mask or a map of integer labels.

    Args:
        grid: where given, the grid that the map must be on.

    Returns:
        (X, Y, Z) int32 as stored.

    Raises:
        InputError: as `check_header`; the map is on another grid; a value is negative or no integer.
    """
    path = Path(path)
    values, found, _ = _load(path)
    if grid is not None and (unlike := difference(grid, found)):
        raise InputError(
            f"{path}: not on the grid of the image ({unlike}); expected the image's own grid: "
            "resample the map onto it with nearest neighbour"
        )
    with np.errstate(invalid="ignore"):
        labels = np.rint(values)
        valid = (np.abs(values - labels) <= 1e-6) & (labels >= 0) & (labels <= np.iinfo(np.int32).max)
    if not valid.all():
        wrong = np.unique(values[~valid])
        listed = ", ".join(f"{v:g}" for v in wrong[:3]) + (", …" if wrong.size > 3 else "")
        raise InputError(
            f"{path}: voxels without a valid label: {np.count_nonzero(~valid)}, values {listed}; "
            "expected integers from 0: give a label map or a binary mask"
        )
    if (largest := labels.max(initial=0)) > MAX_LABEL:
        raise InputError(
            f"{path}: largest label {largest:.0f}; expected at most {MAX_LABEL}: number the lesions 1, 2, 3, …"
        )
    return labels.astype(np.int32)


def write(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray,
    like: nib.Nifti1Header | None = None,
    dtype: np.typing.DTypeLike | None = None,
    descrip: str = "xaiseg",
) -> None:
    """Write a volume as `.nii` or `.nii.gz`; the same arguments give the same bytes.

    The file takes its name only once complete. Of `like` it keeps what places voxels in space and the NIfTI version:
    not the display range, intent or extensions, which speak of other values. On the grid of `like`, sform and qform are
    kept bit for bit, codes of 0 included, so that a viewer without orientation falls back alike for both files. On
    another grid (a crop) each form is moved alike and keeps its code; where neither had one, both get code 2 (aligned).
    A qform that cannot express its affine (shear) gets code 0, and the sform its code if it has none.

    Args:
        array: (X, Y, Z) or (X, Y, Z, C).
        affine: (4, 4), voxel indices of `array` to mm.
        like: the header of the scan that the result belongs to.
        dtype: stored dtype; by default the array's own, but float32, int32 and uint8 for float64, int64 and bool.

    Raises:
        InputError: the folder or file cannot be written.
        ValueError: a value of `array` does not fit the stored dtype.
    """
    path = Path(path)
    compressed = is_compressed(path)
    stored = _as_stored(np.asarray(array), dtype)
    header = (type(like) if like is not None else nib.Nifti1Header)(endianness="<")
    header.set_data_dtype(stored.dtype)
    header.set_data_shape(stored.shape)
    header.set_slope_inter(1, 0)
    header.set_xyzt_units("mm")
    header["descrip"] = descrip.encode("ascii", "replace")[:79]
    place(header, like, Grid(stored.shape[:3], affine))
    header.set_data_offset(len(header.binaryblock) + 4)  # four zero bytes: no extensions
    payload = header.binaryblock + bytes(4) + stored.tobytes(order="F")

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if compressed:
                # Without a name and a time in it, a gzip file depends on its content alone.
                with gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as packed:
                    packed.write(payload)
            else:
                file.write(payload)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); expected a writable folder with room: "
            "choose another output"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _load(path: Path) -> tuple[np.ndarray, Grid, nib.Nifti1Header]:
    """Scaled values (X, Y, Z) in float64, with grid and header."""
    with opened(path) as stream:
        raw = bytearray(stream.read(SIZE))
        header = parse(path, bytes(raw))
        expected = announced(path, header)
        if is_compressed(path):
            for block in blocks(path, stream, len(raw), expected):  # to the end, where the checksum is
                raw += block
        else:
            raw += stream.read(max(expected - len(raw), 0))
    if len(raw) < expected:
        raise truncated(path, expected, len(raw))
    shape = header.get_data_shape()[:3]
    stored = np.ndarray(shape, header.get_data_dtype(), raw, header.get_data_offset(), order="F")
    slope, inter = header.get_slope_inter()
    with np.errstate(over="ignore", invalid="ignore"):
        values = stored.astype(np.float64)
        if slope is not None:
            values = values * slope + inter
    return values, grid_of(header), header


def _as_stored(array: np.ndarray, dtype: np.typing.DTypeLike | None) -> np.ndarray:
    narrow: dict[str, type] = {"bool": np.uint8, "int64": np.int32, "float64": np.float32}
    target = np.dtype(dtype if dtype is not None else narrow.get(array.dtype.name, array.dtype)).newbyteorder("<")
    with np.errstate(over="ignore", invalid="ignore"):
        stored = array.astype(target)
    same = np.array_equal(np.isfinite(stored), np.isfinite(array)) if target.kind == "f" else (stored == array).all()
    if not same:
        raise ValueError(f"values of the {array.dtype} array do not fit {target}")
    return stored
