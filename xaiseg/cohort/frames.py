"""The tables of a run as pandas frames."""

from pathlib import Path
from typing import Any, NamedTuple

from xaiseg.cohort.tables import FAILURES, TIMINGS
from xaiseg.errors import InputError


class Tables(NamedTuple):
    """pandas frames; what the tables call n/a is missing. lesions is None after a segmentation alone."""

    lesions: Any
    cases: Any
    failures: Any
    timings: Any


def tables(out: str | Path) -> Tables:
    """Read the tables of the output folder of a run. Raises InputError where one is missing, or pandas is."""
    try:
        import pandas
    except ImportError as error:
        raise InputError("xaiseg.tables: needs pandas, which is missing: pip install 'xaiseg[tables]'") from error

    def read(name: str | Path) -> Any:
        path = Path(out) / name
        try:
            # labels such as 01 are names, and the only missing value is that of BIDS
            named = dict.fromkeys(("case", "subject", "session", "group"), "string")
            return pandas.read_csv(path, sep="\t", na_values=["n/a"], keep_default_na=False, dtype=named)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); expected the output folder of a run"
            ) from error

    lesions = Path(out) / "lesions.tsv"
    return Tables(read("lesions.tsv") if lesions.is_file() else None, read("cases.tsv"), read(FAILURES), read(TIMINGS))
