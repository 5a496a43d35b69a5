"""A finished run opened again, with its network and its scans, by experiments that ask the network more about its lesions."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xaiseg._types import Instance
from xaiseg.analysis.run_tables import Run
from xaiseg.checkpoints import model_hash
from xaiseg.checkpoints.folder import spec_from_dict
from xaiseg.cohort.folder import SETTINGS
from xaiseg.cohort.output import Files
from xaiseg.cohort.segmentation import on_image
from xaiseg.cohort.stages import INSTANCES
from xaiseg.cohort.work import load_scan
from xaiseg.errors import InputError
from xaiseg.imaging import Case, Scan, read_cohort
from xaiseg.inference import StitchedPredictor
from xaiseg.instances import instances_of
from xaiseg.models import Model, ModelSpec


class Choice(NamedTuple):
    """Which lesions of a run.

    groups: TP, FP, …; any where empty. volume_mm3: from, to. number: as many at most, drawn patient by patient so that no patient
    has two before each has one. seed: of the draw.
    """

    groups: tuple[str, ...] = ()
    volume_mm3: tuple[float, float] = (0.0, float("inf"))
    number: int | None = None
    seed: int = 0


class OpenScan(NamedTuple):
    """A scan with those of its lesions that were chosen.

    labels: `(X, Y, Z)`, all instances of the run in it, on the grid of `scan.image`. instances: the chosen ones.
    places: of these in the run's table of lesions.
    """

    case: Case
    scan: Scan
    labels: np.ndarray
    instances: list[Instance]
    places: list[int]


def run_input(run: Run) -> Path:
    """The manifest or BIDS folder of a run, as it was given."""
    return Path(json.loads((run.root / SETTINGS).read_text(encoding="utf-8"))["input"])


def run_spec(run: Run) -> ModelSpec:
    """The spec that the run's model had: its windows, threshold, normalisation …"""
    record = {name: value for name, value in run.identity["model"].items() if name != "hash"}
    return spec_from_dict(record, str(run.root / SETTINGS))


def reopen_model(run: Run, model: Model) -> Model:
    """The network with the run's own windows and threshold. Raises InputError where it is not the network of the run."""
    if (now := model_hash(model)) != (before := str(run.identity["model"].get("hash"))):
        raise InputError(
            f"{run.root}: was explained with the model {before[:12]}, the one that was given is {now[:12]}: "
            "give the model of the run"
        )
    return replace(model, spec=run_spec(run))


def predictor_of(run: Run, model: Model) -> StitchedPredictor:
    """The prediction that the run explained, in float32."""
    return StitchedPredictor.of(model, whole_volume=bool(run.identity.get("whole_volume")))


def choose(run: Run, choice: Choice) -> list[int]:
    """Places of the chosen lesions in the run's table, rising. Raises InputError where there is none."""
    lesions = run.lesions
    low, high = choice.volume_mm3
    if "volume_mm3" not in lesions:
        raise InputError(f"{run.root / 'lesions.tsv'}: no column volume_mm3, expected a table of this run: restore it")
    known = sorted(set(lesions["group"].tolist()))
    if unknown := set(choice.groups) - set(known):
        raise InputError(
            f"{run.root}: has no lesion of group {', '.join(sorted(unknown))}; its groups are {', '.join(known)}"
        )
    wanted = (lesions["volume_mm3"] >= low) & (lesions["volume_mm3"] <= high)
    if choice.groups:
        wanted &= np.isin(lesions["group"], choice.groups)
    places = np.flatnonzero(wanted)
    if not len(places):
        raise InputError(
            f"{run.root}: none of {len(run)} lesions is {' or '.join(choice.groups) or 'one'} with {low:g} to {high:g} mm³ "
            f"(they have {lesions['volume_mm3'].min():g} to {lesions['volume_mm3'].max():g}): choose another size"
        )
    if choice.number is not None and choice.number < len(places):
        drawn = np.random.default_rng(choice.seed).permutation(places)
        turns: dict[str, int] = {}
        rounds = np.zeros(len(drawn), int)
        for n, patient in enumerate(lesions["patient"][drawn].tolist()):
            rounds[n] = turns.get(patient, 0)
            turns[patient] = rounds[n] + 1
        places = drawn[np.argsort(rounds, kind="stable")][: choice.number]
    return sorted(places.tolist())


def open_scans(
    run: Run, places: Sequence[int], source: str | Path | None = None, cases: Sequence[str] = ()
) -> Iterator[OpenScan]:
    """The scans that hold the lesions at `places`, one after another, each once.

    source: the run's input, where it was moved. cases: scans that are opened besides, whether they have lesions or not.
    Raises InputError where the input has not all cases of the run, a file cannot be read, or a label map has not all the lesions.
    """
    spec = run_spec(run)
    given = Path(source) if source is not None else run_input(run)
    known = {case.name: case for case in read_cohort(given, spec.channels).cases}
    by_case: dict[str, list[int]] = {name: [] for name in cases}
    for place in places:
        by_case.setdefault(str(run.lesions["case"][place]), []).append(place)
    files = Files(run.root)
    if missing := [name for name in by_case if name not in known]:
        raise InputError(f"{given}: no case {missing[0]}, which {run.root} has: give the run's own input with --source")
    for name, own in by_case.items():
        scan = load_scan(known[name], spec, bool(run.identity.get("resample")))
        path = files.path(known[name], INSTANCES)
        labels = scan.labels(path)
        numbers = [int(run.lesions["lesion"][place]) for place in own]
        try:
            found, lost = on_image(instances_of(labels, numbers), labels, scan)
        except KeyError as error:
            raise InputError(
                f"{path}: no lesion {error.args[0]}, which {run.root}/lesions.tsv has: restore the file"
            ) from None
        if lost:
            raise InputError(f"{path}: lesion {lost[0]} lies outside of what the preprocessing keeps: leave it out")
        yield OpenScan(known[name], scan, scan.labels_to_image(labels), found, own)
