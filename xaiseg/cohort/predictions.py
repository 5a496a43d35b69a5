"""Predictions beside their references: where they are, on which grid, and what their values are."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xaiseg.errors import InputError
from xaiseg.imaging import Case, Grid, check_header, difference, nifti, read_input, read_manifest, select_cases
from xaiseg.imaging.manifest import NONE

COLUMN = "prediction"
_ROUNDING = 1e-6  # by which a probability may lie beyond 1, as a sum of float32 numbers


@dataclass(frozen=True)
class Pair:
    """A case with its reference, its prediction (a mask or a probability map), and the grid of both."""

    case: Case
    reference: Path
    prediction: Path
    grid: Grid


def find_pairs(
    source: Path,
    channels: Sequence[str],
    predictions: Path | None = None,
    names: Sequence[str] = (),
    probabilities: bool = False,
    images: bool = False,
) -> list[Pair]:
    """The cases of a manifest or BIDS folder, each with its prediction; all headers are checked.

    Args:
        channels: by which a BIDS folder's cases are found. A manifest needs columns for them only with `images`.
        predictions: output of `xaiseg segment`, or other BIDS derivatives; else the manifest's column `prediction` is read.
        names: only these cases.
        probabilities: look for probability maps in `predictions`, not for masks.
        images: whether the images must lie on the reference's grid, too.

    Raises:
        InputError: a case has no reference or no prediction, a file cannot be used or lies on another grid, a name is unknown, or
            there is no case.
    """
    source = Path(source)
    wanted = channels if images or source.is_dir() else ()
    cases = read_input(source, wanted)
    cases = select_cases(cases, names) if names else cases
    if predictions is None:
        paths = _from_column(source, cases)
    else:
        recorded = _failures(Path(predictions))
        paths = {case.name: _in_folder(Path(predictions), case, probabilities, recorded) for case in cases}
    return [_pair(case, paths[case.name], wanted if images else ()) for case in cases]


def read_prediction(pair: Pair) -> np.ndarray:
    """A prediction as stored: `(X, Y, Z)` float32 from 0 to 1; a mask has 0 and 1 only.

    Raises InputError for a value that is neither 0 or 1 nor a probability, and where the file cannot be read.
    """
    values, _, _ = nifti.read(pair.prediction)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1 + _ROUNDING:
        raise InputError(
            f"{pair.prediction}: values from {low:g} to {high:g}; expected a mask of 0 and 1, or probabilities from 0 to 1: "
            "convert the file"
        )
    return np.minimum(values, np.float32(1))


def read_reference(pair: Pair) -> np.ndarray:
    """The reference mask as stored, `(X, Y, Z)` bool: whatever is not 0 in a mask or label map."""
    return nifti.read_labels(pair.reference, pair.grid) > 0


def read_brain(pair: Pair) -> np.ndarray:
    """The voxels where any image of the case is not zero, `(X, Y, Z)` bool."""
    brain = np.zeros(pair.grid.shape, bool)
    for path in pair.case.images.values():
        brain |= nifti.read(path)[0] != 0
    if not brain.any():
        raise InputError(f"{pair.case.name}: all images are 0 everywhere, so there is no brain: leave out --brain")
    return brain


def is_mask(values: np.ndarray) -> bool:
    """Whether a prediction holds lesions but no probability; an empty one may be either."""
    ones = int((values == 1).sum())
    return ones > 0 and ones + int((values == 0).sum()) == values.size


def _pair(case: Case, prediction: Path, channels: Sequence[str]) -> Pair:
    if case.reference is None:
        raise InputError(
            f"{case.name}: has no reference mask to compare with; expected one for every case: add it, or select others by --cases"
        )
    grid = check_header(case.reference)
    for path in (prediction, *(case.images[channel] for channel in channels)):
        if unlike := difference(grid, check_header(path)):
            raise InputError(
                f"{path}: not on the grid of the reference {case.reference} ({unlike}); expected one grid: "
                "resample it onto the reference, a mask with nearest neighbour"
            )
    return Pair(case, case.reference, prediction, grid)


def _from_column(source: Path, cases: Sequence[Case]) -> dict[str, Path]:
    hint = f"give --predictions DIR (the output of `xaiseg segment`), or a manifest with a column {COLUMN!r}"
    if source.is_dir():
        raise InputError(f"{source}: a BIDS folder without predictions; expected some to evaluate: {hint}")
    try:
        # Any column of files can be read as a channel.
        paths = {case.name: case.images[COLUMN] for case in read_manifest(source, [COLUMN])}
    except InputError as error:
        # All other columns have been read before.
        raise InputError(f"{source}: no usable column {COLUMN!r} ({error}); {hint}") from error
    for case in cases:
        if paths[case.name] == source.parent / NONE:
            raise InputError(
                f"{source}: case {case.name!r} has no prediction ({NONE}); expected one for every case: "
                "add it (an empty mask where nothing was found), or select others by --cases"
            )
    return paths


def _in_folder(folder: Path, case: Case, probabilities: bool, failures: dict[str, str]) -> Path:
    """The probability map or mask of a case in a folder of derivatives, by its BIDS name."""
    if not folder.is_dir():
        raise InputError(
            f"--predictions {folder}: no such folder; expected the output of `xaiseg segment`: check the path"
        )
    suffix = "probseg" if probabilities else "mask"
    entities = [f"sub-{case.subject}"] + ([f"ses-{case.session}"] if case.session else [])
    place, stem = folder.joinpath(*entities, "anat"), "_".join(entities)
    found = sorted(
        path
        for path in (place.iterdir() if place.is_dir() else ())
        if path.name.startswith(f"{stem}_")
        and "_label-L_" in path.name
        and path.name.endswith((f"_{suffix}.nii.gz", f"_{suffix}.nii"))
    )
    expected = place / f"{stem}_space-orig_label-L_{suffix}.nii.gz"
    if not found:
        why = f" (its segmentation failed: {failures[case.name]})" if case.name in failures else ""
        other = "" if not probabilities else "; tuning and --threshold need probability maps"
        raise InputError(
            f"{expected}: does not exist{why}; expected a prediction for every case{other}: segment the case, "
            "or select others by --cases"
        )
    if len(found) > 1:
        listed = ", ".join(path.name for path in found[:3])
        raise InputError(
            f"{place}: {len(found)} files for the prediction of {case.name} ({listed}); expected one: "
            f"name the file of each case in a manifest's column {COLUMN!r}"
        )
    return found[0]


def _failures(folder: Path) -> dict[str, str]:
    """What `xaiseg segment` recorded of cases that failed; nothing for another tool's folder."""
    try:
        rows = json.loads((folder / "logs" / "run.json").read_text(encoding="utf-8"))["cases"]
        return {row["case"]: row.get("message", "") for row in rows if row["status"] == "failed"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
