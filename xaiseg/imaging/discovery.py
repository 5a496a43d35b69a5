"""From what the user names, a BIDS folder or a manifest, to cases."""

from collections.abc import Sequence
from pathlib import Path

from xaiseg.errors import InputError
from xaiseg.imaging.bids import bids_cohort, walk
from xaiseg.imaging.case import Case
from xaiseg.imaging.found import Cohort, Rejected
from xaiseg.imaging.manifest import manifest_cohort
from xaiseg.imaging.pybids_index import indexed

PYBIDS = "pybids"
_SHOWN = 10  # known labels or names that a message lists


def read_input(path: Path, channels: Sequence[str]) -> list[Case]:
    """The cases of a BIDS folder (`read_bids`) or of a manifest (`read_manifest`).

    Raises:
        InputError: `path` is neither, or what it holds cannot be used.
    """
    return read_cohort(path, channels).complete()


def read_cohort(path: Path, channels: Sequence[str], index: str | None = None) -> Cohort:
    """The usable cases of a BIDS folder or manifest, and the others with what is wrong with them.

    Only names and tables are read; whether the files themselves can be used, `case.problems` tells.

    Args:
        index: "pybids" finds the images of a BIDS folder with pybids; None walks through the folders of subjects and sessions.

    Raises:
        InputError: what concerns the whole: there is no such path, no header line, no UTF-8, a column missing, or no case,
            neither usable nor rejected; pybids is wanted but not installed, or for a manifest.
        ValueError: an unknown index.
    """
    path = Path(path)
    if index not in (None, PYBIDS):
        raise ValueError(f"index {index!r}: expected None or {PYBIDS!r}")
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected a BIDS folder or a manifest: check path and rights"
        ) from error
    if is_folder:
        return bids_cohort(path, channels, walk(path) if index is None else indexed(path, channels))
    if is_file:
        if index is not None:
            raise InputError(f"{path}: a file; expected a BIDS folder for the index {index!r}: leave the index out")
        return manifest_cohort(path, channels)
    raise InputError(f"{path}: no such folder or file; expected a BIDS folder or a manifest: check the path")


def select_cases(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The cases of those names, in the order of the names.

    Raises:
        InputError: a name is not among the cases.
    """
    by_name = {case.name: case for case in cases}
    if unknown := [name for name in names if name not in by_name]:
        raise InputError(f"case {_quoted(unknown)}: not in the input; expected among {_some(list(by_name))}")
    return [by_name[name] for name in dict.fromkeys(names)]


def select_participants(cohort: Cohort, participants: Sequence[str] = (), sessions: Sequence[str] = ()) -> Cohort:
    """What belongs to the participants and sessions of those BIDS labels, usable or rejected, in the order of the cohort.

    A rejected subject of which no session is known passes every choice of sessions, since it may have had them. A line of
    a table without a usable name is nobody's.

    Args:
        participants: labels, `01` or `sub-01`; none for all.
        sessions: labels, `1` or `ses-1`; none for all.

    Raises:
        InputError: a label is not in the cohort, or nothing has the labels together.
    """
    subjects = [label.removeprefix("sub-") for label in participants]
    visits = [label.removeprefix("ses-") for label in sessions]
    named = [Case(rejected.name, {}) for rejected in cohort.rejected]
    everything = [*cohort.cases, *named]
    _known("participant", subjects, [case.subject for case in everything])
    _known("session", visits, [case.session for case in everything if case.session])

    def wanted(case: Case, may_lack: bool) -> bool:
        visit = not visits or case.session in visits or (may_lack and case.session is None)
        return visit and (not subjects or case.subject in subjects)

    chosen = Cohort(
        [case for case in cohort.cases if wanted(case, may_lack=False)],
        [r for r, case in zip(cohort.rejected, named, strict=True) if wanted(case, may_lack=True)],
    )
    if not any(chosen) and any(cohort):
        available = sorted({case.session for case in everything if case.session and case.subject in subjects})
        raise InputError(
            f"session {_quoted(visits)}: not of participant {_quoted(subjects)}; expected among "
            f"{_some(available) or 'none, give no session'}"
        )
    return chosen


def _known(what: str, labels: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [label for label in labels if label not in known]:
        available = _some(list(dict.fromkeys(known))) or "none"
        raise InputError(f"{what} {_quoted(unknown)}: not in the input; expected among {available}")


def _quoted(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels))


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:_SHOWN]) + (", …" if len(labels) > _SHOWN else "")


__all__ = ["PYBIDS", "Cohort", "Rejected", "read_cohort", "read_input", "select_cases", "select_participants"]
