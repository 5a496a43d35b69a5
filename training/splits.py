"""Which cases to train on and which to hold out: by patient, and with as much lesion on each side.

Two scans of one patient show the same lesions, so a patient with one on each side would be remembered, not segmented. A few
patients carry most of the lesion volume of a cohort, so folds that are drawn blindly differ more than the networks they compare.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from training.files import write_whole
from xaiseg.errors import InputError

_COLUMNS = ("case", "patient", "load", "fold")


def k_folds(patients: Mapping[str, str], loads: Mapping[str, float], folds: int, seed: int) -> list[list[str]]:
    """The cases of each fold, in order of name; every case in one fold, every patient in one fold.

    Patients are sorted by load, the mean over their cases. Each `folds` of them in a row are one stratum and are dealt to the
    folds in random order, one each. So the folds' numbers of patients differ by one at most, and each fold has its share of heavy
    and of light loads. Leave-one-patient-out is `folds` = number of patients. The order of the mappings plays no part.

    Args:
        patients: case to patient.
        loads: case to lesion load, in any unit, finite and not negative.
        folds: 2 or more, at most one per patient.
        seed: 0 or more.

    Raises:
        InputError: there are fewer patients than folds, or a case lacks a load that can be.

    Example:
        >>> k_folds({"a": "a", "b1": "b", "b2": "b"}, {"a": 5, "b1": 1, "b2": 2}, folds=2, seed=0)
        [['b1', 'b2'], ['a']]
    """
    ranked = _by_load(patients, loads)
    if folds < 2:
        raise InputError(f"folds: {folds}; expected 2 or more: give a larger number")
    if len(ranked) < folds:
        raise InputError(
            f"folds: {folds} of {len(ranked)} patients; expected a patient or more for each fold: ask for fewer folds"
        )
    rng = np.random.default_rng(seed)
    members: list[list[str]] = [[] for _ in range(folds)]
    for first in range(0, len(ranked), folds):
        stratum = ranked[first : first + folds]
        # The last stratum may be short: its patients go to as many different folds, drawn at random.
        for patient, fold in zip(stratum, rng.permutation(folds).tolist(), strict=False):
            members[fold].append(patient)
    return [_cases_of(fold, patients) for fold in members]


def holdout(
    patients: Mapping[str, str], loads: Mapping[str, float], fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """The cases to train on and those to hold out, each in order of name.

    Held out are `fraction` of the patients, rounded, at least one and not all: the patients sorted by load are cut into as many
    strata of nearly equal size, and one is drawn from each. Arguments otherwise as `k_folds`.

    Raises:
        InputError: there are fewer than two patients, the fraction is not between 0 and 1, or a case lacks a load that can be.
    """
    ranked = _by_load(patients, loads)
    if not 0 < fraction < 1:
        raise InputError(f"fraction: {fraction}; expected a number between 0 and 1: correct it")
    if len(ranked) < 2:
        raise InputError(f"cases: of {len(ranked)} patients; expected two or more to hold one out: add cases")
    count = min(max(round(fraction * len(ranked)), 1), len(ranked) - 1)
    rng = np.random.default_rng(seed)
    strata = np.array_split(np.arange(len(ranked)), count)
    held = {ranked[int(rng.choice(stratum))] for stratum in strata}
    return _cases_of(set(ranked) - held, patients), _cases_of(held, patients)


def write_splits(
    file: Path, folds: Sequence[Sequence[str]], patients: Mapping[str, str], loads: Mapping[str, float]
) -> None:
    """Write `splits.tsv`: a line per case with its patient, load and fold, numbered from 0, in order of fold and case.

    What `holdout` returns is written as two folds. A file of that name is replaced as a whole.

    Raises:
        InputError: a case or patient cannot stand in a table, or the file cannot be written.
    """
    lines = ["\t".join(_COLUMNS)]
    for number, fold in enumerate(folds):
        for case in sorted(fold):
            cells = (case, patients[case], repr(float(loads[case])), str(number))
            if unfit := [cell for cell in cells if cell != cell.strip() or not cell or set(cell) & set('\t\n\r"')]:
                raise InputError(
                    f"{file}: {unfit[0]!r} cannot stand in a table; expected names without tabs, quotes, line breaks and "
                    "spaces around them: rename it"
                )
            lines.append("\t".join(cells))
    try:
        write_whole(Path(file), "\n".join(lines) + "\n")
    except OSError as error:
        raise InputError(
            f"{file}: cannot be written ({error.strerror}); expected a writable folder: choose another"
        ) from error


def read_splits(file: Path) -> list[list[str]]:
    """The cases of each fold of a `splits.tsv`, in order of name.

    Raises:
        InputError: the file is not such a table, names a case twice, puts a patient into two folds, or leaves out a fold.
    """
    file = Path(file)
    members: dict[int, list[str]] = {}
    case_line: dict[str, int] = {}
    patient_line: dict[str, tuple[int, int]] = {}
    for number, row in _rows(file):
        case, patient, fold = row["case"], row["patient"], _fold(file, number, row["fold"])
        if not case or not patient:
            raise InputError(f"{file}, line {number}: an empty cell; expected a case and its patient: fill it in")
        _load(f"{file}, line {number}", row["load"])
        if case in case_line:
            raise InputError(
                f"{file}, line {number}: case {case!r} is already on line {case_line[case]}; expected each once: "
                "remove one line"
            )
        earlier, other = patient_line.setdefault(patient, (number, fold))
        if other != fold:
            raise InputError(
                f"{file}, line {number}: patient {patient!r} is in fold {fold} here and in fold {other} on line {earlier}; "
                "expected all scans of a patient in one fold: change one line"
            )
        case_line[case] = number
        members.setdefault(fold, []).append(case)
    if not members:
        raise InputError(f"{file}: lists no case; expected a line per case under the header: write it anew")
    if absent := [fold for fold in range(max(members)) if fold not in members]:
        raise InputError(
            f"{file}: no case in fold {absent[0]}, but in fold {max(members)}; expected folds numbered 0, 1, 2, …: renumber them"
        )
    return [sorted(members[fold]) for fold in range(len(members))]


def _by_load(patients: Mapping[str, str], loads: Mapping[str, float]) -> list[str]:
    """The patients, heaviest mean load first, ties by name."""
    per_patient: dict[str, list[float]] = {}
    for case in sorted(patients):  # sums of floats depend on their order
        if case not in loads:
            raise InputError(f"case {case}: no lesion load; expected one for every case: add it")
        per_patient.setdefault(patients[case], []).append(_load(f"case {case}", loads[case]))
    return sorted(per_patient, key=lambda patient: (-float(np.mean(per_patient[patient])), patient))


def _load(where: str, value: float | str) -> float:
    try:
        load = float(value)
    except ValueError:
        load = math.nan
    if not (math.isfinite(load) and load >= 0):
        raise InputError(f"{where}: lesion load {value!r}; expected a number of 0 or more: correct it")
    return load


def _fold(file: Path, number: int, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{file}, line {number}: fold {text!r}; expected a whole number from 0: correct it")
    return int(text)


def _cases_of(chosen: Iterable[str], patients: Mapping[str, str]) -> list[str]:
    wanted = set(chosen)
    return sorted(case for case, patient in patients.items() if patient in wanted)


def _rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """The lines under the header, with their numbers."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t", strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{file}: cannot be read ({reason}); expected a table of splits: check it") from error
    header = rows[0][1] if rows else []
    if sorted(header) != sorted(_COLUMNS):
        raise InputError(
            f"{file}: columns {', '.join(header) or 'none'}; expected {', '.join(_COLUMNS)}, separated by tabs: write it anew"
        )
    for number, cells in rows[1:]:
        if len(cells) != len(header):
            raise InputError(
                f"{file}, line {number}: {len(cells)} cells; expected {len(header)}, as in the header: check the tabs"
            )
    return [(number, dict(zip(header, cells, strict=True))) for number, cells in rows[1:]]
