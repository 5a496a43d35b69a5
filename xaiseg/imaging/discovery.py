"""From what the user names, a BIDS folder or a manifest, to cases."""

from collections.abc import Sequence
from pathlib import Path

from xaiseg.errors import InputError
from xaiseg.imaging.bids import read_bids
from xaiseg.imaging.case import Case
from xaiseg.imaging.manifest import read_manifest


def read_input(path: Path, channels: Sequence[str]) -> list[Case]:
    """The cases of a BIDS folder (`read_bids`) or of a manifest (`read_manifest`).

    Raises:
        InputError: `path` is neither, or what it holds cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        return read_bids(path, channels)
    if path.is_file():
        return read_manifest(path, channels)
    raise InputError(f"{path}: no such folder or file; expected a BIDS folder or a manifest: check the path")


def select_cases(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The cases of those names, in the order of the names.

    Raises:
        InputError: a name is not among the cases.
    """
    by_name = {case.name: case for case in cases}
    if unknown := [name for name in names if name not in by_name]:
        available = ", ".join(list(by_name)[:10]) + (", …" if len(by_name) > 10 else "")
        raise InputError(f"case {', '.join(map(repr, unknown))}: not in the input; expected among {available}")
    return [by_name[name] for name in dict.fromkeys(names)]
