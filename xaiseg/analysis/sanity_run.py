"""Explainers compared on lesions of a finished run: the tables of `sanity`, a picture, and what they say in a few lines."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from xaiseg._types import Explainer
from xaiseg.analysis.control_explainers import CONTROLS
from xaiseg.analysis.experiment import FOLDER, write_experiment
from xaiseg.analysis.named_explainers import Named, default_names, named_explainers
from xaiseg.analysis.reopened import Choice, OpenScan, choose, open_scans, predictor_of, reopen_model
from xaiseg.analysis.run_tables import Run
from xaiseg.analysis.sanity import FEWEST, MEASURES, Sanity, SanityCase, SanitySettings, better, sanity
from xaiseg.analysis.sanity_plan import plan_lines, work_of
from xaiseg.errors import InputError
from xaiseg.instances import instances_of
from xaiseg.metrics.randomisation import network_layers
from xaiseg.models import Model
from xaiseg.report.canvas import count as count_of
from xaiseg.report.sanity import sanity_figure

# The run's own maps are averages over noise already, so that the plain cascade is the smooth one.
USUAL = tuple(name for name in MEASURES if name != "smooth_randomisation")
STEPS = 5
LESIONS = 6

ROW_COLUMNS = {
    "case": "Scan",
    "patient": "Whose scan it is",
    "lesion": "Label of the lesion in the scan",
    "group": "TP, FP, FN against the reference; unlabelled without one",
    "volume_mm3": "Volume of the lesion",
    "voxels": "Voxels of the lesion in the image that the network takes",
    "explainer": "What is judged; random and edges are controls that know nothing",
    "measure": "deletion, insertion: area under S/S(x), …_drop: under S(x) - S in logits; infidelity_logits2: infidelity in "
    "squared logits; …_times_difference: of the map times image minus baseline; see measures in sanity.json",
    "value": "n/a where the measure is not defined: an area where S(x) is not positive, a map that is zero or not finite, no other "
    "lesion in the scan",
    "control": "Of areas: the mean of random orders",
    "control_sd": "Standard deviation over random orders",
    "gain": "By how much the area is better than the control",
}
SUMMARY_COLUMNS = {
    "explainer": ROW_COLUMNS["explainer"],
    "measure": "As in sanity.tsv",
    "lesions": "Lesions where the measure is defined",
    "patients": "Their patients",
    "mean": "Over lesions, each of equal weight",
    "mean_low": "Lower end of its 95 % percentile interval over resampled patients; n/a for one patient",
    "mean_high": "Upper end of that interval",
    "median": "Over lesions",
    "smallest": "Of lesions",
    "largest": "Of lesions",
    "gain": "Mean gain of areas over random orders",
    "gain_low": "Lower end of its interval",
    "gain_high": "Upper end of that interval",
    "limit": "Where passing begins: gain 0 for areas, 1 - 1/samples for infidelity (what a map that knows nothing leaves), 0 for "
    "faithfulness correlation, 1/2 for signed ρ, midway between chance and a map that does not change; n/a: no such place",
    "verdict": "passes, fails: the whole interval lies on one side of the limit; unclear: the limit lies in it; n/a: no limit, or "
    f"fewer than {FEWEST} patients",
}


def compare_explainers(
    run: Run,
    model: Model,
    choice: Choice | None = None,
    explainers: Sequence[str] = (),
    settings: SanitySettings | None = None,
    *,
    own: Mapping[str, Explainer] | None = None,
    source: str | Path | None = None,
    say: Callable[[str], Any] = print,
) -> Sanity:
    """Run `sanity` on lesions of a run and write `sanity*` in `OUT/analysis`; returns what it found.

    choice: `LESIONS` of any group and size by default. explainers: see `named_explainers`; by default, where there is none of your
    own either, `default_names`. settings: by default the measures `USUAL`, cascades of `STEPS` steps. own: explainers by name,
    beside the named ones. source: the run's input, where it was moved. say: called with the plan and the lines of a summary.

    Raises InputError where the model is not the run's, no lesion is left by the choice, an explainer is unknown or gives what the
    measures cannot take, or a file cannot be read.
    """
    started = time.time()
    model = reopen_model(run, model)
    predictor = predictor_of(run, model)
    settings = settings or SanitySettings(measures=USUAL, steps=STEPS)
    choice = choice or Choice(number=LESIONS)
    named = named_explainers(run, model, explainers or (() if own else default_names(run)))
    named += [Named(name, explain) for name, explain in (own or {}).items()]
    places = choose(run, choice)

    def cases() -> Iterator[SanityCase]:
        return (_case(run, opened) for opened in open_scans(run, places, source))

    first, scans, work = None, 0, None
    layers = len(network_layers(model.spec))
    for case in cases():
        first, scans = first or case, scans + 1
        more = work_of(predictor, case, named, settings, layers)
        work = more if work is None else work.with_more(more)
    assert first is not None
    assert work is not None
    say(f"plan: {count_of(len(places), 'lesion')} of {count_of(scans, 'scan')}, {count_of(len(named), 'explainer')}")
    try:
        for line in plan_lines(predictor, first, named, settings, work):
            say(line)
        with tqdm(total=scans * len(settings.measures), desc="sanity", unit="measure") as bar:
            found = sanity(
                jax.random.key(choice.seed),
                model,
                cases(),
                {explainer.name: explainer.explain for explainer in named},
                settings,
                predictor_of=partial(predictor_of, run),
                progress=lambda *_: bar.update(),
            )
    except ValueError as error:  # of an explainer that cannot be used on this network, or of settings
        raise InputError(f"{run.root}: {error}") from error
    known = {(str(run.lesions["case"][p]), int(run.lesions["lesion"][p])): p for p in places}
    about = {key: {name: run.lesions[name][p].item() for name in ("group", "volume_mm3")} for key, p in known.items()}
    notes = list(_notes(run, found, named))
    written = write_experiment(
        run.root,
        "sanity",
        {
            "sanity": (ROW_COLUMNS, [row | about[row["case"], row["lesion"]] for row in found.rows]),
            "sanity_summary": (SUMMARY_COLUMNS, found.summary),
        },
        settings={
            "lesions": choice._asdict() | {"volume_mm3": [v if math.isfinite(v) else None for v in choice.volume_mm3]},
            **_plain(settings),
        },
        notes=notes,
        started=started,
        pictures={"sanity.png": partial(sanity_figure, found.rows, found.summary, controls=tuple(CONTROLS))},
        records={"sanity_curves.json": {"curves": found.curves}},
        more={
            "explainers": {explainer.name: explainer.settings for explainer in named},
            "measures": {name: MEASURES[name] for name in settings.measures},
            "passes": {"forward": work.forward, "back": work.back},
        },
    )
    for line in (*table_lines(found.summary), *(f"note: {note}" for note in notes)):
        say(line)
    say(f"written to {run.root / FOLDER}: {', '.join(written)}")
    return found


def _case(run: Run, opened: OpenScan) -> SanityCase:
    """The chosen lesions of a scan, and beside them the other explained ones."""
    own = {instance.label for instance in opened.instances}
    in_scan = run.lesions["lesion"][run.lesions["case"] == opened.case.name].astype(int).tolist()
    there = set(np.unique(opened.labels).tolist())
    others = instances_of(opened.labels, [number for number in in_scan if number in there - own])
    patient = str(run.lesions["patient"][opened.places[0]])
    return SanityCase(
        opened.case.name, opened.scan.image, opened.instances, opened.scan.grid.spacing, patient, tuple(others)
    )


def _plain(settings: SanitySettings) -> dict[str, Any]:
    """Settings as JSON takes them: replacements by their names, a baseline that is the default by its own."""
    found = {f.name: getattr(settings, f.name) for f in fields(settings)}
    baseline = found.pop("baseline")
    return found | {
        "replacements": list(settings.replacements),
        "baseline": getattr(baseline, "__name__", str(baseline)).replace("zeros_like", "zero"),
    }


def _notes(run: Run, found: Sanity, named: Sequence[Named]) -> Iterator[str]:
    patients = len({row["patient"] for row in found.rows})
    if patients < 2:
        yield "all lesions are of one patient: no interval, and no verdict"
    elif patients < FEWEST:
        yield f"{patients} patients tell little of others: intervals are rough, and there is no verdict"
    for explainer in named:
        before = run.identity["methods"].get(explainer.method.key if explainer.method else "", {}).get("samples")
        now = explainer.settings.get("samples")
        if before is not None and now is not None and now != before:
            yield f"{explainer.name}: {now} samples of noise, where the run has {before}"
    undefined: dict[str, list[str]] = {}
    for row in found.summary:
        if row["lesions"] == 0:
            undefined.setdefault(row["explainer"], []).append(row["measure"])
    everywhere = set.intersection(*(set(undefined.get(e.name, ())) for e in named))
    if everywhere:
        reason = ": no scan has another lesion" if everywhere <= {"leakage", "random_instance"} else ""
        yield f"not defined for any explainer: {', '.join(sorted(everywhere))}{reason}"
    for name, measures in undefined.items():
        if own := [m for m in measures if m not in everywhere]:
            yield f"{name}: no value of {', '.join(own)}; its maps are zero, not finite or of one sign, or do not vary"
    lesions = len({(row["case"], row["lesion"]) for row in found.rows})
    for measure in ("random_instance", "deletion_blur"):
        counts = [row["lesions"] for row in found.summary if row["measure"] == measure]
        if counts and 0 < max(counts) < lesions:
            why = (
                "have no other lesion in their scan"
                if measure == "random_instance"
                else "have a score that is not positive"
            )
            yield f"{lesions - max(counts)} of {lesions} lesions {why}, and no value of {measure}"
    passed = {
        control: [
            row["measure"]
            for row in found.summary
            if row["explainer"] == control and row["verdict"] == "passes" and not row["measure"].endswith("_drop")
        ]
        for control in CONTROLS
    }
    for control, measures in passed.items():
        if measures:
            yield f"the control {control} passes {', '.join(measures)}, so passing these alone says nothing"


def table_lines(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Measures × explainers: means, gains for areas, with what is better, and the verdict's first letter where there is one."""
    shown = [m for m in dict.fromkeys(row["measure"] for row in summary) if better(m) and not m.endswith("_drop")]
    cells = {(row["measure"], row["explainer"]): _cell(row) for row in summary}
    names = list(dict.fromkeys(row["explainer"] for row in summary))
    heads = {m: f"{m}{' gain' * _is_area(m)} ({'more' if better(m) > 0 else 'less'} is better)" for m in shown}
    lines = [["mean over lesions", *names]] + [[heads[m], *(cells[m, name] for name in names)] for m in shown]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names) + 1)]
    found = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    if any(row["verdict"] for row in summary):
        found.append(
            "passes, fails, or unclear: where the 95 % interval over patients lies; see limit in sanity_summary.tsv"
        )
    return found


def _cell(row: Mapping[str, Any]) -> str:
    value = row["gain"] if _is_area(row["measure"]) else row["mean"]
    return "n/a" if value is None else f"{value:.3f}" + (f" {row['verdict']}" if row["verdict"] else "")


def _is_area(measure: str) -> bool:
    return measure.startswith(("deletion", "insertion"))
