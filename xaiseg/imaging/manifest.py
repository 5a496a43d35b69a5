"""Cases listed in a table: one line a case, one column a channel."""

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from xaiseg.errors import InputError
from xaiseg.imaging.case import Case
from xaiseg.imaging.found import Cohort, Rejected

NONE = "n/a"  # as in BIDS tables
_SAFE = re.compile(r"(?=.*[A-Za-z0-9])[A-Za-z0-9_][A-Za-z0-9_.-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class _Line(NamedTuple):
    """A line of the table: its number, its cells, and what is wrong with its quotes, if anything."""

    number: int
    cells: list[str]
    flaw: str = ""


def read_manifest(tsv: Path, channels: Sequence[str]) -> list[Case]:
    """Read a tab-separated table in UTF-8, with or without byte order mark.

    Columns: `case`; one per channel, named as the model names it; optionally `reference` (lesion mask) and `instances`
    (numbered lesions), where "n/a" stands for none, and `patient`, see `Case`. Other columns are passed over. Paths are relative to
    the table.

    Raises:
        InputError: the table cannot be read, lacks a column, has an empty cell or a ragged line, names a case twice or
            by a name unfit for files, or gives two cases one subject and session.
    """
    return manifest_cohort(tsv, channels).complete()


def manifest_cohort(tsv: Path, channels: Sequence[str]) -> Cohort:
    """Read a table as `read_manifest` does, but reject the lines that cannot be used and go on.

    Where lines share a name, or a subject and session, all of them are rejected: nobody knows which is meant. A line that
    cannot be used for another reason claims its name all the same.

    Returns:
        Cases in the order of the lines; rejected lines in the order in which their flaws show.

    Raises:
        InputError: the table cannot be read, lacks its header line or a column, or lists no case.
    """
    tsv = Path(tsv)
    header, *lines = _lines(tsv)
    columns = header.cells
    if missing := [column for column in ("case", *channels) if column not in columns]:
        hint = "save it tab-separated" if len(columns) == 1 else "add or rename columns"
        raise InputError(
            f"{tsv}: no column {', '.join(map(repr, missing))}, found {', '.join(map(repr, columns))}; "
            f"expected 'case' and one column per channel ({', '.join(channels)}): {hint}"
        )
    if len(set(columns)) < len(columns):
        raise InputError(f"{tsv}: a column appears twice in {columns}; expected each once: remove one")
    if not lines:
        raise InputError(f"{tsv}: lists no case; expected one line per case under the header: add lines")

    cases: dict[int, Case] = {}
    flaws: list[tuple[int, int, str]] = []  # the line at which it shows, the line that is rejected, the message
    claims: dict[tuple[str, str | None], list[tuple[int, str]]] = {}
    for line in lines:
        try:
            cases[line.number] = _case(tsv, line, columns, channels)
        except InputError as error:
            flaws.append((line.number, line.number, str(error)))
        if name := _name(line, columns):
            claims.setdefault(_key(name), []).append((line.number, name))

    for claimants in claims.values():
        (first, name), *others = claimants
        for number, other in others:
            flaws.append((number, number, _twice(tsv, number, other, "is already", first, name)))
        if others:
            flaws.append((others[0][0], first, _twice(tsv, first, name, "is again", *others[0])))

    names = {line.number: _name(line, columns) or f"line {line.number}" for line in lines}
    rejected: dict[int, Rejected] = {}
    # The sort is stable: of two flaws that show at one line, its own comes before the name that it shares.
    for _, number, message in sorted(flaws, key=lambda flaw: flaw[0]):
        cases.pop(number, None)
        rejected.setdefault(number, Rejected(names[number], message))
    return Cohort(list(cases.values()), list(rejected.values()))


def _lines(tsv: Path) -> list[_Line]:
    """The lines that are not blank; the first is the header."""
    try:
        with tsv.open(encoding="utf-8-sig", newline="") as file:
            text = file.readlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{tsv}: no UTF-8 text; expected a tab-separated table: save it as UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{tsv}: cannot be read ({error.strerror}); expected a table of cases, check it") from error
    lines = [line for line in _parsed(text) if line.flaw or any(line.cells)]
    if not lines:
        raise InputError(f"{tsv}: empty; expected a tab-separated table with a header line: fill it in")
    if lines[0].flaw:
        raise InputError(f"{tsv}: no table ({lines[0].flaw}); expected tab-separated text: check its quotes")
    return lines


def _parsed(text: list[str]) -> Iterator[_Line]:
    """One `_Line` a record. A quote that is not closed would swallow the lines below: reading begins anew under its line."""
    start = 0
    while start < len(text):
        reader = csv.reader(islice(text, start, None), delimiter="\t", strict=True)
        done = start
        try:
            for cells in reader:
                done = start + reader.line_num
                yield _Line(done, [cell.strip() for cell in cells])
            return
        except csv.Error as error:
            start = done + 1
            yield _Line(start, [], str(error).replace("\t", "tab"))


def _case(tsv: Path, line: _Line, columns: list[str], channels: Sequence[str]) -> Case:
    where = f"{tsv}, line {line.number}"
    if line.flaw:
        raise InputError(f"{where}: no table ({line.flaw}); expected tab-separated text: check its quotes")
    if len(line.cells) != len(columns):
        raise InputError(
            f"{where}: {len(line.cells)} cells under {len(columns)} columns; "
            "expected as many cells as columns: check the tabs"
        )
    row = dict(zip(columns, line.cells, strict=True))

    def path(column: str) -> Path:
        return tsv.parent / row[column]

    def optional(column: str) -> Path | None:
        return path(column) if row.get(column, NONE) != NONE else None

    for column in ("case", *channels, "reference", "instances", "patient"):
        if row.get(column) == "":
            remedy = f"write {NONE} where there is none" if column not in ("case", *channels) else "fill it in"
            raise InputError(f"{where}: empty cell in column {column!r}; expected a value: {remedy}")
    if not _SAFE.fullmatch(row["case"]):
        raise InputError(
            f"{where}: case name {row['case']!r} cannot name files; "
            "expected letters, digits, '_', '-' and '.', not first '-' or '.': rename the case"
        )
    for column in (*channels, "reference", "instances", "patient"):
        if _CONTROL.search(row.get(column, "")):
            raise InputError(
                f"{where}: a line break or other control character in column {column!r}, {row[column]!r}; "
                "expected one line of text: check the quotes"
            )
    images = {channel: path(channel) for channel in channels}
    patient = row.get("patient", NONE)
    return Case(row["case"], images, optional("reference"), optional("instances"), "" if patient == NONE else patient)


def _name(line: _Line, columns: list[str]) -> str | None:
    """What the line calls its case, where that is a usable name."""
    place = columns.index("case")
    found = line.cells[place] if place < len(line.cells) else ""
    return found if _SAFE.fullmatch(found) else None


def _key(name: str) -> tuple[str, str | None]:
    """Subject and session, in lower case, because some file systems do not tell the cases apart."""
    case = Case(name, {})
    return case.subject.lower(), case.session and case.session.lower()


def _twice(tsv: Path, number: int, name: str, how: str, other: int, other_name: str) -> str:
    same = "" if name == other_name else f", of the same subject and session as {other_name!r},"
    return (
        f"{tsv}, line {number}: case {name!r}{same} {how} on line {other}; "
        "expected each subject and session once: rename or remove one"
    )
