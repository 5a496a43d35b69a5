"""How an experiment on a finished run is written: its tables, pictures and the record of what it was, in `OUT/analysis`."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xaiseg.cohort.output import Files
from xaiseg.cohort.tables import versions

FOLDER = "analysis"


def write_experiment(
    out: str | Path,
    name: str,
    tables: Mapping[str, tuple[Mapping[str, str], Sequence[Mapping[str, Any]]]],
    *,
    settings: Mapping[str, Any],
    notes: Sequence[str],
    started: float,
    pictures: Mapping[str, Callable[[Path], Any]] | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    more: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write tables, pictures, and last `NAME.json` with settings, notes and what the columns are; returns the names of all.

    An earlier experiment of this name is replaced; files that it had and this one has not are removed.

    tables: by file stem, the meaning of each column, in order, and the rows, whose infinite numbers are written as inf.
    started: of `time.time()`.
    pictures: by file name, what draws it to a path. records: by file name, further JSON files.
    more: further entries of the record.
    """
    files = Files(Path(out) / FOLDER)
    record = files.root / f"{name}.json"
    record.unlink(missing_ok=True)  # files without it are of an experiment under way
    written = []
    for stem, (columns, rows) in tables.items():
        path = files.root / f"{stem}.tsv"
        if rows:
            written.append(path.name)
            files.table(path, list(columns), [_with_infinity(row) for row in rows])
        else:
            path.unlink(missing_ok=True)
    for file, draw in (pictures or {}).items():
        written.append(file)
        files.figure(files.root / file, draw)
    for file, record_of in (records or {}).items():
        written.append(file)
        files.json(files.root / file, record_of)
    content = {
        "settings": dict(settings),
        "notes": list(notes),
        **(more or {}),
        "columns": {f"{stem}.tsv": dict(columns) for stem, (columns, rows) in tables.items() if rows},
        "files": written,
        "seconds": round(time.time() - started, 1),
        "versions": versions(),
    }
    files.json(record, content)
    return [*written, record.name]


def _with_infinity(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with infinite numbers as texts: a table has n/a for those, which here is something else."""
    return {name: "inf" if isinstance(v, float) and v == math.inf else v for name, v in row.items()}
