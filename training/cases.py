"""The cases of a run: which to train on, which to validate with. No patient is in both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xaiseg.errors import InputError
from xaiseg.imaging import Case, preflight, read_input


@dataclass(frozen=True)
class Cases:
    training: list[Case]
    validation: list[Case]


def read_cases(data: Sequence[Path], validation: Sequence[str], channels: Sequence[str]) -> Cases:
    """The cases of BIDS folders and manifests, split by the names of those to validate with.

    Where several inputs have a case of one name, both get their input's name in front: `open_ms_sub-01`.

    Raises InputError where a case has no reference, its files are not on one grid, a name is unknown or ambiguous, a patient is
    on both sides, or nothing is left to train on.
    """
    found = [(path, case) for path in map(Path, data) for case in read_input(path, channels)]
    names = [case.name for _, case in found]
    # Two inputs may use one subject label for two people, so a patient is told by input and subject.
    patients: dict[str, tuple[Path, str]] = {}
    cases: dict[str, Case] = {}
    for path, case in found:
        if names.count(case.name) > 1:
            case = replace(case, name=f"{path.absolute().name.removesuffix('.tsv')}_{case.name}")
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
        patients[case.name] = path, case.subject
    if unknown := [name for name in validation if name not in cases]:
        available = ", ".join(list(cases)[:10]) + (", …" if len(cases) > 10 else "")
        raise InputError(f"--validation {unknown[0]}: no such case; expected some of {available}: correct the name")
    training = [case for name, case in cases.items() if name not in validation]
    held_out = {patients[name]: name for name in validation}
    for case in training:
        if patients[case.name] in held_out:
            other = held_out[patients[case.name]]
            raise InputError(
                f"--validation {other}: the same patient's {case.name} would be trained on; expected patients on one side "
                f"only: add {case.name} to --validation"
            )
    if not training:
        raise InputError("--validation: names every case; expected some left to train on: name fewer")
    preflight(list(cases.values()), channels)
    return Cases(training, [cases[name] for name in dict.fromkeys(validation)])
