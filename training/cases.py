"""The cases of a run: which to train on, which to validate with. No patient is in both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from training.splits import k_folds, read_splits
from xaiseg.errors import InputError
from xaiseg.imaging import Case, preflight, read_input
from xaiseg.imaging.nifti import check_header, read_labels


@dataclass(frozen=True)
class Cases:
    """`folds`: of all cases, where they were split into such; `patients` and `loads` (mL) are then those of each."""

    training: list[Case]
    validation: list[Case]
    folds: Sequence[Sequence[str]] = ()
    patients: Mapping[str, str] | None = None
    loads: Mapping[str, float] | None = None


def read_cases(
    data: Sequence[Path],
    validation: Sequence[str],
    channels: Sequence[str],
    folds: int | None = None,
    splits: Path | None = None,
    fold: int = 0,
    seed: int = 0,
) -> Cases:
    """The cases of BIDS folders and manifests, split by the names of those to validate with, into folds, or as a file says.

    Where several inputs have a case of one name, both get their input's name in front: `open_ms_sub-01`.
    validation: names. folds, seed: see `splits.k_folds`. splits: see `splits.read_splits`. fold: the one to validate with.

    Raises InputError where a case has no reference, its files are not on one grid, a name is unknown or ambiguous, a patient is
    on both sides, nothing is left to train on, or the folds cannot be.
    """
    found = [(path, case) for path in map(Path, data) for case in read_input(path, channels)]
    names = [case.name for _, case in found]
    # Two inputs may use one label for two people, so a patient is told by input and label.
    patients: dict[str, str] = {}
    cases: dict[str, Case] = {}
    for path, case in found:
        if names.count(case.name) > 1:
            case = replace(case, name=f"{_stem(path)}_{case.name}")
        if case.name in cases:
            raise InputError(
                f"--data {path}: case {case.name!r} is there twice; expected each once: rename it in a manifest"
            )
        if case.reference is None:
            raise InputError(
                f"--data {path}: case {case.name!r} has no reference; expected a lesion mask for every case: "
                "add it, or list the cases that have one in a manifest"
            )
        cases[case.name] = case
        patients[case.name] = f"{_stem(path)}:{case.patient}" if len(data) > 1 else case.patient
    preflight(list(cases.values()), channels)
    if folds is None and splits is None:
        return Cases(*_sides(cases, patients, list(validation), "--validation"))
    if folds is not None:
        loads = {name: _load(case) for name, case in cases.items()}
        parts = k_folds(patients, loads, folds, seed)
        where = f"--folds {folds}"
    else:
        assert splits is not None
        parts, loads, where = read_splits(splits), None, f"--splits {splits}"
        if unlisted := sorted(set(cases) - {name for part in parts for name in part}):
            raise InputError(f"{where}: case {unlisted[0]!r} is in no fold; expected every case of --data: add it")
    if not 0 <= fold < len(parts):
        raise InputError(f"--fold {fold}: expected one of 0 to {len(parts) - 1}: correct it")
    training, held_out = _sides(cases, patients, list(parts[fold]), where)
    return Cases(training, held_out, parts, patients, loads)


def _sides(
    cases: Mapping[str, Case], patients: Mapping[str, str], validation: Sequence[str], where: str
) -> tuple[list[Case], list[Case]]:
    """The cases to train on and to validate with. `where`: the option that names the latter."""
    if unknown := [name for name in validation if name not in cases]:
        available = ", ".join(list(cases)[:10]) + (", …" if len(cases) > 10 else "")
        raise InputError(f"{where} {unknown[0]}: no such case; expected some of {available}: correct the name")
    training = [case for name, case in cases.items() if name not in validation]
    held_out = {patients[name]: name for name in validation}
    for case in training:
        if patients[case.name] in held_out:
            other = held_out[patients[case.name]]
            raise InputError(
                f"{where} {other}: the same patient's {case.name} would be trained on; expected patients on one side "
                f"only: add {case.name} to those held out"
            )
    if not training:
        raise InputError(f"{where}: names every case; expected some left to train on: name fewer")
    return training, [cases[name] for name in dict.fromkeys(validation)]


def _load(case: Case) -> float:
    """Lesion volume in mL."""
    assert case.reference is not None
    voxel = abs(np.linalg.det(check_header(case.reference).affine[:3, :3]))
    return float(np.count_nonzero(read_labels(case.reference)) * voxel / 1000)


def _stem(path: Path) -> str:
    return path.absolute().name.removesuffix(".tsv")
