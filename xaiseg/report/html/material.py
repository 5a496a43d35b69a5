"""What a report draws on: the run, its analysis, and the experiments on it that are there."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xaiseg.analysis.analyse import TABLES, analyse
from xaiseg.analysis.experiment import FOLDER
from xaiseg.analysis.run_tables import MapKind, Run, check_figures, pooled, read_json, read_run
from xaiseg.cohort.tables import FAILURES, LOG
from xaiseg.errors import InputError
from xaiseg.imaging.manifest import NONE

EXPERIMENTS = ("context", "synthetic", "counterfactual", "sanity")
MODEL = "logistic"  # whose scores rank lesions by suspicion, where it is there
_TEXTS = frozenset(
    [
        "case",
        "patient",
        "group",
        "method",
        "channel",
        "measure",
        "group_a",
        "group_b",
        "channel_a",
        "channel_b",
        "quantity",
        "model",
        "explainer",
        "role",
        "series",
        "unit",
        "message",
        "status",
        "verdict",
        "name",
        "shape",
        "reference",
    ]
)
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Material:
    """lesions: columns as in `run_tables.Run`, of the main run and of those of its missed lesions and normal tissue. tables:
    rows by file stem, of `OUT/analysis`; none for what is not there. records: by name, `analysis` and the experiments. log:
    `logs/run.json`. sidecars: by method, how its maps were made. notes: about this report."""

    run: Run
    lesions: dict[str, np.ndarray]
    tables: dict[str, list[Row]]
    records: dict[str, dict[str, Any]]
    failures: list[Row]
    log: dict[str, Any]
    sidecars: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return self.run.root.resolve().name

    @property
    def methods(self) -> tuple[MapKind, ...]:
        return self.run.methods

    def rows(self, stem: str, **equal: Any) -> list[Row]:
        """Rows of a table whose columns have these values."""
        return [row for row in self.tables.get(stem, []) if all(row.get(name) == v for name, v in equal.items())]

    def signed(self, method: MapKind) -> bool:
        """Whether a method's maps may be negative: any of its minima is, or the record of none says that it cannot."""
        return any((self.lesions[method.column(c, "minimum")] < 0).any() for c in method.channels)

    def scores(self) -> tuple[str, dict[tuple[str, int], float]]:
        """The model whose scores are used and the score of each lesion by case and number, of `error_scores.tsv`; none without."""
        rows = self.tables.get("error_scores", [])
        models = list(dict.fromkeys(row["model"] for row in rows))
        if not models:
            return "", {}
        model = MODEL if MODEL in models else models[0]
        return model, {(row["case"], int(row["lesion"])): float(row["score"]) for row in rows if row["model"] == model}


def read_material(out: str | Path, say: Callable[[str], Any] = print) -> Material:
    """Read all that there is of a finished run; analyse it first where that was not done.

    Raises InputError as `read_run` and `analyse`, and for a table or record of the analysis that cannot be read.
    """
    run = read_run(out)
    check_figures(run)
    folder = run.root / FOLDER
    if not (folder / "analysis.json").is_file():
        say(f"{run.root}: is not analysed yet; doing so first, as `xaiseg analyse` would")
        analyse(out, say=lambda line: None)
    records: dict[str, dict[str, Any]] = {
        name: _json(folder / f"{name}.json")
        for name in ("analysis", *EXPERIMENTS)
        if (folder / f"{name}.json").is_file()
    }
    stems = {
        Path(file).stem for record in records.values() for file in record.get("files", ()) if str(file).endswith(".tsv")
    }
    tables = {stem: read_table(folder / f"{stem}.tsv") for stem in sorted(stems)}
    for stem, rows in tables.items():
        if missing := [name for name in TABLES.get(stem, ()) if rows and name not in rows[0]]:
            raise InputError(f"{folder / stem}.tsv: no column {missing[0]}; give `xaiseg analyse {run.root}` again")
    notes: list[str] = []
    runs = [run, *_others(run, records["analysis"], notes)]
    for record in records.values():  # a report is shown to others: folders by their names alone
        record["notes"] = [_without_folders(line, run, records["analysis"]) for line in record.get("notes", ())]
    lesions = pooled(runs)
    of_run = {row["group"]: row for row in tables.get("groups", []) if row["measure"] == "peak"}
    counted = sum(int(row["n"] + row["undefined"]) for group, row in of_run.items() if group not in ("FN", "TN"))
    expected = int((~np.isin(run.lesions["group"], ("FN", "TN"))).sum())
    if counted != expected:
        notes.append(
            f"the analysis is of {counted} lesions and the run now has {expected}: give `xaiseg analyse {run.root}` again"
        )
    failures = read_table(run.root / FAILURES) if (run.root / FAILURES).is_file() else []
    log = _json(run.root / LOG) if (run.root / LOG).is_file() else {}
    sidecars = {method.key: _json(run.root / f"desc-{method.key}_saliency.json") for method in run.methods}
    return Material(run, lesions, tables, records, failures, log, sidecars, notes)


def read_table(path: Path) -> list[Row]:
    """The rows of a TSV: numbers as float (NaN for n/a), texts as they are. Raises InputError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {name: typed(name, value) for name, value in row.items()}
                for row in csv.DictReader(file, delimiter="\t")
            ]
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); expected a table: give its command again") from error


def typed(name: str | None, value: Any) -> Any:
    if name is None or value is None or isinstance(value, list):
        raise ValueError("a line has not as many cells as the header")
    if name in _TEXTS:
        return value
    if value == NONE:
        return float("nan")
    try:
        return float(value)
    except ValueError:
        return value


def _others(run: Run, record: Mapping[str, Any], notes: list[str]) -> list[Run]:
    """The runs of missed lesions and of normal tissue that the analysis had; a note where one is gone."""
    found = []
    for name, group in (("missed", "FN"), ("normal", "TN")):
        path = record.get("runs", {}).get(name)
        if not path:
            continue
        try:
            other = read_run(path)
        except InputError as error:
            notes.append(f"{group} are in the tables, not as points in the figures: {error}")
            continue
        groups = other.lesions["group"]
        found.append(other.chosen(groups == "FN" if name == "missed" else groups != "TP", group))
    return found


def _without_folders(line: str, run: Run, record: Mapping[str, Any]) -> str:
    for path in filter(None, (str(run.root), *record.get("runs", {}).values())):
        line = line.replace(path, Path(path).name or path)
    return line


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "JSON: give its command again")
