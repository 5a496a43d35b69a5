"""Evaluate the predictions of a cohort: read, tune, measure, summarise, write."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xaiseg.cohort.output import OutputFolder
from xaiseg.cohort.predictions import Pair, find_pairs, is_mask, read_brain, read_prediction, read_reference
from xaiseg.cohort.tables import versions
from xaiseg.cohort.work import Print
from xaiseg.errors import InputError
from xaiseg.instances.matching import RULES
from xaiseg.metrics.evaluation import (
    MEASURES,
    SUMMARY,
    EvaluationSettings,
    describe_agreement,
    evaluate_case,
    field_of_view,
    summarise,
)
from xaiseg.metrics.lesions import LESION_ROW
from xaiseg.metrics.tuning import AIMS, TUNING, TuningGrid, choose, parse_tuning, tune_case
from xaiseg.report.evaluation import evaluation_figure

_THRESHOLD = 0.5  # on probabilities where nothing else is said
_CASE = {
    "case": "Case",
    "patient": "Whose scan it is: the manifest's column, else the subject; intervals resample patients",
    "subject": "BIDS subject label",
    "session": "BIDS session label",
}
_SAID = {
    "ndsc": "nDSC",
    "dice": "Dice",
    "lesion_tpr": "lesion TPR",
    "lesion_fdr": "lesion FDR",
    "lesion_fnr": "lesion FNR",
    "lesion_f1": "lesion F1",
    "hausdorff95_mm": "Hausdorff 95 %, mm",
    "absolute_volume_difference_ml": "|volume difference|, mL",
}


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    input: a BIDS folder or manifest with references. output: the folder to write.
    predictions: output of `xaiseg segment`; without it the manifest's column `prediction`.
    channels: by which a BIDS folder's cases are found, and whose non-zero voxels are the `brain`. cases: only these names.
    threshold: on probabilities. Without it, the masks that `segment` wrote, and 0.5 for a manifest's probability maps.
    brain: `V` of nDSC and specificity is the brain, not the whole array.
    tune: as `parse_tuning` reads it. tune_for: `ndsc`, `dice` or `f1`.
    bootstrap, seed: resamples, and the seed of their random numbers.
    """

    input: Path
    output: Path
    predictions: Path | None = None
    channels: tuple[str, ...] = ("FLAIR", "T1w")
    cases: tuple[str, ...] = ()
    threshold: float | None = None
    brain: bool = False
    tune: tuple[str, ...] = ()
    tune_for: str = "ndsc"
    bootstrap: int = 2000
    seed: int = 0
    overwrite: bool = False


def evaluate(
    request: EvaluationRequest, settings: EvaluationSettings | None = None, say: Print = print
) -> list[dict[str, Any]]:
    """Compare predictions with references; writes tables, description and picture, and returns the rows of `cases.tsv`.

    Raises InputError for input that cannot be used, before anything is computed where headers show it. No case is left out: a
    cohort without its failures would look better than it is. When something fails, the output folder is left as it was.
    """
    started = time.time()
    settings = settings or EvaluationSettings()
    _check(request, settings)
    grid = parse_tuning(request.tune)
    probabilities = bool(request.tune) or request.threshold is not None
    pairs = find_pairs(
        request.input, request.channels, request.predictions, request.cases, probabilities, images=request.brain
    )
    threshold = _THRESHOLD if request.threshold is None else request.threshold
    output = OutputFolder(request.output, request.overwrite)
    tuning: list[dict[str, Any]] = []
    try:
        if request.tune:
            grid = TuningGrid(grid.thresholds or (threshold,), grid.min_voxels or (settings.min_voxels,))
            tuning = choose(
                [_tune(pair, grid, settings, request.brain) for pair in _bar(pairs, "tuning")], grid, request.tune_for
            )
            (best,) = (row for row in tuning if row["chosen"])
            threshold, settings = best["threshold"], replace(settings, min_voxels=best["min_voxels"])
        rows, lesions, masks = [], [], 0
        for pair in _bar(pairs, "evaluating"):
            row, found, mask = _measure(pair, threshold, settings, request.brain)
            rows.append(row)
            lesions += found
            masks += mask
        summary = summarise(rows, [row["patient"] for row in rows], request.bootstrap, request.seed)
        output.begin(str(request.input.absolute()), ("*.tsv", "evaluation.*", "logs/"))
        description = _describe(request, settings, threshold, masks, pairs, tuning)
        _write(output, rows, lesions, summary, tuning, description)
        output.close({"command": sys.argv, "seconds": round(time.time() - started, 1), "settings": asdict(settings)})
    except BaseException:
        output.discard()
        raise
    for line in _lines(rows, summary, tuning, description):
        say(line)
    say(f"written to {request.output}: cases.tsv, summary.tsv, lesions.tsv, evaluation.json, evaluation.png")
    return rows


def _check(request: EvaluationRequest, settings: EvaluationSettings) -> None:
    rules = [
        ("--rule", settings.rule, settings.rule in RULES, f"one of {', '.join(RULES)}"),
        ("--connectivity", settings.connectivity, settings.connectivity in (6, 18, 26), "6, 18 or 26"),
        ("--iou", settings.iou, 0 < settings.iou <= 1, "a number above 0, up to 1"),
        ("--r", settings.r, 0 < settings.r < 1, "a number between 0 and 1"),
        ("--min-voxels", settings.min_voxels, settings.min_voxels >= 0, "an integer not below 0"),
        ("--bootstrap", request.bootstrap, request.bootstrap > 0, "a positive integer"),
        ("--tune-for", request.tune_for, request.tune_for in AIMS, f"one of {', '.join(AIMS)}"),
    ]
    for option, value, holds, expected in rules:
        if not holds:
            raise InputError(f"{option} {value}: expected {expected}: correct it")


def _tune(pair: Pair, grid: TuningGrid, settings: EvaluationSettings, brain: bool) -> np.ndarray:
    probability = read_prediction(pair)
    if is_mask(probability):
        raise InputError(
            f"{pair.prediction}: has only the values 0 and 1; expected probabilities, which --tune needs: "
            "give probability maps, or leave out --tune"
        )
    return tune_case(probability, read_reference(pair), grid, settings, read_brain(pair) if brain else None)


def _measure(
    pair: Pair, threshold: float, settings: EvaluationSettings, with_brain: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """The row of a case, the rows of its lesions, and whether its prediction is a mask."""
    values, reference = read_prediction(pair), read_reference(pair)
    brain = read_brain(pair) if with_brain else None
    # Strictly above, as `segment` does; a mask is the same at every threshold.
    predicted = values > threshold
    measures, lesions = evaluate_case(predicted, reference, pair.grid, settings, brain)
    case = pair.case
    who = {"case": case.name, "patient": case.patient, "subject": case.subject, "session": case.session}
    view = {"field_of_view": field_of_view(predicted, reference, brain)}
    return {**who, **measures, **view}, [{**who, **lesion} for lesion in lesions], not (values % 1).any()


def _describe(
    request: EvaluationRequest,
    settings: EvaluationSettings,
    threshold: float,
    masks: int,
    pairs: Sequence[Pair],
    tuning: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What `evaluation.json` tells: settings, files, versions, and the definition of every column."""
    view = (
        "voxels where any input image is not 0, and those of both masks" if request.brain else "all voxels of the array"
    )
    columns: dict[str, Mapping[str, str]] = {
        "cases.tsv": {**_CASE, **MEASURES, "field_of_view": f"V of nDSC and specificity: {view}"},
        "summary.tsv": SUMMARY,
        "lesions.tsv": {**_CASE, **LESION_ROW},
    }
    if tuning:
        columns["tuning.tsv"] = TUNING
    rule = {
        "overlap": "at least one voxel shared with the other mask",
        "iou": f"intersection over union with some lesion of the other mask of at least {settings.iou:g}",
    }
    return {
        "settings": {
            **asdict(settings),
            "rule_meaning": rule.get(settings.rule, settings.rule),
            "iou": settings.iou if settings.rule != "overlap" else None,
            "field_of_view": view,
            "threshold": None if masks == len(pairs) else threshold,
            "predictions": f"{masks} masks, {len(pairs) - masks} probability maps (lesion where above the threshold)",
            "bootstrap": request.bootstrap,
            "seed": request.seed,
            "resampled": "patients, each with all scans",
            "channels": list(request.channels) if request.brain else None,
        },
        "tuning": {"for": request.tune_for, "tried": list(request.tune), "note": _optimistic()} if tuning else None,
        "empty_masks": "n/a: not defined, for want of a denominator or a surface; left out of means",
        "columns": columns,
        "agreement": describe_agreement(),
        "files": {p.case.name: {"prediction": str(p.prediction), "reference": str(p.reference)} for p in pairs},
        "input": str(request.input.absolute()),
        "versions": versions(),
    }


def _write(
    output: OutputFolder,
    rows: Sequence[dict[str, Any]],
    lesions: Sequence[dict[str, Any]],
    summary: Sequence[dict[str, Any]],
    tuning: Sequence[dict[str, Any]],
    description: Mapping[str, Any],
) -> None:
    tables = {"cases.tsv": rows, "summary.tsv": summary, "lesions.tsv": lesions, "tuning.tsv": tuning}
    for name, columns in description["columns"].items():
        output.table(output.root / name, list(columns), tables[name])
    output.json(output.root / "evaluation.json", description)
    output.figure(output.root / "evaluation.png", lambda path: evaluation_figure(rows, lesions, summary, path))


def _lines(
    rows: Sequence[dict[str, Any]],
    summary: Sequence[dict[str, Any]],
    tuning: Sequence[dict[str, Any]],
    description: Mapping[str, Any],
) -> list[str]:
    """The summary for the reader of the terminal."""
    settings = description["settings"]
    patients = len({row["patient"] for row in rows})
    lines = [
        f"{_count(len(rows), 'scan')} of {_count(patients, 'patient')}; {settings['predictions']}",
        f"lesions: {settings['connectivity']}-connected, rule {settings['rule']}; V: {settings['field_of_view']}",
    ]
    if tuning:
        (best,) = (row for row in tuning if row["chosen"])
        lines.append(
            f"tuned for {description['tuning']['for']} over {len(tuning)} combinations: threshold {best['threshold']:g}, "
            f"min-voxels {best['min_voxels']}; {_optimistic()}"
        )
    lines.append(f"{'':26}{'mean':>9}{'median':>9}   {'95 % interval':<26}{'n':>4}")
    by_name = {(row["measure"], row["over"]): row for row in summary}
    for name, text in _SAID.items():
        row = by_name[name, "scans"]
        lines.append(
            f"{text:26}{_number(row['estimate']):>9}{_number(row['median']):>9}   {_span(row):<26}{row['n']:>4}"
        )
    for name, text in _SAID.items():
        if row := by_name.get((name, "lesions"), {}):
            lines.append(f"{'pooled ' + text:26}{_number(row['estimate']):>9}{'':>9}   {_span(row):<26}{row['n']:>4}")
    volume = {
        name: by_name[f"volume_{name}", "cohort"]["estimate"]
        for name in ("pearson", "bias", "lower_limit", "upper_limit")
    }
    lines.append(
        f"volume: correlation {_number(volume['pearson'])}, bias {_number(volume['bias'])} mL, 95 % limits "
        f"{_number(volume['lower_limit'])} to {_number(volume['upper_limit'])} mL"
    )
    return lines


def _bar(pairs: Sequence[Pair], what: str) -> tqdm:
    return tqdm(
        pairs, unit="scan", desc=what, file=sys.stderr, dynamic_ncols=True, disable=None
    )  # None: without terminal


def _optimistic() -> str:
    return "numbers on the cases that were tuned on are optimistic: use the chosen values on other cases"


def _span(row: Mapping[str, Any]) -> str:
    return f"{_number(row['low'])} to {_number(row['high'])}" if np.isfinite(row["low"]) else "n/a"


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "n/a"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"
