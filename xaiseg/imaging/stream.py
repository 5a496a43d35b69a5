"""The bytes of a NIfTI file, packed or not: whatever keeps them from being read becomes an `InputError`.

Nothing is trusted: pipes are not opened, and a stream is never unpacked much further than its header announces.
"""

import contextlib
import errno
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import nibabel as nib

from xaiseg.errors import InputError
from xaiseg.imaging.header import SIZE, file_length, is_header

_GZIP = b"\x1f\x8b"
_RATIO = 1032  # the most that deflate packs: 258 bytes into 2 bits
_BLOCK = 1 << 20  # bytes that are decompressed at a time
_ALLOWANCE = 1 << 20  # bytes after the voxels that are passed over


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed bytes of a file whose name ends in .nii or .nii.gz; errors within are told in one line."""
    with _explained(path), _open(path) as stream:
        yield stream


def is_compressed(path: Path) -> bool:
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: expected a name that ends in .nii or .nii.gz; convert or rename the file")
    return name.endswith(".gz")


def _open(path: Path) -> IO[bytes]:
    _require_file(path)
    compressed = is_compressed(path)
    with path.open("rb") as stream:
        start = stream.read(SIZE)
    if not start:
        raise InputError(f"{path}: empty, 0 bytes; expected a NIfTI file, copy or download it again")
    if compressed and not start.startswith(_GZIP):
        if not is_header(start):
            raise InputError(
                f"{path}: the content is not gzip and no NIfTI, it begins with {_shown(start)}; expected a NIfTI file, "
                "copy or download it again: a web page, a pointer or a text may have taken its place"
            )
        raise InputError(f"{path}: the content is not gzip, unlike the name; expected both alike: rename it to .nii")
    if not compressed and start.startswith(_GZIP):
        raise InputError(f"{path}: the content is gzip, unlike the name; expected both alike: rename it to .nii.gz")
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]


def _require_file(path: Path) -> None:
    """Refuse what is no regular file before it is opened: opening a pipe would wait for somebody who writes to it."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a null byte
        if path.is_symlink():
            raise InputError(
                f"{path}: a link to a file that is not there; expected a NIfTI file, fetch it or give its path"
            ) from error
        raise InputError(f"{path}: does not exist; expected a NIfTI file, check the path") from error
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise InputError(f"{path}: {found}; expected a NIfTI file, give a file")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the errors of the file system and of gzip into one line."""
    try:
        yield
    except PermissionError as error:
        raise InputError(
            f"{path}: no permission to read it; expected a readable file, change its rights or those of its folder"
        ) from error
    except EOFError as error:
        raise InputError(f"{path}: truncated, the gzip stream breaks off; copy or download it again") from error
    except gzip.BadGzipFile as error:
        # The first two bytes were gzip's, so that these are others.
        garbage = str(error).startswith("Not a gzipped file")
        found = "the gzip stream is followed by other bytes" if garbage else f"damaged ({error})"
        raise InputError(f"{path}: cannot be read, {found}; copy or download it again") from error
    except zlib.error as error:
        raise InputError(f"{path}: cannot be read, damaged ({error}); copy or download it again") from error
    except OSError as error:
        remedy = {errno.ELOOP: "a link that leads to itself: correct it", errno.ENAMETOOLONG: "check the path"}
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); expected a NIfTI file, "
            f"{remedy.get(error.errno or 0, 'copy or download it again')}"
        ) from error


def announced(path: Path, header: nib.Nifti1Header) -> int:
    """Bytes of the uncompressed file, at least; refused where the file is too small to hold them."""
    expected, size = file_length(header), path.stat().st_size
    if is_compressed(path):
        if expected > _RATIO * size:
            raise InputError(
                f"{path}: truncated or no scan, {size} bytes where its header announces {expected}, of which gzip packs "
                f"at most {_RATIO} into one; copy or download it again"
            )
    elif size < expected:
        raise truncated(path, expected, size)
    return expected


def last_length(path: Path) -> int:
    """What ends a gzip file: the length of its last member, modulo 2**32."""
    with path.open("rb") as stream:
        stream.seek(-4, os.SEEK_END)
        return int.from_bytes(stream.read(4), "little")


def blocks(path: Path, stream: IO[bytes], done: int, expected: int) -> Iterator[bytes]:
    """What follows the first `done` bytes of a stream, never much more than is expected: a few MB may unpack to many GB."""
    limit = expected + _ALLOWANCE
    while block := stream.read(min(_BLOCK, limit + 1 - done)):
        done += len(block)
        if done > limit:
            raise InputError(
                f"{path}: holds more data than its header announces, {expected} bytes; expected a single volume: "
                "copy or download it again, or correct the header"
            )
        yield block


def _shown(content: bytes) -> str:
    """The beginning of a file for a message: text as it is, other bytes by their codes."""
    return repr(content[:24].decode("ascii")) if content[:24].isascii() else repr(content[:8])


def truncated(path: Path, expected: int, found: int) -> InputError:
    return InputError(
        f"{path}: truncated, {found} bytes of data where its header announces {expected}; copy or download it again"
    )
