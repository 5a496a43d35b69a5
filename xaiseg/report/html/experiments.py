"""The chapters of a report that show experiments on the run: context, synthetic and filled lesions, sanity."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from xaiseg.analysis.sanity import MEASURES, better
from xaiseg.cohort.output import Files
from xaiseg.report.html import charts as draw
from xaiseg.report.html import page
from xaiseg.report.html.findings import UNITS
from xaiseg.report.html.material import Material, Row
from xaiseg.report.html.page import Section, cell, text
from xaiseg.report.html.sections import between, series_legend

_FAINT = 150  # curves of single lesions; more would be a grey surface
_MARKS = {
    "passes": ' <span class="good" title="passes">✓</span>',
    "fails": ' <span class="bad" title="fails">✕</span>',
    "unclear": " ?",
}


def context(material: Material, files: Files) -> Section:
    """How much of its surroundings a lesion needs."""
    summary = material.rows("context_summary")
    body = (
        '<p class="intro">Everything farther from a lesion than a distance is taken away, and the network '
        "segments what is left: how much "
        "of its surroundings does it need? Grey: single lesions; blue: all, with 95 % intervals over patients.</p>"
    )
    if not summary:
        body += page.missing("The context experiment was not made.", f"xaiseg context {material.name} --model M")
        return Section("context", "Context", body)
    rows = material.rows("context")
    drawn = []
    for measure, title, up in (
        ("mean_probability", "Mean lesion probability", "probability"),
        ("detection_rate", "Lesions detected", "share of lesions"),
    ):
        mine = [r for r in summary if r["measure"] == measure and np.isfinite(r["distance_mm"])]
        line = draw.Line("all lesions", *([r[c] for r in mine] for c in ("distance_mm", "estimate", "low", "high")))
        faint = _single(rows, measure) if measure == "mean_probability" else []
        stem = f"context_{measure}"
        fig = draw.lines([line], title, "tissue kept around the lesion (mm)", up, limits=(0, 1.03), faint=faint)
        drawn.append((draw.save(fig, files, stem), stem, f"{title} against the distance that is kept"))
    body += page.charts(drawn)
    said = {
        "detected_50_mm": "50 % of lesions are detected from",
        "detected_90_mm": "90 % of lesions are detected from",
        "level_off_mm": "mean probability is 95 % of the untouched image's from",
    }
    places = [
        {"what": said[r["measure"]], "mm": "not reached" if np.isnan(r["estimate"]) else f"{cell(r['estimate'])} mm",
         "interval": _ends(r)} for r in summary if r["measure"] in said
    ]  # fmt: skip
    first = summary[0]
    body += page.table(
        {"what": "", "mm": "distance", "interval": "95 % interval"},
        places,
        f"{first['lesions']:.0f} lesions of {first['patients']:.0f} patients",
    )
    return Section("context", "Context", body + _notes(material, "context"))


def synthetic(material: Material, files: Files) -> Section:
    """Inserted lesions, and real ones filled."""
    name = material.name
    body = '<h3 id="inserted"><a href="#inserted">Inserted lesions</a></h3>'
    summary = material.rows("synthetic_summary")
    if not summary:
        body += page.missing("No lesions were inserted.", f"xaiseg synthetic {name} --model M")
    else:
        body += '<p class="intro">Lesions of known place, size and contrast are put into normal-appearing tissue.</p>'
        body += _inserted(material, summary, files)
    body += '<h3 id="filled"><a href="#filled">Filled lesions</a></h3>'
    rows = material.rows("counterfactual")
    if not rows:
        body += page.missing("No lesions were filled.", f"xaiseg counterfactual {name} --model M")
    else:
        body += (
            '<p class="intro">A lesion is replaced by normal-appearing tissue: what does the network say in '
            "its place, and of the lesions "
            "around it?</p>" + _filled(material, rows, files)
        )
    return Section("synthetic", "Synthetic and filled lesions", body)


def sanity(material: Material, files: Files) -> Section:
    """Explainers compared on the same lesions."""
    body = (
        '<p class="intro">Can the explanations be trusted? The same lesions, explained in several ways, by '
        "measures that do not look at the reference.</p>"
    )
    summary = material.rows("sanity_summary")
    if not summary:
        body += page.missing("Explainers were not put to the test.", f"xaiseg sanity {material.name} --model M")
        return Section("sanity", "Sanity of explanations", body)
    explainers = list(dict.fromkeys(r["explainer"] for r in summary))
    measures = list(dict.fromkeys(r["measure"] for r in summary))
    by = {(r["explainer"], r["measure"]): r for r in summary}
    lines = []
    for measure in measures:
        line: dict[str, Any] = {"measure": f"{text(measure.replace('_', ' '))}<br><small>{_direction(measure)}</small>"}
        for n, explainer in enumerate(explainers):
            line[f"e{n}"] = _mean(by.get((explainer, measure)))
        lines.append(line)
    columns = {"measure": "measure"} | {f"e{n}": e for n, e in enumerate(explainers)}
    count = int(max(r["lesions"] for r in summary))
    body += page.table(
        columns,
        lines,
        f"Mean over up to {count} lesions, below it the 95 % interval over patients; ✓ passes, ✕ fails, ? unclear "
        "against what a map that knows nothing gets",
        html=tuple(columns),
    )
    drawn = []
    values = material.rows("sanity")
    for measure in measures:
        rows = [
            (e, *(by[e, measure][c] for c in ("mean", "mean_low", "mean_high")))
            for e in explainers
            if (e, measure) in by
        ]
        if measure.endswith("_drop") or not any(np.isfinite(row[1]) for row in rows):
            continue
        dots = [
            np.array([v["value"] for v in values if v["explainer"] == e and v["measure"] == measure], float)
            for e, *_ in rows
        ]
        stem = f"sanity_{page.slug(measure)}"
        controls = [v.get("control", np.nan) for v in values if v["measure"] == measure]
        controls += [by[e, measure].get("limit", np.nan) for e, *_ in rows] if np.isnan(controls).all() else []
        known = np.array(controls)[np.isfinite(controls)]
        fig = draw.intervals(
            rows,
            measure.replace("_", " "),
            _direction(measure),
            dots_of=dots,
            reference=float(known.mean()) if len(known) else None,
        )
        drawn.append(
            (
                draw.save(fig, files, stem),
                stem,
                f"{measure.replace('_', ' ')} of each explainer; dashed: what maps that know nothing get",
            )
        )
    body += page.charts(drawn)
    meanings = "".join(f"<li><strong>{text(n.replace('_', ' '))}</strong>: {text(m)}</li>" for n, m in MEASURES.items())
    body += f"<details><summary>What the measures are</summary><ul>{meanings}</ul></details>"
    return Section("sanity", "Sanity of explanations", body + _notes(material, "sanity"))


def _single(rows: Sequence[Row], measure: str) -> list[draw.Line]:
    by: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if np.isfinite(row["distance_mm"]):
            by.setdefault((row["case"], row["lesion"]), []).append(row)
    curves = list(by.values())
    chosen = np.unique(np.linspace(0, len(curves) - 1, min(len(curves), _FAINT)).round().astype(int)).tolist()
    return [draw.Line("", [r["distance_mm"] for r in curves[n]], [r[measure] for r in curves[n]]) for n in chosen]


def _inserted(material: Material, summary: Sequence[Row], files: Files) -> str:
    series = list(dict.fromkeys(row["series"] for row in summary))
    unit = str(material.records["synthetic"].get("settings", {}).get("unit", "") or "")
    across = f"contrast ({UNITS.get(unit, unit)})" if unit else "contrast"
    drawn = []
    whole = [r for r in summary if r.get("diameter_mm", "all") == "all" and np.isfinite(r.get("contrast", np.nan))]
    for measure in dict.fromkeys(r["measure"] for r in whole):
        mine = [
            draw.Line(
                s,
                *(
                    [r[c] for r in whole if r["series"] == s and r["measure"] == measure]
                    for c in ("contrast", "estimate", "low", "high")
                ),
            )
            for s in series
        ]
        rate = measure in ("detection_rate", "mean_probability")
        title = {"detection_rate": "Lesions detected", "mean_probability": "Mean lesion probability"}.get(
            measure, _spoken(measure)
        )
        stem = f"synthetic_{page.slug(measure)}"
        up = {"detection_rate": "share of lesions", "mean_probability": "probability"}.get(
            measure, material.methods[0].unit
        )
        fig = draw.lines(
            [m for m in mine if len(m.x)], title, across, up, limits=(0, 1.03) if rate else None, names=series
        )
        drawn.append((draw.save(fig, files, stem), stem, f"{title} against contrast"))
    rows = [
        {
            "series": r["series"],
            "diameter": _diameter(r.get("diameter_mm", "all")),
            "what": r["measure"].replace("detected_", "") + " % detected from",
            "contrast": "not reached" if np.isnan(r["estimate"]) else cell(r["estimate"]),
            "interval": _ends(r, ""),
        }
        for r in summary
        if r["measure"].startswith("detected_")
    ]
    columns = {
        "series": "lesion in",
        "diameter": "diameter (mm)",
        "what": "",
        "contrast": across,
        "interval": "95 % interval",
    }
    first = summary[0]
    table = page.table(columns, rows, f"{first['lesions']:.0f} lesions in scans of {first['patients']:.0f} patients")
    return series_legend(series) + page.charts(drawn) + table + _notes(material, "synthetic")


def _filled(material: Material, rows: Sequence[Row], files: Files) -> str:
    drawn = []
    for role, title in (("filled", "The filled lesion"), ("neighbour", "Lesions near it")):
        mine = [r for r in rows if r["role"] == role]
        if mine:
            values = np.array([r[f"{when}_mean_probability"] for when in ("before", "after") for r in mine])
            when = np.repeat(["1 before", "2 after"], len(mine))
            stem = f"counterfactual_{role}"
            fig = draw.dots(values, when, title, "mean lesion probability", named=False)
            drawn.append((draw.save(fig, files, stem), stem, f"{title}: mean probability before and after filling"))
    summary = material.rows("counterfactual_summary")
    table = ""
    if summary:
        lines = [
            {
                "role": r["role"],
                "measure": r["measure"].replace("_", " "),
                "mean": r["estimate"],
                "interval": between(r["low"], r["high"]),
                "n": int(r["lesions"]),
            }
            for r in summary
        ]
        columns = {"role": "lesions", "measure": "measure", "mean": "mean", "interval": "95 % interval", "n": "n"}
        table = page.table(columns, lines, "Before and after filling")
    return page.charts(drawn) + table + _notes(material, "counterfactual")


def _spoken(measure: str) -> str:
    words = measure.replace("_", " ")
    return words[:1].upper() + words[1:]


def _diameter(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ends(row: Row, unit: str = " mm") -> str:
    low, high = row["low"], row["high"]
    if np.isnan(row["estimate"]) or np.isnan(low):
        return "n/a"
    return f"{cell(low)} to {'beyond what was tried' if not np.isfinite(high) else cell(high) + unit}"


def _mean(row: Row | None) -> str:
    if row is None or np.isnan(row["mean"]):
        return "n/a"
    mark = _MARKS.get(row.get("verdict", ""), "")
    return f"{cell(row['mean'])}{mark}<br><small>{between(row['mean_low'], row['mean_high'])}</small>"


def _direction(measure: str) -> str:
    """Which values are better; those of areas themselves, not of their gains."""
    if measure.startswith(("deletion", "insertion")):
        more = measure.startswith("insertion") != measure.endswith("_drop")
        return "higher is better" if more else "lower is better"
    return {1: "higher is better", -1: "lower is better", 0: ""}[better(measure)]


def _notes(material: Material, name: str) -> str:
    return "".join(page.note(n) for n in material.records.get(name, {}).get("notes", []))
