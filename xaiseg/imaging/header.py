"""NIfTI headers: which can be used, what they say, and how to place a result like the scan it came from."""

import logging
import math
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from xaiseg.errors import InputError
from xaiseg.imaging.grid import Grid, difference

SIZE = 540  # bytes; NIfTI-2, whose header is the longer one
MAX_AXIS = 32767  # voxels; NIfTI-1 has no room for more
MAX_VOXELS = 2**31  # 1290 along each axis; no scan of a head comes near it
_ALIGNED = 2  # NIFTI_XFORM_ALIGNED_ANAT, "aligned to another file's or to anatomical truth"
_PLACEMENT = [f"quatern_{a}" for a in "bcd"] + [f"qoffset_{a}" for a in "xyz"] + [f"srow_{a}" for a in "xyz"]
# nibabel would print every flaw that it repairs.
_silent = logging.Logger("xaiseg.imaging.header")
_silent.addHandler(logging.NullHandler())


def is_header(raw: bytes) -> bool:
    """Whether the bytes begin as a NIfTI header of either version and byte order does."""
    return {int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")} & {348, SIZE} != set()


@np.errstate(all="ignore")
def parse(path: Path, raw: bytes) -> nib.Nifti1Header:
    """The header at the start of `raw`, checked; nibabel's repairs of harmless flaws are kept."""
    sizes = {int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")}
    kind = nib.Nifti2Header if SIZE in sizes else nib.Nifti1Header
    if len(raw) < kind.sizeof_hdr:
        raise InputError(f"{path}: {len(raw)} bytes of data, too few for a NIfTI header; copy or download it again")
    try:
        header = kind(raw[: kind.sizeof_hdr], check=False)
        header.check_fix(logger=_silent, error_level=40)
        mirrored = _mirrored(header)
        _complete_slice(header)
        shape, dtype, affine = header.get_data_shape(), header.get_data_dtype(), header.get_best_affine()
        slope, inter, offset = float(header["scl_slope"]), float(header["scl_inter"]), header.get_data_offset()
    except (HeaderDataError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a readable NIfTI header ({reason}); expected NIfTI-1 or NIfTI-2 in one file: "
            "convert or download it again"
        ) from error

    def refuse(found: str, expected: str, remedy: str) -> InputError:
        return InputError(f"{path}: {found}; expected {expected}: {remedy}")

    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise refuse(
            f"{len(shape)}-D, shape {shape}", "one 3-D volume or 2-D slice", "extract one into a file of its own"
        )
    if min(shape) < 1:
        raise refuse(f"shape {shape}", "at least one voxel along each axis", "give another file")
    if max(shape) > MAX_AXIS or math.prod(map(int, shape)) > MAX_VOXELS:
        limit = f"at most {MAX_AXIS} voxels along an axis and {MAX_VOXELS} in all"
        raise refuse(f"header announces shape {shape}", limit, "copy or download it again")
    if dtype.kind not in "iuf":
        name = "RGB or other compound" if dtype.kind == "V" else dtype.name
        raise refuse(f"voxels are {name} values", "real numbers", "convert to a scalar image")
    if offset < kind.sizeof_hdr:
        raise refuse(f"voxels begin at byte {offset}", f"at least {kind.sizeof_hdr}", "convert it again")
    # nibabel takes a slope of 0 or NaN as no scaling, as the standard does for 0
    if math.isinf(slope) or (math.isfinite(slope) and slope != 0 and not math.isfinite(inter)):
        raise refuse(f"scaling has slope {slope:g} and intercept {inter:g}", "finite numbers", "correct the header")
    if not np.abs(affine).max() < 1e6:  # mm
        raise refuse(f"affine {affine[:3].tolist()}", "finite lengths below 1 km", "correct sform and qform")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (lengths.min() > 1e-6 and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6):
        raise refuse(f"affine {affine[:3].tolist()} is degenerate", "three independent axes", "correct sform and qform")
    if (unit := int(header["xyzt_units"]) & 7) in (1, 3):
        found = {1: "metres", 3: "micrometres"}[unit]
        raise refuse(f"header gives lengths in {found}", "millimetres", "convert affine and unit to millimetres")
    if mirrored:
        raise refuse(
            f"left and right are uncertain: {mirrored}, and one is the mirror image of the other",
            "two forms of one handedness",
            "find out from the scanner's data which is right and copy it over the other "
            "(fslorient -copyqform2sform or -copysform2qform, or set_sform and set_qform of nibabel)",
        )
    return header


def _mirrored(header: nib.Nifti1Header) -> str | None:
    """What sform and qform say, where both have a code and one is left-handed and the other right-handed.

    A slice whose sform leaves its third axis out has no handedness, nor has a qform that cannot be worked out: no more than
    the other form is known then.
    """
    if not (header["sform_code"] > 0 and header["qform_code"] > 0):
        return None
    try:
        sform, qform = header.get_sform(), header.get_qform()
    except (HeaderDataError, ValueError):
        return None
    if not np.sign(np.linalg.det(sform[:3, :3])) * np.sign(np.linalg.det(qform[:3, :3])) < 0:  # also for NaN
        return None
    ours, theirs = ("".join(axis or "?" for axis in nib.aff2axcodes(form)) for form in (sform, qform))
    return (
        f"the axes of its sform (code {header['sform_code']}) run {ours}, "
        f"those of its qform (code {header['qform_code']}) {theirs}"
    )


def _complete_slice(header: nib.Nifti1Header) -> None:
    """Make a 2-D slice a volume of one; where its sform has zeros for the third axis, give it one, since nothing depends on it.

    That axis is the normal that points to R, A or S, and pixdim[3] long, or 1 mm where that is no length.
    """
    shape = header.get_data_shape()
    if len(shape) == 2:
        shape = (*shape, 1)
        header.set_data_shape(shape)
    if len(shape) < 3 or shape[2] != 1:
        return
    if not np.isfinite(header["pixdim"][3]):
        header["pixdim"][3] = 1
    if header["sform_code"] <= 0:
        return
    rows = [header[f"srow_{axis}"] for axis in "xyz"]
    first, second, third = (np.array([row[n] for row in rows], np.float64) for n in range(3))
    normal = np.cross(first, second)
    length = np.linalg.norm(normal)
    if not third.any() and 0 < length < np.inf:
        normal /= length * np.sign(normal[np.abs(normal).argmax()])
        for row, value in zip(rows, normal, strict=True):
            row[2] = value * header["pixdim"][3]


def grid_of(header: nib.Nifti1Header) -> Grid:
    """The grid that a header describes: its sform where that has a code, else its qform, else nibabel's fallback."""
    return Grid(header.get_data_shape()[:3], header.get_best_affine())


def file_length(header: nib.Nifti1Header) -> int:
    """Bytes of the uncompressed file, at least."""
    return header.get_data_offset() + header.get_data_dtype().itemsize * math.prod(header.get_data_shape())


@np.errstate(all="ignore")
def place(header: nib.Nifti1Header, like: nib.Nifti1Header | None, grid: Grid) -> None:
    """Set sform, qform, their codes and pixdim."""
    if like is not None and difference(grid_of(like), grid) is None:
        for field in (*_PLACEMENT, "sform_code", "qform_code"):
            header[field] = like[field]
        header["pixdim"][:4] = like["pixdim"][:4]
        return
    scode, qcode = (int(like["sform_code"]), int(like["qform_code"])) if like is not None else (0, 0)
    if not scode and not qcode:
        scode = qcode = _ALIGNED
    qform = grid.affine
    try:
        if like is not None and like["sform_code"] > 0 and like["qform_code"] > 0:
            # The two forms may speak of different spaces, scanner and template: move each within its own.
            qform = like.get_qform() @ np.linalg.inv(like.get_best_affine()) @ grid.affine
        header.set_qform(qform, qcode)
        fits = difference(Grid(grid.shape, header.get_qform()), Grid(grid.shape, qform)) is None
    except (ValueError, HeaderDataError):  # the scan has no usable qform beside its good sform
        fits = False
    if not fits:
        header.set_qform(grid.affine, 0)  # for pixdim
        scode = scode or qcode
    header.set_sform(grid.affine, scode)
