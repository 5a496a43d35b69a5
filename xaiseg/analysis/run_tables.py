"""The tables and maps of a finished run, as the analyses take them."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xaiseg.cohort.folder import SETTINGS
from xaiseg.errors import InputError
from xaiseg.imaging import Case
from xaiseg.imaging.manifest import NONE

GROUPS = ("TP", "FP", "FN", "TN")
MEASURES = ("peak", "minimum", "mean_inside", "mean_ring", "positive_mass", "negative_mass")
_TEXTS = ("case", "subject", "session", "group")


@dataclass(frozen=True)
class MapKind:
    """What a method's maps are: its key in columns and file names, title, unit, and the names of the channels."""

    key: str
    title: str
    unit: str
    channels: tuple[str, ...]

    def column(self, channel: str, measure: str) -> str:
        """The column of the lesion table."""
        return f"{self.key}_{measure}" if channel == self.key else f"{self.key}_{channel}_{measure}"


@dataclass(frozen=True, eq=False)
class Run:
    """A run of `xaiseg explain`.

    lesions: the columns of `lesions.tsv`, `(n,)` each: texts, else float64 with NaN for n/a, and `patient`, as `cases` has it.
    cases: the rows of `cases.tsv`, with `patient`. identity: the model and settings that results depend on.
    """

    root: Path
    lesions: dict[str, np.ndarray]
    cases: list[dict[str, str]]
    methods: tuple[MapKind, ...]
    identity: dict[str, Any]

    def __len__(self) -> int:
        return len(self.lesions["lesion"])

    def chosen(self, where: np.ndarray, group: str | None = None) -> "Run":
        """Some of the lesions; all of a new `group`, where one is given."""
        lesions = {name: values[where] for name, values in self.lesions.items()}
        if group is not None:
            lesions["group"] = np.full(int(where.sum()), group)
        return replace(self, lesions=lesions)

    def file(self, lesion: int, name: str) -> Path:
        """The file `NAME` of the case of a lesion, by its place in `lesions`."""
        subject, session = (str(self.lesions[column][lesion]) for column in ("subject", "session"))
        entities = [f"sub-{subject}"] + ([f"ses-{session}"] if session != NONE else [])
        return self.root.joinpath(*entities, "anat", "_".join([*entities, name]))


def read_run(out: str | Path, patients: Mapping[str, str] | None = None) -> Run:
    """Read a finished run.

    patients: whose scan a case is, by case; where it is not said, as `cases.tsv` has it, or else the subject.

    Raises InputError where a file of the run is missing or no such table, where cases or lesions are left to do, or none is
    explained.
    """
    root = Path(out)
    identity = read_json(root / SETTINGS).get("identity", {})
    if identity.get("command") != "explain":
        raise InputError(
            f"{root / SETTINGS}: of a run of {identity.get('command', 'nothing')!r}, expected 'explain': "
            "give the output folder of `xaiseg explain`"
        )
    if not all(isinstance(identity.get(part), dict) and identity[part] for part in ("model", "methods")):
        raise InputError(f"{root / SETTINGS}: no model or methods in it, expected a run's settings: restore the file")
    cases, rows = (
        _table(root / "cases.tsv", ("case", "status")),
        _table(root / "lesions.tsv", (*_TEXTS, "lesion")),
    )
    if left := [row["case"] for row in cases if row["status"] == "left"]:
        raise InputError(
            f"{root / 'cases.tsv'}: {len(left)} of {len(cases)} cases are left to do ({', '.join(left[:3])}"
            f"{', …' if len(left) > 3 else ''}), expected a finished run: give the same `xaiseg explain` command again"
        )
    if not rows:
        raise InputError(f"{root / 'lesions.tsv'}: no lesion, expected some: explain scans with lesions")
    subjects = {row["case"]: row["subject"] for row in rows}
    whose = (
        {row["case"]: subjects.get(row["case"], Case(row["case"], {}).subject) for row in cases}
        | subjects
        | {row["case"]: row["patient"] for row in cases if row.get("patient", NONE) != NONE}
        | dict(patients or {})
    )
    lesions = {
        name: np.array([row[name] for row in rows]) if name in _TEXTS else _numbers(root, rows, name)
        for name in rows[0]
    }
    lesions["patient"] = np.array([whose[row["case"]] for row in rows])
    methods = tuple(_kind(root, key) for key in identity["methods"])
    return Run(root, lesions, [{**row, "patient": whose[row["case"]]} for row in cases], methods, identity)


def check_figures(run: Run) -> None:
    """Raises InputError unless the table of lesions has the figures of every map."""
    for method in run.methods:
        for name in (method.column(channel, measure) for channel in method.channels for measure in MEASURES):
            if name not in run.lesions:
                raise InputError(
                    f"{run.root / 'lesions.tsv'}: no column {name}, which {method.key} has: restore the table"
                )


def check_alike(main: Run, other: Run) -> None:
    """Raises InputError unless both runs explained one network by the same methods and settings."""
    for what, found, expected in (
        ("model", other.identity["model"].get("hash"), main.identity["model"].get("hash")),
        *((key, other.identity["methods"].get(key), settings) for key, settings in main.identity["methods"].items()),
        *((name, other.identity.get(name), main.identity.get(name)) for name in ("whole_volume", "precision")),
    ):
        if found != expected:
            raise InputError(
                f"{other.root}: {what} is {_short(found)}, expected {_short(expected)} as in {main.root}: "
                "explain both with the same model and settings"
            )


def pooled(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """The columns that the lesions of all runs have, with `run`, the place of the run among them."""
    names = [name for name in runs[0].lesions if all(name in run.lesions for run in runs)]
    columns = {name: np.concatenate([run.lesions[name] for run in runs]) for name in names}
    return columns | {"run": np.repeat(np.arange(len(runs)), [len(run) for run in runs])}


def present(groups: np.ndarray) -> list[str]:
    """The groups that occur, TP, FP, FN, TN first."""
    found = set(groups.tolist())
    return [group for group in GROUPS if group in found] + sorted(found - set(GROUPS))


def _kind(root: Path, key: str) -> MapKind:
    path = root / f"desc-{key}_saliency.json"
    sidecar = read_json(path)
    try:
        return MapKind(key, sidecar["Method"], sidecar["Units"], tuple(sidecar["Channels"]))
    except KeyError as error:
        raise InputError(f"{path}: has no entry {error}, expected what `xaiseg explain` writes: restore it") from None


def _numbers(root: Path, rows: Sequence[Mapping[str, str]], name: str) -> np.ndarray:
    try:
        return np.array([np.nan if row[name] == NONE else float(row[name]) for row in rows])
    except ValueError as error:
        raise InputError(
            f"{root / 'lesions.tsv'}: column {name}: {error}; expected numbers or {NONE}: restore the table"
        ) from None


def read_json(path: Path, expected: str = "the output folder of `xaiseg explain`: check the path") -> dict[str, Any]:
    """A JSON object. Raises InputError; `expected`: what, and what to do."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
        return content
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); expected {expected}") from error


def _table(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t")
            rows, names = list(reader), reader.fieldnames or ()
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: cannot be read ({reason}); expected a finished run: let `xaiseg explain` end first"
        ) from error
    if missing := [name for name in needed if name not in names]:
        raise InputError(f"{path}: no column {', '.join(missing)}; expected a table of this run: restore it")
    if any(None in row or None in row.values() for row in rows):
        raise InputError(f"{path}: a line has not as many cells as the header; expected a whole table: restore it")
    return rows


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
