"""Synthetic lesions in scans of a finished run: from which contrast on, and in which sequence, its network finds them."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xaiseg.analysis.altered import passes_at_most
from xaiseg.analysis.crossing import mean_intervals
from xaiseg.analysis.experiment import write_experiment
from xaiseg.analysis.insertion import insert_lesion, insertion_rows, insertion_summary
from xaiseg.analysis.map_figures import MEASURES
from xaiseg.analysis.reopened import OpenScan, open_scans, predictor_of, reopen_model
from xaiseg.analysis.run_explainer import method_of
from xaiseg.analysis.run_tables import Run
from xaiseg.analysis.synthetic_plan import (
    ALL,
    Design,
    Planned,
    choose_cases,
    contrasts_of,
    directions,
    planned,
    signs_of,
)
from xaiseg.cohort.explaining import case_key
from xaiseg.cohort.methods import Method
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor
from xaiseg.models import Model
from xaiseg.report.canvas import number
from xaiseg.report.context import insertion_figure
from xaiseg.report.slices import SliceRow, axial_slice, slices_figure

_UNITS = {"spread": "SD of the tissue around it", "intensity": "normalised intensity"}
_SHOWN = 6  # lesions in the picture of slices
SUMMARY_COLUMNS = {
    "series": "The channels that have the lesion",
    "diameter_mm": "Of the lesions; all: of all of them together",
    "measure": "detection_rate, mean_probability and peaks of saliency at a contrast; detected_50, detected_90: the contrast from "
    "which on that share of the lesions is detected",
    "contrast": "Size of the contrast, in the unit of synthetic.json; n/a for measures that are contrasts",
    "estimate": "Of all lesions, each of equal weight; n/a: not reached",
    "low": "Lower end of its 95 % percentile interval over resampled patients",
    "high": "Upper end of that interval; inf: beyond the last contrast",
    "lesions": "Lesions",
    "patients": "Patients",
}


def synthetic(
    run: Run,
    model: Model,
    design: Design | None = None,
    *,
    cases: Sequence[str] = (),
    scans: int = 4,
    saliency: bool = True,
    method: str | None = None,
    samples: int | None = None,
    source: str | Path | None = None,
    seed: int = 0,
    resamples: int = 2000,
    chunk: int | None = None,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Run `insertion_rows` in scans of a run and write `synthetic*` in `OUT/analysis`; returns the rows of the summary.

    Lesions are put into the normalised image, which is not normalised again: one lesion hardly moves a scan's mean and spread.

    cases: names of scans, else as many `scans` are drawn, evenly over patients. saliency: explain each lesion at each contrast, by
    `run_explainer.method_of(run, model, method, samples)`. source: the run's input, where it was moved. seed: of what is drawn.
    chunk: see `altered_logits`. say: called with the plan and a summary.
    Raises InputError where the model is not the run's, a case or channel is unknown, a centre lies outside of a brain, no place is
    found in any scan, or a file cannot be read.
    """
    started = time.time()
    design = design or Design()
    model = reopen_model(run, model)
    predictor, channels = predictor_of(run, model), tuple(model.spec.channels)
    series = directions(design, channels)
    contrasts, taken = contrasts_of(design, series)
    explained = method_of(run, model, method, samples) if saliency else None
    notes: list[str] = []
    names = choose_cases(run, cases, scans, seed)
    plan: dict[str, list[Planned]] = {}
    passes = [0, 0]
    for opened in open_scans(run, [], source, names):
        if found := planned(run, opened, design, channels, seed, notes):
            plan[opened.case.name] = found
            for lesion in found:
                passes = [
                    a + b for a, b in zip(passes, _passes(predictor, opened, lesion, contrasts, explained), strict=True)
                ]
    if not plan:
        raise InputError(
            f"{run.root}: no ball of {max(design.diameters_mm):g} mm lies in the normal white matter of {', '.join(names[:3])}, "
            "expected a place for one: give smaller diameters, other scans, or centres"
        )
    say(_plan_line(plan, len(contrasts), passes, explained))
    rows: list[dict[str, Any]] = []
    pictures: list[SliceRow] = []
    lesions = 0
    with tqdm(total=sum(passes), desc="synthetic", unit="pass") as bar:
        for opened in open_scans(run, [], source, list(plan)):
            for lesion in plan[opened.case.name]:
                lesions += 1
                found_rows = insertion_rows(
                    predictor,
                    opened.scan.image,
                    opened.scan.grid.spacing,
                    lesion.shape,
                    contrasts,
                    channels,
                    threshold=model.spec.threshold,
                    unit=lesion.unit,
                    explain=explained.explain if explained else None,
                    key=case_key(seed, opened.case.name) if explained else None,
                    chunk=chunk,
                    progress=bar.update,
                )
                about = _about(run, opened, lesion, lesions)
                rows += [
                    {**about, "series": name, "contrast": float(level), **found_rows[n]}
                    for name, which in taken.items()
                    for level, n in zip(design.contrasts, which, strict=True)
                ]
                if lesion.diameter_mm == max(design.diameters_mm) and lesion.place <= max(_SHOWN // len(plan), 1):
                    pictures.append(_slices(opened, lesion, contrasts[taken[list(series)[-1]]]))
        computed = bar.n
    summary = summarise(rows, list(series), resamples=resamples, seed=seed)
    notes += _notes(run, rows, summary)
    unit = _UNITS[design.unit]
    written = write_experiment(
        run.root,
        "synthetic",
        {
            "synthetic": (columns(channels, unit, rows), rows),
            "synthetic_summary": (SUMMARY_COLUMNS, summary),
        },
        settings={
            **asdict(design),
            "signs": signs_of(design, channels),
            "series": list(series),
            "cases": list(plan),
            "threshold": model.spec.threshold,
            "method": {explained.key: explained.settings} if explained else None,
            "seed": seed,
            "resamples": resamples,
        },
        notes=notes,
        started=started,
        pictures={
            "synthetic.png": partial(_draw, rows, summary, list(series), unit, explained.unit if explained else ""),
            "synthetic_lesions.png": partial(_draw_slices, pictures[:_SHOWN], design, channels, list(series)[-1], unit),
        },
        more={"passes": computed},
    )
    for line in (*_lines(summary, unit), *(f"note: {note}" for note in notes)):
        say(line)
    say(f"written to {run.root / 'analysis'}: {', '.join(written)}")
    return summary


def summarise(
    rows: Sequence[Mapping[str, Any]], series: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of `SUMMARY_COLUMNS`: each series over all lesions and, where there are several, over those of each diameter."""
    diameters = sorted({row["diameter_mm"] for row in rows})
    found: list[dict[str, Any]] = []
    for name in series:
        for diameter in (ALL, *(diameters if len(diameters) > 1 else ())):
            own = [dict(row) for row in rows if row["series"] == name and diameter in (ALL, row["diameter_mm"])]
            part = insertion_summary(own, "contrast", resamples=resamples, seed=seed)
            part += _means(own, resamples, seed)
            found += [{"series": name, "diameter_mm": diameter, **row} for row in part]
    return found


def _means(rows: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Of probability and peaks at each contrast. rows: of one series, each lesion at each contrast, in one order."""
    levels = sorted({row["contrast"] for row in rows})
    patients = [str(row["patient"]) for row in rows if row["contrast"] == levels[0]]
    for measure in ("mean_probability", *peaks_of(rows)):
        values = np.array([[row[measure] for row in rows if row["contrast"] == level] for level in levels]).T
        intervals = mean_intervals(values, patients, resamples=resamples, seed=seed)
        for level, interval in zip(levels, intervals, strict=True):
            ends = dict(zip(("estimate", "low", "high"), map(float, interval[:3]), strict=True))
            counted = {"lesions": len(patients), "patients": len(set(patients))}
            yield {"measure": measure, "contrast": level, **ends, **counted}


def peaks_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of rows that are peaks of saliency."""
    return [name for name in rows[0] if name.startswith("saliency_") and name.endswith("_peak")]


def columns(channels: Sequence[str], unit: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns that the rows have, with their meanings."""
    meanings = {
        "case": "Scan",
        "patient": "Whose scan it is",
        "lesion": "Number of the synthetic lesion: one place and diameter in one scan",
        "place": "Number of the place in the scan",
        **{f"centre_{axis}_mm": "Centre of the lesion in world coordinates (R, A, S)" for axis in "xyz"},
        "diameter_mm": "Of the ball with the lesion's volume",
        "like": "Label of the real lesion of this scan that gave the shape; n/a: a ball",
        "series": "The channels that have the lesion",
        "contrast": f"Size of the contrast, in {unit}",
        **{f"contrast_{channel}": f"Contrast in {channel} with its sign, in {unit}" for channel in channels},
        **{
            f"added_{channel}": f"Added to {channel} well inside the lesion, in normalised intensity"
            for channel in channels
        },
        "voxels": "Voxels with at least half of the contrast, which are the lesion",
        "volume_mm3": "Weights of all voxels times their volume",
        "mean_probability": "Mean lesion probability over the lesion's voxels",
        "max_probability": "Largest lesion probability in them",
        "mean_logit": "Mean lesion logit over them",
        "detected": "1 where a voxel of the lesion passes the threshold, else 0",
    }
    return {name: meanings.get(name) or saliency_meaning(name, "saliency") for name in rows[0]}


def saliency_meaning(column: str, prefix: str) -> str:
    """Of a column of `map_figures`."""
    found = next(measure for measure in MEASURES if column.endswith(f"_{measure}"))
    return f"{MEASURES[found]}, of the lesion's saliency in {column[len(prefix) + 1 : -len(found) - 1]}"


def _passes(
    predictor: StitchedPredictor, opened: OpenScan, lesion: Planned, contrasts: np.ndarray, method: Method | None
) -> tuple[int, int]:
    """Passes through a window at most, of segmentation and of saliency."""
    shape, instance = opened.scan.image.shape, lesion.shape.instance()
    segmentation = passes_at_most(predictor, shape, instance.voxels, len(contrasts))
    if method is None:
        return segmentation, 0
    return segmentation, method.cost(predictor, shape, instance)[0] * method.samples * len(contrasts)


def _plan_line(plan: Mapping[str, Sequence[Planned]], images: int, passes: Sequence[int], method: Method | None) -> str:
    text = f"{sum(map(len, plan.values()))} lesions in {len(plan)} scans, {images} images each: {passes[0]} passes through a window"
    return text if method is None else f"{text}, and {passes[1]} for {method.title}"


def _about(run: Run, opened: OpenScan, lesion: Planned, n: int) -> dict[str, Any]:
    return {
        "case": opened.case.name,
        "patient": run.lesions["patient"][run.lesions["case"] == opened.case.name][0].item(),
        "lesion": n,
        "place": lesion.place,
        **dict(zip(("centre_x_mm", "centre_y_mm", "centre_z_mm"), lesion.centre_mm, strict=True)),
        "diameter_mm": lesion.diameter_mm,
        "like": lesion.like,
    }


def _slices(opened: OpenScan, lesion: Planned, contrasts: np.ndarray) -> SliceRow:
    image, affine = opened.scan.image, opened.scan.grid.affine
    slices = [
        axial_slice(insert_lesion(image, lesion.shape, contrast * lesion.unit), lesion.shape.voxels, affine)
        for contrast in contrasts
    ]
    return SliceRow(f"{opened.case.name} · place {lesion.place}", slices)


def _draw_slices(
    pictures: Sequence[SliceRow], design: Design, channels: Sequence[str], series: str, unit: str, path: Path
) -> None:
    size = f"{max(design.diameters_mm):g} mm, lesion in {series}"
    facts = f"{size} · columns: contrast in {unit}; 0 is the scan as it is, outlined where the lesion is put"
    heads = [f"{level:g}" for level in design.contrasts]
    slices_figure(pictures, heads, channels, path, title="Synthetic lesions", facts=facts)


def _draw(
    rows: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
    series: Sequence[str],
    unit: str,
    saliency_unit: str,
    path: Path,
) -> None:
    def of(name: str, diameter: Any) -> list[Mapping[str, Any]]:
        return [row for row in summary if row["series"] == name and row["diameter_mm"] == diameter]

    diameters = sorted({row["diameter_mm"] for row in rows})
    insertion_figure(
        {name: ([row for row in rows if row["series"] == name], of(name, ALL)) for name in series},
        "contrast",
        [peak.removeprefix("saliency_").removesuffix("_peak") for peak in peaks_of(rows)],
        path,
        unit=unit,
        saliency_unit=saliency_unit,
        sizes=(series[-1], {f"{d:g} mm": of(series[-1], d) for d in diameters}) if len(diameters) > 1 else None,
    )


def _notes(run: Run, rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len({row["patient"] for row in rows}) < 2:
        yield "all scans are of one patient: no interval"
    untouched = {row["lesion"]: row["detected"] for row in rows if row["contrast"] == 0}
    if before := sum(untouched.values()):
        yield f"{before} of {len(untouched)} places are detected without a lesion: the network takes them for one as they are"
    for row in summary:
        if row["measure"] == "detected_50" and row["diameter_mm"] == ALL and math.isnan(row["estimate"]):
            yield f"{row['series']}: half of the lesions are not reached at the contrasts given"
    if (precision := run.identity.get("precision", "float32")) != "float32":
        yield f"computed in float32; the run explained in {precision}"


def _lines(summary: Sequence[Mapping[str, Any]], unit: str) -> Iterator[str]:
    for row in summary:
        if row["diameter_mm"] == ALL and row["measure"] in ("detected_50", "detected_90"):
            place = "not reached"
            if not math.isnan(row["estimate"]):
                ends = "" if math.isnan(row["low"]) else f" ({number(row['low'], plus=False)} to "
                ends += f"{'beyond' if math.isinf(row['high']) else number(row['high'], plus=False)})" if ends else ""
                place = f"from {number(row['estimate'], plus=False)}{ends} {unit}"
            yield f"{row['series']}: {row['measure'][-2:]} % of {row['lesions']} lesions detected: {place}"
