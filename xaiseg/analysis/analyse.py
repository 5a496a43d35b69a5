"""Everything that a finished run tells about its lesions together: read, compare, write tables and pictures."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xaiseg.analysis import errors, groups, modality, profiles
from xaiseg.analysis.clustered import has_mixed_models
from xaiseg.analysis.experiment import FOLDER
from xaiseg.analysis.radiomics import SOURCES, Radiomics, check_mirp, map_radiomics, scan_radiomics
from xaiseg.analysis.run_tables import GROUPS, MapKind, Run, check_alike, check_figures, pooled, present, read_run
from xaiseg.analysis.saved_maps import saved_maps
from xaiseg.cohort.output import Files
from xaiseg.cohort.tables import versions
from xaiseg.errors import InputError
from xaiseg.imaging.manifest import NONE
from xaiseg.report.groups import error_figure, group_figure, profile_figure

TABLES = {
    "groups": groups.GROUP_COLUMNS,
    "comparisons": groups.COMPARISON_COLUMNS,
    "modality": modality.MODALITY_COLUMNS,
    "modality_shares": modality.SHARE_COLUMNS,
    "modality_lesions": modality.LESION_COLUMNS,
    "profiles": profiles.PROFILE_COLUMNS,
    "error_detection": errors.ERROR_COLUMNS,
    "error_scores": errors.SCORE_COLUMNS,
}


def analyse(
    out: str | Path,
    *,
    missed: str | Path | None = None,
    normal: str | Path | None = None,
    patients: Mapping[str, str] | None = None,
    radiomics: Sequence[str] = (),
    source: str | Path | None = None,
    resamples: int = 2000,
    seed: int = 0,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Analyse a finished run of `xaiseg explain` and write `OUT/analysis`: the tables `TABLES`, `analysis.json`, pictures.

    A run of predicted lesions has TP and FP. Missed lesions and normal tissue are explained by runs of their own, with the same
    model and settings, and join the analysis:

    Args:
        out: the run's folder.
        missed: that of a run with `--instances missed` or `reference`, of which the FN are taken.
        normal: that of a run with `--instances given` on regions from `true_negatives.write_true_negatives`; they are the TN.
        patients: whose scan a case is, by case; where it is not said, the run's own, of the manifest.
        radiomics: judge errors by radiomic features as well, of the "maps", of the "scans", and of all: see `radiomics`.
        source: the run's input, where it was moved.
        resamples, seed: of the bootstrap over patients.
        say: called with the lines of a summary.

    Returns:
        The rows of each table by its name, and `notes`: what could not be done and why.

    Raises:
        InputError: a run is unfinished, without lesions, or no run of `explain`; the runs are not of one model and settings; the
            folder cannot be written.
    """
    if unknown := set(radiomics) - set(SOURCES):
        raise InputError(f"radiomics of {', '.join(sorted(unknown))}: known are {', '.join(SOURCES)}")
    if radiomics:
        check_mirp()
    if resamples < 1:
        raise InputError(f"resamples is {resamples}, expected a positive number, such as 2000")
    started = time.time()
    notes: list[str] = []
    runs = _runs(read_run(out, patients), missed, normal, patients, notes)
    for run in runs:
        check_figures(run)
    main, lesions = runs[0], pooled(runs)
    tables: dict[str, list[dict[str, Any]]] = {
        "groups": groups.describe_groups(lesions, main.methods),
        "comparisons": groups.compare_groups(lesions, main.methods, resamples, seed),
        "modality": modality.compare_channels(lesions, main.methods, resamples, seed),
        "modality_shares": modality.mass_shares(lesions, main.methods, resamples, seed),
        "modality_lesions": list(modality.lesion_ratios(lesions, main.methods)),
    }
    tables["profiles"] = list(_profiles(runs, lesions, resamples, seed, notes))
    tables["error_detection"], tables["error_scores"] = _detect(main, radiomics, source, resamples, seed, notes)
    notes += _notes(lesions, main, tables)
    files = Files(Path(out) / FOLDER)
    (files.root / "analysis.json").unlink(missing_ok=True)  # tables without it are of an analysis under way
    written = _write(files, tables, main, lesions)
    settings = {"resamples": resamples, "seed": seed, "resampled": "patients, each with all lesions"}
    files.json(
        files.root / "analysis.json",
        {
            "settings": settings,
            "runs": {"main": str(main.root), "missed": missed and str(missed), "normal": normal and str(normal)},
            "methods": {m.key: {"title": m.title, "unit": m.unit, "channels": list(m.channels)} for m in main.methods},
            "lesions": {group: int((lesions["group"] == group).sum()) for group in present(lesions["group"])},
            "patients": len(set(lesions["patient"].tolist())),
            "notes": notes,
            "columns": {f"{name}.tsv": TABLES[name] for name in tables if tables[name]},
            "files": written,
            "seconds": round(time.time() - started, 1),
            "versions": versions(),
        },
    )
    for line in (*_lines(tables, main, lesions), *(f"note: {note}" for note in notes)):
        say(line)
    say(f"written to {files.root}: {', '.join(written)}, analysis.json")
    return {**tables, "notes": notes}


def _runs(
    main: Run,
    missed: str | Path | None,
    normal: str | Path | None,
    patients: Mapping[str, str] | None,
    notes: list[str],
) -> list[Run]:
    runs = [main]
    for path, sources, option in ((missed, ("missed", "reference"), "missed"), (normal, ("given",), "normal")):
        if path is None:
            continue
        other = read_run(path, patients)
        if other.identity.get("instances") not in sources:
            raise InputError(
                f"{other.root}: explained {other.identity.get('instances')} instances, expected {' or '.join(sources)}: "
                f"give as {option!r} a run with --instances {sources[0]}"
            )
        check_alike(main, other)
        found = other.lesions["group"]
        if option == "missed":
            other = other.chosen(found == "FN", "FN")
        else:
            if lesions := int((found == "TP").sum()):
                notes.append(
                    f"{lesions} regions of {other.root} share voxels with the reference and are no TN; left out"
                )
            other = other.chosen(found != "TP", "TN")
        runs.append(other)
    if unlike := len(set(runs[-1].lesions["patient"].tolist()) - set(main.lesions["patient"].tolist())):
        notes.append(f"{unlike} patients of {runs[-1].root} have no lesion in {main.root}")
    return runs


def _profiles(
    runs: Sequence[Run], lesions: Mapping[str, np.ndarray], resamples: int, seed: int, notes: list[str]
) -> Iterator[dict[str, Any]]:
    """Rows of all methods, from the saved maps; what has none is noted."""
    edges = profiles.bin_edges()
    for method in runs[0].methods:
        flaws: list[str] = []
        found = [profile for run in runs for profile in _profiles_of(run, method, edges, flaws)]
        known = np.array([profile is not None for profile in found])
        if missing := int((~known).sum()):
            first = f"; {flaws[0]}" if flaws else ""
            notes.append(f"{method.key}: {missing} of {len(known)} lesions have no usable map, and no profile{first}")
        if known.any():
            stacked = np.stack([profile for profile in found if profile is not None])
            parts = lesions["patient"][known], lesions["group"][known]
            for row in profiles.mean_profiles(stacked, *parts, method.channels, edges, resamples, seed):
                yield {"method": method.key, **row}


def _profiles_of(run: Run, method: MapKind, edges: np.ndarray, flaws: list[str]) -> Iterator[np.ndarray | None]:
    """The profile of each lesion of a run, in order; None where there is none."""
    for found in saved_maps(run, method, flaws):
        profile = None if found is None else profiles.radial_profile(found, edges)
        yield None if profile is None else profile.mean


def _detect(
    run: Run, radiomics: Sequence[str], source: str | Path | None, resamples: int, seed: int, notes: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of error detection, of the predicted lesions; none, with a note, where it cannot be done."""
    if run.identity.get("instances") != "predicted":
        notes.append(
            f"no error detection: {run.root} explained {run.identity.get('instances')} instances, not predicted ones"
        )
        return [], []
    judged = run.chosen(np.isin(run.lesions["group"], ("TP", "FP")))
    lesions = judged.lesions
    beside: dict[str, Radiomics] = {}
    if len(judged) and "maps" in radiomics:
        beside["maps"] = map_radiomics(judged, notes)
    if len(judged) and "scans" in radiomics:
        beside["scans"] = scan_radiomics(judged, source)
    true = lesions["group"] == "TP"
    names = sorted({row["patient"] for row in run.cases} | set(lesions["patient"].tolist()))
    place = np.searchsorted(names, lesions["patient"]) if len(judged) else np.zeros(0, int)
    totals = {group: np.zeros(len(names), int) for group in ("TP", "FP", "FN")}
    for row in run.cases:
        for group, total in totals.items():
            if row.get(group, NONE) != NONE:
                total[names.index(row["patient"])] += int(row[group])
    scored = [np.bincount(place[which], minlength=len(names)) for which in (true, ~true)]
    others = errors.Counts(
        np.maximum(totals["TP"] - scored[0], 0), np.maximum(totals["FP"] - scored[1], 0), totals["FN"]
    )
    try:
        features = errors.saliency_features(lesions, run.methods)
        rows, found = errors.detect_errors(features, true, place, others, resamples, seed)
        if beside:
            together = [(features.values, features.names), *beside.values()]
            values = np.concatenate([one[0] for one in together], 1)
            beside["all"] = Radiomics(values, tuple(name for one in together for name in one[1]))
            for what, used in beside.items():
                alike = errors.Features(*used, ())
                more, judgements = errors.detect_errors(alike, true, place, others, resamples, seed)
                rows += [row | {"model": f"{row['model']}, {what}"} for row in more]
                found |= {f"{model}, {what}": detection for model, detection in judgements.items()}
    except InputError as error:
        notes.append(f"no {error}")
        return [], []
    if unscored := int(others.true.sum() + others.false.sum()):
        notes.append(
            f"error detection: {unscored} predicted lesions were not explained; they count, and are never rejected"
        )
    scores = [
        {name: lesions[name][n] for name in ("case", "patient", "group")}
        | {"lesion": int(lesions["lesion"][n]), "model": model, "score": scores[n], "kept": int(kept[n])}
        for model, (scores, kept) in found.items()
        for n in range(len(true))
    ]
    return rows, scores


def _notes(
    lesions: Mapping[str, np.ndarray], run: Run, tables: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[str]:
    counts = {group: int((lesions["group"] == group).sum()) for group in present(lesions["group"])}
    if len(set(lesions["patient"].tolist())) < 2:
        yield "all lesions are of one patient: no interval and no clustered test, and the other tests speak of this patient alone"
    if not set(counts) & set(GROUPS):
        yield "without reference masks there are no groups to compare: give a column 'reference' to `xaiseg explain`"
    else:
        if absent := [group for group in GROUPS if group not in counts]:
            hints = {"FN": "FN need 'missed'", "TN": "TN need 'normal'"}
            said = [hints[group] for group in absent if group in hints]
            yield f"no lesion is {' or '.join(absent)}" + (f" ({', '.join(said)})" if said else "")
        if few := [f"{group} ({n})" for group, n in counts.items() if n < groups.FEWEST]:
            yield f"not compared, for fewer than {groups.FEWEST} lesions: {', '.join(few)}"
    if not has_mixed_models():
        yield "no mixed models: statsmodels is missing, pip install 'xaiseg[analysis]'"
    undefined = max((row["undefined"] for row in tables["groups"] if row["measure"] != "mean_ring"), default=0)
    if undefined:
        yield f"up to {undefined} lesions of a group have no finite figure of their map and are left out (column undefined)"
    if failed := [row["case"] for row in run.cases if row["status"] in ("failed", "partial")]:
        yield f"{len(failed)} cases failed, whole or in part, and what is missing of them is left out: {', '.join(failed[:3])}"


def _write(
    files: Files, tables: Mapping[str, Sequence[Mapping[str, Any]]], run: Run, lesions: Mapping[str, np.ndarray]
) -> list[str]:
    """Tables that have rows, and pictures; what an earlier analysis left of others is removed."""
    written = []
    for name, rows in tables.items():
        if rows:
            written.append(f"{name}.tsv")
            files.table(files.root / written[-1], list(TABLES[name]), rows)
    for method in run.methods:
        written.append(f"desc-{method.key}_groups.png")
        files.figure(files.root / written[-1], partial(_draw_groups, method, lesions, tables["comparisons"]))
        if found := [row for row in tables["profiles"] if row["method"] == method.key]:
            written.append(f"desc-{method.key}_profiles.png")
            files.figure(files.root / written[-1], partial(_draw_profiles, found, method))
    if tables["error_detection"]:
        written.append("error_detection.png")
        draw = partial(error_figure, tables["error_detection"], tables["error_scores"])
        files.figure(files.root / written[-1], draw)
    pictures = (path.name for kind in ("groups", "profiles") for path in files.root.glob(f"desc-*_{kind}.png"))
    for old in (*(f"{name}.tsv" for name in TABLES), "error_detection.png", *pictures):
        if old not in written:
            (files.root / old).unlink(missing_ok=True)
    return written


def _draw_groups(
    method: MapKind, lesions: Mapping[str, np.ndarray], comparisons: Sequence[Mapping[str, Any]], path: Path
) -> None:
    values = {
        measure: {channel: lesions[method.column(channel, measure)] for channel in method.channels}
        for measure in ("peak", "minimum", "mean_inside", "mean_ring")
    }
    mine = [row for row in comparisons if row["method"] == method.key]
    group_figure(
        values, lesions["group"], lesions["patient"], path, title=method.title, unit=method.unit, comparisons=mine
    )


def _draw_profiles(rows: Sequence[Mapping[str, Any]], method: MapKind, path: Path) -> None:
    profile_figure(rows, method.channels, path, title=method.title, unit=method.unit)


def _lines(
    tables: Mapping[str, Sequence[Mapping[str, Any]]], run: Run, lesions: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """The summary for the reader of the terminal: peaks of the groups, channels, profile, errors."""
    names = present(lesions["group"])
    yield ", ".join(f"{(lesions['group'] == g).sum()} {g}" for g in names) + (
        f" lesions of {len(set(lesions['patient'].tolist()))} patients"
    )
    for method in run.methods:
        for row in tables["comparisons"]:
            if row["method"] == method.key and row["measure"] == "peak" and row.get("cliffs_delta") is not None:
                a, b = (_median(tables["groups"], row, row[side]) for side in ("group_a", "group_b"))
                interval = f" ({row['delta_low']:+.2f} to {row['delta_high']:+.2f})" if row["patients"] > 1 else ""
                yield (
                    f"{method.key}, {row['channel']} peak: {row['group_a']} {a:.3g}, {row['group_b']} {b:.3g}, "
                    f"delta {row['cliffs_delta']:+.2f}{interval}, p {_p(row['p_clustered_holm'])} clustered, "
                    f"{_p(row['p_naive_holm'])} naive"
                )
        for row in tables["modality"]:
            if row["method"] == method.key and row["group"] == modality.ALL and row.get("ratio") is not None:
                yield (
                    f"{method.key}, {row['quantity']}: {row['channel_a']} / {row['channel_b']} {row['ratio']:.3g}, "
                    f"larger in {100 * row['larger_a']:.0f} % of {row['n']} lesions, "
                    f"p {_p(row.get('p_clustered_holm'))} clustered"
                )
    for row in tables["error_detection"]:
        yield (
            f"TP or FP by {row['model']}: AUROC {row['auroc']:.3f} ({row['auroc_low']:.3f} to {row['auroc_high']:.3f}), "
            f"PPV {row['ppv_before']:.3f} to {row['ppv_after']:.3f}, F1 {row['f1_before']:.3f} to {row['f1_after']:.3f}"
        )


def _median(rows: Sequence[Mapping[str, Any]], like: Mapping[str, Any], group: str) -> float:
    same = ("method", "channel", "measure")
    return next(r["median"] for r in rows if r["group"] == group and all(r[name] == like[name] for name in same))


def _p(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return NONE
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"
