"""Lesions of a finished run filled with normal white matter, one at a time: what the network says without them."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import KDTree
from tqdm import tqdm

from xaiseg._types import Instance
from xaiseg.analysis.altered import passes_at_most
from xaiseg.analysis.counterfactual import MOMENTS, counterfactual_rows
from xaiseg.analysis.crossing import mean_intervals
from xaiseg.analysis.experiment import write_experiment
from xaiseg.analysis.map_figures import MEASURES
from xaiseg.analysis.normal_tissue import lesions_of, seed_of, white_matter_of
from xaiseg.analysis.reopened import Choice, OpenScan, choose, open_scans, predictor_of, reopen_model
from xaiseg.analysis.run_explainer import method_of
from xaiseg.analysis.run_tables import Run
from xaiseg.cohort.explaining import case_key
from xaiseg.cohort.methods import Method
from xaiseg.errors import InputError
from xaiseg.imaging.white_matter import channel_of
from xaiseg.inference import StitchedPredictor
from xaiseg.instances import instances_of
from xaiseg.instances.lesion_filling import FILLED_EDGE, fill, numbered
from xaiseg.models import Model
from xaiseg.report.canvas import count
from xaiseg.report.counterfactual import counterfactual_figure
from xaiseg.report.slices import SliceRow, axial_slice, slices_figure

NEIGHBOURS_MM = 20.0
_WIDE_MM = 5.0  # a rim that is filled with a lesion and wider than this is more than its halo
_SHOWN = 8  # lesions in the picture of slices
_MOMENT = {"before": "in the scan", "after": "with the lesion filled"}
SUMMARY_COLUMNS = {
    "role": "filled: the lesions that were filled; neighbour: others near them",
    "measure": "What is averaged",
    "estimate": "Its mean over lesions, each of equal weight",
    "low": "Lower end of its 95 % percentile interval over resampled patients",
    "high": "Upper end of that interval",
    "lesions": "Rows of counterfactual.tsv in which it is known: a neighbour counts once for each filled lesion near it",
    "patients": "Patients",
}


def counterfactual(
    run: Run,
    model: Model,
    choice: Choice | None = None,
    *,
    only: Sequence[tuple[str, int]] = (),
    neighbours_mm: float = NEIGHBOURS_MM,
    saliency: bool = True,
    method: str | None = None,
    samples: int | None = None,
    source: str | Path | None = None,
    resamples: int = 2000,
    chunk: int | None = None,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Fill lesions of a run one at a time, run `counterfactual_rows`, write `counterfactual*` in `OUT/analysis`; returns the rows.

    choice: which lesions, where it names no group the TP, or all where no group is known. only: case and label of each, instead.
    A lesion is filled as the run has it, with its halo (`lesion_filling.fill`); voxels of other lesions, explained, predicted or of
    the reference, stay as they are.

    neighbours_mm: other explained lesions whose nearest voxel is as near. The other arguments are those of `synthetic`.
    Raises InputError where the model is not the run's or has no FLAIR and T1w, no lesion is left by the choice, white matter cannot
    be told, or a file cannot be read.
    """
    started = time.time()
    model = reopen_model(run, model)
    predictor, channels = predictor_of(run, model), tuple(model.spec.channels)
    for needed in ("FLAIR", "T1w"):
        channel_of(channels, needed)
    explained = method_of(run, model, method, samples) if saliency else None
    choice = choice or Choice()
    if not choice.groups and "TP" in run.lesions["group"]:
        choice = choice._replace(groups=("TP",))
    places = [_place(run, *one) for one in dict.fromkeys(only)] if only else choose(run, choice)
    passes = [0, 0]
    for opened in open_scans(run, places, source):
        for instance in opened.instances:
            near = _near(run, opened, instance, neighbours_mm)
            passes = [
                a + b for a, b in zip(passes, _passes(predictor, opened, [instance, *near], explained), strict=True)
            ]
    say(_plan_line(len(places), passes, explained))
    rows: list[dict[str, Any]] = []
    pictures: list[SliceRow] = []
    reach_mm = 0.0
    with tqdm(total=sum(passes), desc="counterfactual", unit="pass") as bar:
        for opened in open_scans(run, places, source):
            image, name = opened.scan.image, opened.case.name
            lesions = lesions_of(run, opened)
            white, apart = white_matter_of(opened, lesions, channels), numbered(lesions)
            reach_mm = max(reach_mm, FILLED_EDGE * max(opened.scan.grid.spacing))
            for place, instance in zip(opened.places, opened.instances, strict=True):
                rng = np.random.default_rng(seed_of(choice.seed, name, instance.label))
                filled = fill(rng, image, opened.labels == instance.label, white, channels)
                others = _others(opened, instance, apart)
                filled[others] = image[others]
                found = counterfactual_rows(
                    predictor,
                    image,
                    filled,
                    opened.scan.grid.spacing,
                    instance,
                    _near(run, opened, instance, neighbours_mm),
                    channels,
                    threshold=model.spec.threshold,
                    explain=explained.explain if explained else None,
                    key=case_key(choice.seed, name) if explained else None,
                    chunk=chunk,
                    progress=bar.update,
                )
                about = {"case": name, "patient": run.lesions["patient"][place].item(), "filled": instance.label}
                rows += [about | _described(run, name, row) for row in found]
                if len(pictures) < _SHOWN:
                    pair = [axial_slice(one, instance.voxels, opened.scan.grid.affine) for one in (image, filled)]
                    pictures.append(SliceRow(f"{name} · lesion {instance.label}", pair))
        computed = bar.n
    summary = list(summarise(rows, resamples=resamples, seed=choice.seed))
    notes = list(_notes(run, rows, reach_mm))
    written = write_experiment(
        run.root,
        "counterfactual",
        {"counterfactual": (columns(rows), rows), "counterfactual_summary": (SUMMARY_COLUMNS, summary)},
        settings={
            "lesions": choice._asdict() | {"volume_mm3": [v if math.isfinite(v) else None for v in choice.volume_mm3]},
            "only": [list(one) for one in only],
            "neighbours_mm": neighbours_mm,
            "threshold": model.spec.threshold,
            "method": {explained.key: explained.settings} if explained else None,
            "resamples": resamples,
        },
        notes=notes,
        started=started,
        pictures={
            "counterfactual.png": partial(counterfactual_figure, rows),
            "counterfactual_lesions.png": partial(_draw_slices, pictures, channels),
        },
        more={"passes": computed},
    )
    for line in (*_lines(rows, summary), *(f"note: {note}" for note in notes)):
        say(line)
    say(f"written to {run.root / 'analysis'}: {', '.join(written)}")
    return rows


def summarise(rows: Sequence[Mapping[str, Any]], *, resamples: int = 2000, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of `SUMMARY_COLUMNS`: probability and detection before and after, their change, and the change of the saliency."""
    for role in ("filled", "neighbour"):
        own = [row for row in rows if row["role"] == role]
        measures: dict[str, list[float]] = {}
        for measure in ("mean_probability", "detected"):
            before, after = ([float(row[f"{moment}_{measure}"]) for row in own] for moment in MOMENTS)
            changes = [b - a for a, b in zip(before, after, strict=True)]
            measures |= {f"before_{measure}": before, f"after_{measure}": after, f"change_of_{measure}": changes}
        if own and "saliency_change" in own[0]:
            measures["saliency_change"] = [row["saliency_change"] for row in own]
        for measure, values in measures.items():
            known = [n for n, value in enumerate(values) if math.isfinite(value)]
            if not known:
                continue
            patients = [str(own[n]["patient"]) for n in known]
            found = mean_intervals(np.array([[values[n]] for n in known]), patients, resamples=resamples, seed=seed)
            ends = dict(zip(("estimate", "low", "high"), map(float, found[0][:3]), strict=True))
            yield {"role": role, "measure": measure, **ends, "lesions": len(known), "patients": len(set(patients))}


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns that the rows have, with their meanings."""
    meanings = {
        "case": "Scan",
        "patient": "Whose scan it is",
        "filled": "Label of the lesion that was filled",
        "lesion": "Label of the lesion that the row is about",
        "role": "filled, or a neighbour of the filled lesion",
        "group": "TP, FP, FN against the reference; unlabelled without one",
        "volume_mm3": "Volume of the lesion",
        "distance_mm": "Between the nearest voxels of the two lesions; 0 for the filled one",
        "changed_voxels": "Voxels of the scan that filling changed",
        "saliency_change": "Norm of the difference of the maps after and before, over the norm of the map before",
    }
    for moment, when in _MOMENT.items():
        meanings |= {
            f"{moment}_mean_probability": f"Mean lesion probability over the lesion's voxels {when}",
            f"{moment}_max_probability": f"Largest lesion probability in them {when}",
            f"{moment}_mean_logit": f"Mean lesion logit over them {when}",
            f"{moment}_detected": f"1 where one of them passes the threshold {when}, else 0",
        }
    for name in rows[0]:
        if name not in meanings:
            moment, _, rest = name.partition("_saliency_")
            measure = next(m for m in MEASURES if rest.endswith(f"_{m}"))
            of = rest.removesuffix(f"_{measure}")
            meanings[name] = f"{MEASURES[measure]}, of the lesion's saliency in {of} {_MOMENT[moment]}"
    return {name: meanings[name] for name in rows[0]}


def _place(run: Run, case: str, label: int) -> int:
    """Where in the table the lesion of this case and label is."""
    own = run.lesions["case"] == case
    found = np.flatnonzero(own & (run.lesions["lesion"] == label))
    if not len(found):
        labels = ", ".join(f"{n:g}" for n in run.lesions["lesion"][own][:10])
        known = f"its explained lesions there are {labels}" if own.any() else "it has no explained lesions of that scan"
        raise InputError(f"{run.root}: no lesion {label} of {case}, {known}: name one that is in lesions.tsv")
    return int(found[0])


def _near(run: Run, opened: OpenScan, instance: Instance, reach_mm: float) -> list[Instance]:
    """The other explained lesions with a voxel whose centre is within the distance of one of the instance's."""
    step = np.asarray(opened.scan.grid.spacing)
    reach = np.ceil(reach_mm / step).astype(int)
    low = np.maximum(instance.voxels.min(0) - reach, 0)
    box = tuple(slice(a, b) for a, b in zip(low, instance.voxels.max(0) + reach + 1, strict=True))
    explained = set(run.lesions["lesion"][run.lesions["case"] == opened.case.name].astype(int).tolist())
    others = sorted((set(np.unique(opened.labels[box]).tolist()) & explained) - {instance.label})
    tree = KDTree(instance.voxels * step)
    found = instances_of(opened.labels, others) if others else []
    return [other for other in found if tree.query(other.voxels * step)[0].min() <= reach_mm]


def _others(opened: OpenScan, instance: Instance, apart: np.ndarray) -> np.ndarray:
    """Voxels `(X, Y, Z)` of other lesions, which must stay as they are: other instances, and what is not joined to this one.

    apart: numbers of the connected lesions, by anyone's word.
    """
    joined = np.unique(apart[tuple(instance.voxels.T)])
    return ((opened.labels > 0) & (opened.labels != instance.label)) | ((apart > 0) & ~np.isin(apart, joined))


def _passes(
    predictor: StitchedPredictor, opened: OpenScan, lesions: Sequence[Instance], method: Method | None
) -> tuple[int, int]:
    """Passes through a window at most, of segmentation and of saliency."""
    shape = opened.scan.image.shape
    segmentation = passes_at_most(predictor, shape, np.concatenate([lesion.voxels for lesion in lesions]), 2)
    if method is None:
        return segmentation, 0
    return segmentation, 2 * method.samples * sum(method.cost(predictor, shape, lesion)[0] for lesion in lesions)


def _plan_line(lesions: int, passes: Sequence[int], method: Method | None) -> str:
    text = f"{lesions} lesions to fill: {passes[0]} passes through a window"
    return text if method is None else f"{text}, and {passes[1]} for {method.title}"


def _described(run: Run, case: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the lesion's group and volume behind its role."""
    place = _place(run, case, row["lesion"])
    about = {name: run.lesions[name][place].item() for name in ("group", "volume_mm3")}
    return {"lesion": row["lesion"], "role": row["role"], **about, **row}


def _draw_slices(pictures: Sequence[SliceRow], channels: Sequence[str], path: Path) -> None:
    facts = "each lesion alone filled with what the normal white matter around it suggests"
    slices_figure(pictures, MOMENTS, channels, path, title="Lesions filled", facts=facts)


def _notes(run: Run, rows: Sequence[Mapping[str, Any]], reach_mm: float) -> Iterator[str]:
    if len({row["patient"] for row in rows}) < 2:
        yield "all lesions are of one patient: no interval"
    filled = [row for row in rows if row["role"] == "filled"]
    if still := sum(row["after_detected"] for row in filled):
        yield (
            f"{still} of {len(filled)} filled lesions are still detected: their surroundings or a halo that was left are taken for "
            "one; see counterfactual_lesions.png"
        )
    if reach_mm > _WIDE_MM:
        yield (
            f"filling reaches {FILLED_EDGE} voxels beyond a lesion, up to {reach_mm:g} mm here: with voxels so large, neighbours "
            "see more changed than the lesion"
        )
    if all(row["role"] == "filled" for row in rows):
        yield "no filled lesion has a neighbour that near"
    if (precision := run.identity.get("precision", "float32")) != "float32":
        yield f"computed in float32; the run explained in {precision}"


def _lines(rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for role, name in (("filled", "filled lesion"), ("neighbour", "neighbour")):
        found = {row["measure"]: row["estimate"] for row in summary if row["role"] == role}
        if found:
            text = f"{count(sum(row['role'] == role for row in rows), name)}: mean probability "
            text += " to ".join(f"{found[f'{moment}_mean_probability']:.3g}" for moment in MOMENTS)
            text += ", detected " + " to ".join(f"{found[f'{moment}_detected']:.3g}" for moment in MOMENTS)
            yield text + (f", saliency changed by {found['saliency_change']:.3g}" if "saliency_change" in found else "")
