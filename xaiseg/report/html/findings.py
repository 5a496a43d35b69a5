"""What the tables say, in sentences: each with its interval, and whether it is what the paper found."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from xaiseg.analysis.modality import ALL
from xaiseg.analysis.profiles import sign_of_profile
from xaiseg.analysis.run_tables import GROUPS, MapKind
from xaiseg.imaging.manifest import NONE
from xaiseg.report.canvas import number
from xaiseg.report.html.material import MODEL, Material
from xaiseg.report.html.page import p_value

HOLDS, DIFFERS, OPEN, PLAIN = "holds", "differs", "open", ""
VERDICTS = {HOLDS: "as published", DIFFERS: "not as published", OPEN: "not settled here", PLAIN: ""}


LEVEL = 0.05
FEWEST = 6  # patients from which a test by changing signs can fall below the level: 2^(1 - 6) < 0.05
UNITS = {"spread": "standard deviations of the tissue around", "intensity": "normalised intensity"}
_AROUND_MM = 10.0  # the neighbourhood, of which most bins must be negative where the paper's finding is to hold
_SIGNS = {1: "positive", -1: "negative", 0: "not clearly of one sign"}


class Finding(NamedTuple):
    """A sentence, and whether the paper's finding holds: `HOLDS`, `DIFFERS`, `OPEN`, or `PLAIN` where the paper has none."""

    text: str
    verdict: str = PLAIN


def findings(material: Material) -> list[Finding]:
    """All that can be said, in the order of the chapters."""
    found: list[Finding] = []
    for method in material.methods:
        name = f"{method.key}: " if len(material.methods) > 1 else ""
        for one in (*_modality(material, method), *_groups(material, method), *_profile(material, method)):
            found.append(Finding(name + one.text, one.verdict))
    return [
        *found,
        *_errors(material),
        *_context(material),
        *_synthetic(material),
        *_filled(material),
        *_sanity(material),
    ]


def interval(row: Mapping[str, Any], estimate: str, low: str, high: str, form: str = "#.3g") -> str:
    """`3.66 (3.4 to 3.9)`; the estimate alone where there is no interval, as for one patient."""
    value, *ends = (float(row.get(name, np.nan)) for name in (estimate, low, high))
    if np.isnan(value):
        return NONE
    if np.isnan(ends).any():
        return f"{number(value, form, plus=False)} (no interval: too few patients)"
    return (
        f"{number(value, form, plus=False)} "
        f"({' to '.join('beyond' if np.isinf(end) else number(end, form, plus=False) for end in ends)})"
    )


def side(low: float | None, high: float | None, at: float = 0.0) -> int:
    """1 where an interval lies above a value, -1 below it, 0 where it holds it or there is none."""
    if low is None or high is None or np.isnan(low) or np.isnan(high):
        return 0
    return int(low > at) - int(high < at)


def _verdict(where: int, p: float) -> str:
    """By the side of the interval, if the clustered test agrees: intervals from few patients are too short."""
    return {1: HOLDS, -1: DIFFERS, 0: OPEN}[where if p < LEVEL else 0]


def _enough(verdict: str, patients: float) -> str:
    """A verdict by intervals alone: none from too few patients."""
    return verdict if patients >= FEWEST else OPEN


def _modality(material: Material, method: MapKind) -> Iterator[Finding]:
    for row in material.rows("modality", method=method.key, group=ALL, quantity="peak"):
        a, b = row["channel_a"], row["channel_b"]
        where = side(row["ratio_low"], row["ratio_high"], 1.0)
        text = (
            f"The peak of {a} is {interval(row, 'ratio', 'ratio_low', 'ratio_high')} times that of {b} (median "
            f"over lesions), and larger "
            f"in {100 * row['larger_a']:.0f} % of {row['n']:.0f} lesions (clustered p {p_value(row['p_clustered_holm'])})."
        )
        yield Finding(
            text,
            _verdict(where if a == "FLAIR" else -where, row["p_clustered_holm"])
            if {a, b} == {"FLAIR", "T1w"}
            else PLAIN,
        )


def _groups(material: Material, method: MapKind) -> Iterator[Finding]:
    """Each pair of groups in the first channel, and TP against FP in the others."""
    for n, channel in enumerate(method.channels):
        rows = material.rows("comparisons", method=method.key, channel=channel, measure="peak")
        pairs = {(row["group_a"], row["group_b"]): row for row in rows}
        for pair in combinations(GROUPS, 2):
            row = pairs.get(pair)
            if row is None or (n and pair != ("TP", "FP")) or (pair != ("TP", "FP") and not _neighbours(pair, pairs)):
                continue
            if np.isnan(row["cliffs_delta"]):
                yield Finding(f"{pair[0]} and {pair[1]}: too few lesions to compare their peaks on {channel}.", OPEN)
                continue
            where = side(row["delta_low"], row["delta_high"]) if row["p_clustered_holm"] < LEVEL else 0
            said = {1: "is higher in", -1: "is lower in", 0: "does not clearly differ between"}[where]
            than = "and" if where == 0 else "than in"
            text = (
                f"Peak saliency on {channel} {said} {pair[0]} {than} {pair[1]}: Cliff's delta "
                f"{interval(row, 'cliffs_delta', 'delta_low', 'delta_high', '.2f')}, p "
                f"{p_value(row['p_clustered_holm'])} clustered by patient, "
                f"{p_value(row['p_naive_holm'])} if lesions were independent (both after Holm)."
            )
            yield Finding(text, _verdict(where, row["p_clustered_holm"]))


def _neighbours(pair: tuple[str, str], pairs: Mapping[tuple[str, str], Any]) -> bool:
    """Whether no group that is there lies between the two in TP > FP > FN > TN: the others follow."""
    there = [g for g in GROUPS if any(g in p for p in pairs)]
    return there.index(pair[1]) == there.index(pair[0]) + 1


def _profile(material: Material, method: MapKind) -> Iterator[Finding]:
    """Of TP, or of all that there is: inside and outside of the border, in the first channel; the sign inside in the others."""
    groups = list(dict.fromkeys(row["group"] for row in material.rows("profiles", method=method.key)))
    if not groups or not material.signed(method):
        return
    group = "TP" if "TP" in groups else groups[0]
    signs = {}
    for channel in method.channels:
        rows = material.rows("profiles", method=method.key, group=group, channel=channel)
        if edge := max((row for row in rows if row["to_mm"] <= 0), key=lambda row: row["to_mm"], default=None):
            signs[channel] = side(edge["low"], edge["high"])
    if not signs:
        return
    first, *others = signs
    rows = sorted(
        material.rows("profiles", method=method.key, group=group, channel=first), key=lambda row: row["from_mm"]
    )
    starts, outside = sign_of_profile(rows), [row for row in rows if row["from_mm"] >= 0]
    below = [row for row in outside if side(row["low"], row["high"]) == -1]
    text = f"Just inside the border, saliency of {group} on {first} is {_SIGNS[signs[first]]}; around the lesion "
    if starts is None:
        text += "its mean is nowhere negative"
    else:
        text += f"its mean is negative from {starts:g} mm on, clearly so in {len(below)} of {len(outside)} bins of 1 mm"
    text += "".join(f"; on {channel} it is {_SIGNS[signs[channel]]} inside" for channel in others)
    if first != "FLAIR":
        yield Finding(f"{text}.")
    elif signs[first] == 1 and 2 * sum(row["to_mm"] <= _AROUND_MM for row in below) > sum(
        row["to_mm"] <= _AROUND_MM for row in outside
    ):
        yield Finding(f"{text}.", _enough(HOLDS, below[0]["patients"]))
    else:
        contrary = signs[first] == -1 or (starts is None and outside)
        yield Finding(f"{text}.", _enough(DIFFERS if contrary else OPEN, rows[0]["patients"]))


def _errors(material: Material) -> Iterator[Finding]:
    rows = material.rows("error_detection")
    several = [row for row in rows if row["features"] > 1]
    if not several:
        return
    row = next((row for row in several if row["model"] == MODEL), several[0])
    gain = side(row["f1_gain_low"], row["f1_gain_high"])
    told = side(row["auroc_low"], row["auroc_high"], 0.5)
    changes = [f"{m.upper()} from {row[f'{m}_before']:.2f} to {row[f'{m}_after']:.2f}" for m in ("ppv", "f1")]
    text = (
        "A classifier of TP and FP by figures of saliency, size and probability has, in patients not seen, an AUROC of "
        f"{interval(row, 'auroc', 'auroc_low', 'auroc_high', '.2f')}; rejecting what scores low takes "
        f"{' and '.join(changes)}, a change of F1 "
        f"by {interval(row, 'f1_gain', 'f1_gain_low', 'f1_gain_high', '.2f')}."
    )
    if own := next((r for r in rows if r["model"] == "mean_probability"), None):
        text += f" The network's own mean probability alone: AUROC {interval(own, 'auroc', 'auroc_low', 'auroc_high', '.2f')}."
    verdict = HOLDS if gain == told == 1 else DIFFERS if -1 in (gain, told) else OPEN
    yield Finding(text, _enough(verdict, row["patients"]))


def _context(material: Material) -> Iterator[Finding]:
    """Published: detection needs about 7 mm, the score levels off at 12 to 15 mm."""
    places = {row["measure"]: row for row in material.rows("context_summary") if row["measure"].endswith("_mm")}
    if not places:
        return
    said = {
        "detected_50_mm": "half are detected",
        "detected_90_mm": "90 % are detected",
        "level_off_mm": "the mean probability is 95 % of that in the untouched image",
    }
    count, patients = (next(iter(places.values()))[name] for name in ("lesions", "patients"))
    parts = [f"{text} {_from(places[measure])}" for measure, text in said.items() if measure in places]
    verdicts = {
        _near(places[measure], low, high)
        for measure, low, high in (("detected_90_mm", 6.0, 8.0), ("level_off_mm", 12.0, 15.0))
        if measure in places
    }
    verdict = DIFFERS if DIFFERS in verdicts else OPEN if OPEN in verdicts else HOLDS
    yield Finding(
        f"How much of their surroundings do {count:.0f} lesions need? {_capital('; '.join(parts))}.",
        _enough(verdict, patients),
    )


def _from(row: Mapping[str, Any]) -> str:
    if np.isnan(row["estimate"]):
        return "at no distance that was tried"
    place = f"from {row['estimate']:.1f} mm on" if row["estimate"] else "with none of it"
    if np.isnan(row["low"]) and np.isnan(row["high"]):
        return place
    high = f"{row['high']:.1f} mm" if np.isfinite(row["high"]) else "beyond what was tried"
    return f"{place} ({row['low']:.1f} to {high})" if row["estimate"] or row["high"] else place


def _near(row: Mapping[str, Any], low: float, high: float) -> str:
    """Whether a place is where the paper has it, or its interval at least reaches there."""
    if np.isnan(row["estimate"]):
        return DIFFERS
    if low <= row["estimate"] <= high:
        return HOLDS
    return DIFFERS if np.isnan(row["low"]) or row["low"] > high or row["high"] < low else OPEN


def _synthetic(material: Material) -> Iterator[Finding]:
    parts = []
    for row in material.rows("synthetic_summary", measure="detected_50"):
        if row.get("diameter_mm", "all") == "all":
            none = np.isnan(row["estimate"])
            place = "none that was tried" if none else interval(row, "estimate", "low", "high")
            parts.append(f"{row['series']} {place}")
    if parts:
        unit = material.records["synthetic"].get("settings", {}).get("unit")
        said = f" (in {UNITS.get(unit, unit)})" if unit else ""
        yield Finding(f"Contrast from which half of the inserted lesions are detected{said}: {'; '.join(parts)}.")


def _filled(material: Material) -> Iterator[Finding]:
    rows = material.rows("counterfactual", role="filled")
    if rows:
        before, after = (np.median([row[f"{when}_mean_probability"] for row in rows]) for when in ("before", "after"))
        left = sum(row["after_detected"] > 0 for row in rows)
        yield Finding(
            f"Filled with normal-appearing tissue, the mean probability of {len(rows)} lesions goes from "
            f"{before:.2f} to {after:.2f} (medians); {left} of them are still detected."
        )


def _sanity(material: Material) -> Iterator[Finding]:
    """Deletion and insertion by the run's own methods, and what an edge detector makes of the same."""
    rows = material.rows("sanity_summary")
    explainers = list(dict.fromkeys(row["explainer"] for row in rows))
    keys = {e: e.split(":")[0].replace("-", "").replace("++", "pp") for e in explainers}
    own = [e for e in explainers if keys[e] in {method.key for method in material.methods}]
    edges = _beaten(rows, "edges")
    for explainer in own:
        found = _beaten(rows, explainer)
        if not found:
            continue
        better, others = ([name for name, good in found.items() if good is wanted] for wanted in (True, False))
        text = f"{explainer} beats a random order in {_listed(better) or 'no area'}"
        text += f", not clearly in {_listed(others)}" if others else ""
        if passed := sum(edges.values()):
            text += f"; a mere edge detector does so in {passed} of {len(edges)}, so that these alone prove little"
        yield Finding(f"{text}.")


def _beaten(rows: Sequence[Mapping[str, Any]], explainer: str) -> dict[str, bool]:
    """The areas of an explainer, and whether the gain over a random order is clear."""
    return {
        row["measure"].replace("_", " by ").replace("road", "ROAD"): (
            row["verdict"] == "passes" if "verdict" in row else side(row["gain_low"], row["gain_high"]) == 1
        )
        for row in rows
        if row["explainer"] == explainer
        and row["measure"].startswith(("deletion_", "insertion_"))
        and not row["measure"].endswith("_drop")
        and not np.isnan(row.get("gain", np.nan))
    }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] if names else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
