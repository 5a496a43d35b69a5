"""Cases listed in a table: one line a case, one column a channel."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from xaiseg.errors import InputError
from xaiseg.imaging.case import Case

NONE = "n/a"  # as in BIDS tables
_SAFE = re.compile(r"(?=.*[A-Za-z0-9])[A-Za-z0-9_][A-Za-z0-9_.-]*")


def read_manifest(tsv: Path, channels: Sequence[str]) -> list[Case]:
    """Read a tab-separated table in UTF-8, with or without byte order mark.

    Columns: `case`; one per channel, named as the model names it; optionally `reference` (lesion mask) and `instances`
    (numbered lesions), where "n/a" stands for none, and `patient`, see `Case`. Other columns are passed over. Paths are relative to
    the table.

    Raises:
        InputError: the table cannot be read, lacks a column, has an empty cell or a ragged line, names a case twice or
            by a name unfit for files, or gives two cases one subject and session.
    """
    tsv = Path(tsv)
    header, *lines = _rows(tsv)
    if missing := [column for column in ("case", *channels) if column not in header[1]]:
        hint = "save it tab-separated" if len(header[1]) == 1 else "add or rename columns"
        raise InputError(
            f"{tsv}: no column {', '.join(map(repr, missing))}, found {', '.join(map(repr, header[1]))}; "
            f"expected 'case' and one column per channel ({', '.join(channels)}): {hint}"
        )
    if len(set(header[1])) < len(header[1]):
        raise InputError(f"{tsv}: a column appears twice in {header[1]}; expected each once: remove one")
    if not lines:
        raise InputError(f"{tsv}: lists no case; expected one line per case under the header: add lines")

    cases: list[Case] = []
    where: dict[tuple[str, str | None], tuple[int, str]] = {}
    for number, cells in lines:
        case = _case(tsv, number, header[1], cells, channels)
        # Lower case, because some file systems do not tell the cases apart.
        key = (case.subject.lower(), case.session and case.session.lower())
        if key in where:
            earlier, name = where[key]
            same = "" if name == case.name else f", of the same subject and session as {name!r},"
            raise InputError(
                f"{tsv}, line {number}: case {case.name!r}{same} is already on line {earlier}; "
                "expected each subject and session once: rename or remove one"
            )
        where[key] = number, case.name
        cases.append(case)
    return cases


def _rows(tsv: Path) -> list[tuple[int, list[str]]]:
    """The lines that are not blank, with their numbers; the first is the header."""
    try:
        with tsv.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t", strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except UnicodeDecodeError as error:
        raise InputError(f"{tsv}: no UTF-8 text; expected a tab-separated table: save it as UTF-8 text") from error
    except csv.Error as error:
        raise InputError(f"{tsv}: no table ({error}); expected tab-separated text: check its quotes") from error
    except OSError as error:
        raise InputError(f"{tsv}: cannot be read ({error.strerror}); expected a table of cases, check it") from error
    if not rows:
        raise InputError(f"{tsv}: empty; expected a tab-separated table with a header line: fill it in")
    for number, cells in rows:
        if len(cells) != len(rows[0][1]):
            raise InputError(
                f"{tsv}, line {number}: {len(cells)} cells under {len(rows[0][1])} columns; "
                "expected as many cells as columns: check the tabs"
            )
    return rows


def _case(tsv: Path, number: int, columns: list[str], cells: list[str], channels: Sequence[str]) -> Case:
    row = dict(zip(columns, cells, strict=True))

    def path(column: str) -> Path:
        return tsv.parent / row[column]

    def optional(column: str) -> Path | None:
        return path(column) if row.get(column, NONE) != NONE else None

    for column in ("case", *channels, "reference", "instances", "patient"):
        if row.get(column) == "":
            remedy = f"write {NONE} where there is none" if column not in ("case", *channels) else "fill it in"
            raise InputError(f"{tsv}, line {number}: empty cell in column {column!r}; expected a value: {remedy}")
    if not _SAFE.fullmatch(row["case"]):
        raise InputError(
            f"{tsv}, line {number}: case name {row['case']!r} cannot name files; "
            "expected letters, digits, '_', '-' and '.', not first '-' or '.': rename the case"
        )
    images = {channel: path(channel) for channel in channels}
    patient = row.get("patient", NONE)
    return Case(row["case"], images, optional("reference"), optional("instances"), "" if patient == NONE else patient)
