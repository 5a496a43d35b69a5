"""The dilation experiment on chosen lesions of a finished run: curves, the distances that summarise them, a picture."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xaiseg.analysis.context import (
    CONTEXT_COLUMNS,
    DISTANCES_MM,
    ContextCurve,
    context_curves,
    context_rows,
    context_summary,
)
from xaiseg.analysis.experiment import write_experiment
from xaiseg.analysis.reopened import Choice, choose, open_scans, predictor_of, reopen_model
from xaiseg.analysis.run_tables import Run
from xaiseg.models import Model
from xaiseg.report.context import context_figure

LESION_COLUMNS = {
    "case": "Scan",
    "patient": "Whose scan it is",
    "group": "TP, FP, FN against the reference; unlabelled without one",
    "volume_mm3": "Volume of the lesion",
    "lesion": "Label of the lesion in the scan",
}
SUMMARY_COLUMNS = {
    "measure": "detection_rate and mean_probability at a distance; detected_50_mm, detected_90_mm: the distance from which on that "
    "share of the lesions is detected; level_off_mm: from which on the mean probability is 95 % of that in the untouched image",
    "distance_mm": "The image is kept within this distance of the lesion; inf: all of it; n/a for measures that are distances",
    "estimate": "Of all lesions, each of equal weight; n/a: not reached",
    "low": "Lower end of its 95 % percentile interval over resampled patients",
    "high": "Upper end of that interval; inf: beyond the last distance",
    "lesions": "Lesions",
    "patients": "Patients",
}


def context(
    run: Run,
    model: Model,
    choice: Choice | None = None,
    *,
    distances_mm: Sequence[float] = DISTANCES_MM,
    background: float | Sequence[float] = 0.0,
    source: str | Path | None = None,
    resamples: int = 2000,
    chunk: int | None = None,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Run `context_curves` on lesions of a run and write `context*` in `OUT/analysis`; returns the rows of the summary.

    choice: of any size by default; where it names no group, the TP, as in the paper, or all where no group is known.
    distances_mm, background, chunk: see `context_curves`. source: the run's input, where it was moved. say: called with the lines
    of a summary.
    Raises InputError where the model is not the run's, no lesion is left by the choice, or a file cannot be read.
    """
    started = time.time()
    model = reopen_model(run, model)
    predictor = predictor_of(run, model)
    choice = choice or Choice()
    if not choice.groups and "TP" in run.lesions["group"]:
        choice = choice._replace(groups=("TP",))
    places = choose(run, choice)
    curves: list[ContextCurve] = []
    rows: list[dict[str, Any]] = []
    where: list[int] = []
    passes = 0
    with tqdm(total=len(places), desc="context", unit="lesion") as bar:
        for opened in open_scans(run, places, source):
            found = context_curves(
                predictor,
                opened.scan.image,
                opened.scan.grid.spacing,
                opened.instances,
                distances_mm=distances_mm,
                threshold=model.spec.threshold,
                background=background,
                chunk=chunk,
            )
            for place, curve in zip(opened.places, found, strict=True):
                about = {name: run.lesions[name][place].item() for name in ("case", "patient", "group", "volume_mm3")}
                rows += context_rows(curve, **about)
                curves.append(curve)
                where.append(place)
                passes += curve.passes
                bar.update()
    patients = run.lesions["patient"][where].tolist()
    summary = context_summary(curves, patients, resamples=resamples)
    notes = list(_notes(curves, patients))
    written = write_experiment(
        run.root,
        "context",
        {
            "context": (LESION_COLUMNS | CONTEXT_COLUMNS, rows),
            "context_summary": (SUMMARY_COLUMNS, summary),
        },
        settings={
            "lesions": choice._asdict() | {"volume_mm3": [v if math.isfinite(v) else None for v in choice.volume_mm3]},
            "distances_mm": list(distances_mm),
            "background": np.asarray(background).tolist(),
            "threshold": model.spec.threshold,
            "resamples": resamples,
        },
        notes=notes,
        started=started,
        pictures={"context.png": partial(context_figure, curves, summary)},
        more={"passes": passes},
    )
    say(f"lesions: {', '.join(choice.groups) or 'all'}")
    for line in (*_lines(summary), *(f"note: {note}" for note in notes)):
        say(line)
    say(f"{passes} passes through a window; written to {run.root / 'analysis'}: {', '.join(written)}")
    return summary


def _notes(curves: Sequence[ContextCurve], patients: Sequence[str]) -> list[str]:
    notes = []
    if len(set(patients)) < 2:
        notes.append("all lesions are of one patient: no interval")
    if whole := sum(not curve.detected[-1] for curve in curves):
        notes.append(f"{whole} of {len(curves)} lesions are not detected in the untouched image")
    if alone := sum(bool(curve.detected[0]) for curve in curves):
        notes.append(
            f"{alone} of {len(curves)} lesions are detected with nothing of their surroundings: what is left stands out from the "
            "background it is put on, which is the brain's mean where images are z-scored"
        )
    falling = sum(
        float(curve.mean_probability[:-1].max()) > float(curve.mean_probability[-1]) + 0.05 for curve in curves
    )
    if falling:
        notes.append(
            f"{falling} of {len(curves)} lesions have a higher probability with part of their surroundings than with all: their "
            "curves do not only rise"
        )
    return notes


def _lines(summary: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"{summary[0]['lesions']} lesions of {summary[0]['patients']} patients"]
    for row in summary:
        if row["distance_mm"] is not None:
            if row["distance_mm"] in (0.0, math.inf):
                kept = "the lesion alone" if row["distance_mm"] == 0 else "the untouched image"
                lines.append(
                    f"{row['measure']} of {kept}: {row['estimate']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
                )
        elif math.isnan(row["estimate"]):
            lines.append(f"{row['measure']}: not reached")
        else:
            lines.append(f"{row['measure']}: {row['estimate']:.3g} ({row['low']:.3g} to {row['high']:.3g})")
    return lines
