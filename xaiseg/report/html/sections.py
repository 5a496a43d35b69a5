"""The chapters of a report that show the analysis: summary, groups, modality, profiles, errors."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from xaiseg.analysis.errors import MODELS, foremost
from xaiseg.analysis.run_tables import GROUPS, MEASURES, MapKind, present
from xaiseg.cohort.output import Files
from xaiseg.report.groups import curves
from xaiseg.report.html import charts as draw
from xaiseg.report.html import page
from xaiseg.report.html.findings import VERDICTS, findings
from xaiseg.report.html.material import Material, Row
from xaiseg.report.html.page import Section, cell, p_value, text

TITLES = {
    "peak": "Peak",
    "minimum": "Minimum",
    "mean_inside": "Mean in the lesion",
    "mean_ring": "Mean in the ring around it",
    "positive_mass": "Sum of positive values",
    "negative_mass": "Sum of negative values",
}


def summary(material: Material) -> Section:
    """The cohort in figures, what was found, and what to know about it."""
    run = material.run
    done = [row for row in run.cases if row["status"] not in ("failed", "left")]
    groups = material.lesions["group"]
    counts = "".join(f"<small>{page.group(g)} {cell(int((groups == g).sum()))}</small>" for g in present(groups))
    numbers = [
        ("scans", cell(len(done)), f"and {len(run.cases) - len(done)} failed" if len(done) < len(run.cases) else ""),
        ("patients", cell(len({row["patient"] for row in done})), ""),
        ("explained lesions", cell(len(groups)), counts),
    ]
    for key, title in (("ndsc", "nDSC"), ("dice", "Dice")):
        values = np.array([_number(row.get(key)) for row in done])
        if np.isfinite(values).any():
            q1, median, q3 = np.nanquantile(values, [0.25, 0.5, 0.75])
            numbers.append((f"{title}, median over scans", f"{median:.2f}", f"quartiles {q1:.2f} to {q3:.2f}"))
    found = {
        g: sum(int(_number(row.get(g))) for row in done if np.isfinite(_number(row.get(g)))) for g in ("TP", "FP", "FN")
    }
    if sum(found.values()):
        sensitivity = found["TP"] / max(found["TP"] + found["FN"], 1)
        precision = found["TP"] / max(found["TP"] + found["FP"], 1)
        numbers.append(("lesion-wise TPR · PPV", f"{sensitivity:.2f} · {precision:.2f}",
                        f"{found['TP']} TP, {found['FP']} FP, {found['FN']} FN of any size"))  # fmt: skip
    shown = "".join(
        f"<div><dt>{text(title)}</dt><dd>{value}{extra if extra.startswith('<') or not extra else _small(extra)}</dd></div>"
        for title, value, extra in numbers
    )
    model = run.identity["model"]
    about = (
        f"<p>Network: <strong>{text(model.get('architecture', 'unknown'))}</strong> on {text(' and '.join(model['channels']))}, "
        f"parameters from {text(model.get('source') or 'a source that is not recorded')}. Explained by "
        + "; ".join(f"<strong>{text(m.title)}</strong> ({text(m.unit)})" for m in material.methods)
        + ".</p>"
    )
    items = "".join(
        f'<li class="{f.verdict or "plain"}">{_tied(text(f.text))}'
        + (f' <span class="verdict">{VERDICTS[f.verdict]}</span>' if f.verdict else "")
        + "</li>"
        for f in findings(material)
    )
    body = f'<dl class="numbers">{shown}</dl>{about}'
    if items:
        body += (
            '<h3 id="findings">What was found</h3><p class="intro">Computed from the tables of this run. “As published” compares '
            "with Spagnolo et al. 2026: the interval lies on the side of their finding, and the clustered "
            "test, where there is one, agrees; “not settled here”: it does not, "
            "or there are fewer than six patients. In parentheses: 95 % intervals over patients.</p>"
            f'<ul class="findings">{items}</ul>'
        )
    notes = [*material.records["analysis"].get("notes", []), *material.notes]
    if notes:
        body += '<h3 id="notes">Keep in mind</h3><ul>' + "".join(f"<li>{text(n)}</li>" for n in notes) + "</ul>"
    return Section("summary", "Summary", body)


def groups(material: Material, files: Files) -> Section:
    """Every lesion by group, and the tests of the pairs."""
    lesions = material.lesions
    body = (
        '<p class="intro">Every dot is a lesion; the thick bar is the median (the second number below), the '
        "thin ones the quartiles. "
        + ("Groups are against the reference masks.</p>" if _labelled(lesions) else "There are no reference masks.</p>")
    )
    if not _labelled(lesions):
        body += page.note(
            "Without reference masks there are no groups to compare. Explain the scans with a column reference in their manifest."
        )
    for method in material.methods:
        body += _method_heading(material, method, "groups")
        drawn = []
        for measure in MEASURES:
            for channel in method.channels:
                values = lesions[method.column(channel, measure)]
                if np.isfinite(values).any():
                    stem = f"groups_{method.key}_{page.slug(channel)}_{measure}"
                    title = f"{TITLES[measure]}, {channel}" if channel != method.key else TITLES[measure]
                    fig = draw.dots(values, lesions["group"], title, method.unit)
                    drawn.append((draw.save(fig, files, stem), stem, f"{title} of every lesion by group"))
        if drawn:
            body += page.charts(drawn)
        rows = [_compared(row) for row in material.rows("comparisons", method=method.key)]
        if rows:
            columns = {
                "measure": "measure", "channel": "channel", "pair": "pair", "n": "lesions", "delta": "Cliff's "
                "delta", "interval": "95 % interval",
                "clustered": "p clustered", "naive": "p naive",
            }  # fmt: skip
            if any(row["mixed"] != "n/a" for row in rows):
                columns["mixed"] = "p mixed model"
            body += page.table(
                columns,
                rows,
                "Pairs of groups; p after Holm. Naive: Mann-Whitney U, which takes lesions of one patient for independent",
            )
    absent = [g for g in ("FN", "TN") if g not in lesions["group"]]
    if _labelled(lesions) and absent:
        body += page.missing(
            f"{' and '.join(absent)} were not explained.",
            f"xaiseg analyse {material.name} --missed RUN --normal RUN",
        )
    return Section("groups", "Groups of lesions", body)


def modality(material: Material, files: Files) -> Section:
    """Which channel is relied on."""
    body = (
        '<p class="intro">Which sequence speaks for a lesion? Both maps of a lesion are compared within the lesion.</p>'
    )
    several = [method for method in material.methods if len(method.channels) > 1]
    if not several:
        body += page.note(
            "Maps of one channel, as those of class-activation maps, say nothing about sequences. A method "
            "with a map per sequence, "
            "such as smoothgrad, does: xaiseg explain --method smoothgrad."
        )
    for method in several:
        lesions = material.lesions
        body += _method_heading(material, method, "modality")
        a, b = method.channels[:2]
        peaks = [lesions[method.column(c, "peak")] for c in (a, b)]
        masses = [
            lesions[method.column(c, "positive_mass")] - lesions[method.column(c, "negative_mass")] for c in (a, b)
        ]
        drawn = []
        for name, title, (x, y) in (("peak", "Peak", peaks[::-1]), ("mass", "Sum of absolute values", masses[::-1])):
            stem = f"modality_{method.key}_{name}"
            fig = draw.scatter(x, y, lesions["group"], f"{title} of each lesion", b, a)
            drawn.append((draw.save(fig, files, stem), stem, f"{title} on {a} against {b}; on the line both are equal"))
        shares = material.rows("modality_shares", method=method.key, channel=a)
        if shares:
            stem = f"modality_{method.key}_share"
            ends = [(f"{r['group']}, {r['n']:.0f}", r["share"], r["low"], r["high"]) for r in shares]
            fig = draw.intervals(
                ends,
                f"Share of {a} in all saliency",
                "median, 95 % interval over patients",
                reference=0.5,
                limits=(0, 1),
                groups=[r["group"] for r in shares],
            )
            drawn.append((draw.save(fig, files, stem), stem, f"Share of {a} in the sum of absolute values, by group"))
        body += _legend(lesions["group"]) + page.charts(drawn)
        rows = material.rows("modality", method=method.key)
        shown = [
            {
                "pair": f"{r['channel_a']} / {r['channel_b']}", "quantity": r["quantity"], "group": r["group"], "n": int(r["n"]),
                "ratio": r["ratio"], "interval": between(r["ratio_low"], r["ratio_high"]), "larger": f"{100 * r['larger_a']:.0f} %",
                "clustered": p_value(r["p_clustered_holm"]), "naive": p_value(r["p_naive_holm"]),
            } for r in rows if r["n"]
        ]  # fmt: skip
        columns = {
            "quantity": "quantity", "pair": "channels", "group": "group", "n": "lesions", "ratio": "ratio "
            "(median)", "interval": "95 % interval",
            "larger": "first larger in", "clustered": "p clustered", "naive": "p naive",
        }  # fmt: skip
        body += page.table(
            columns, shown, "Peaks and masses of two channels of the same lesion; p of signed-rank tests after Holm"
        )
    return Section("modality", "Reliance on sequences", body)


def profiles(material: Material, files: Files) -> Section:
    """Saliency against the distance from the border."""
    body = (
        '<p class="intro">Mean saliency against the distance from the lesion\'s border, negative distances '
        "inside; each lesion counts "
        "once. Bands: 95 % intervals over patients. Bins that fewer than three lesions reach are left out.</p>"
    )
    for method in material.methods:
        rows = material.rows("profiles", method=method.key)
        body += _method_heading(material, method, "profiles")
        if not rows:
            body += page.missing("No maps were saved, so there are no profiles.", "xaiseg explain --save-maps crop")
            continue
        least = min(3, max(row["lesions"] for row in rows))
        drawn = []
        names = [
            g
            for g in (*GROUPS, *sorted({r["group"] for r in rows} - set(GROUPS)))
            if any(r["group"] == g for r in rows)
        ]
        for channel in method.channels:
            series = []
            for group in names:
                mine = sorted(
                    (r for r in rows if r["group"] == group and r["channel"] == channel and r["lesions"] >= least),
                    key=lambda r: r["from_mm"],
                )
                if mine:
                    x = [(r["from_mm"] + r["to_mm"]) / 2 for r in mine]
                    series.append(draw.Line(group, x, *([r[c] for r in mine] for c in ("mean", "low", "high"))))
            if series:
                stem = f"profile_{method.key}_{page.slug(channel)}"
                fig = draw.lines(
                    series, channel, "distance from the border (mm)", f"mean, {method.unit}", border=True, names=names
                )
                drawn.append(
                    (draw.save(fig, files, stem), stem, f"Mean saliency on {channel} by distance from the border")
                )
        body += _legend(np.array(names)) + page.charts(drawn)
    return Section("profiles", "Inside and around lesions", body)


def errors(material: Material, files: Files) -> Section:
    """Can false detections be told from true ones?"""
    rows, scores = material.rows("error_detection"), material.rows("error_scores")
    body = (
        '<p class="intro">True or false detection? Scores are of patients that a classifier was not fitted on; '
        "rejecting what scores "
        "below a threshold, chosen without the patient, changes PPV and F1.</p>"
    )
    if not rows:
        notes = [n for n in material.records["analysis"].get("notes", []) if "error detection" in n]
        body += page.note(notes[0][0].upper() + notes[0][1:] + "." if notes else "Errors were not looked for.")
        return Section("errors", "Finding errors", body)
    shown = foremost(rows)
    names = [_named(r["model"], material.methods) for r in shown]
    roc, recall = [], []
    for row, name in zip(shown, names, strict=True):
        mine = [s for s in scores if s["model"] == row["model"]]
        false, true, precision = curves(
            np.array([s["score"] for s in mine]), np.array([s["group"] == "TP" for s in mine])
        )
        roc.append(draw.Line(name, false, true))
        recall.append(draw.Line(name, true[1:], precision[1:]))
    rate = shown[0]["n_tp"] / (shown[0]["n_tp"] + shown[0]["n_fp"])
    unit = (0.0, 1.02)
    pictures = [
        (draw.lines(roc, "ROC", "false lesions kept", "true lesions kept", limits=unit, diagonal=True), "errors_roc", "ROC curves"),
        (draw.lines(recall, "Precision and recall", "true lesions kept", "true among the kept", limits=unit, level=rate),
         "errors_precision_recall", "Precision-recall curves"),
        (draw.intervals([(n, r["auroc"], r["auroc_low"], r["auroc_high"]) for n, r in zip(names, shown, strict=True)], "AUROC",
                        "95 % interval over patients", reference=0.5), "errors_auroc", "AUROC with intervals"),
        (draw.intervals([(n, r["f1_gain"], r["f1_gain_low"], r["f1_gain_high"]) for n, r in zip(names, shown, strict=True)],
                        "Gain in F1 by rejection", "95 % interval over patients", reference=0.0), "errors_f1", "Gain in F1"),
    ]  # fmt: skip
    body += series_legend(names) + page.charts(
        [(draw.save(fig, files, stem), stem, about) for fig, stem, about in pictures]
    )
    lines = [
        {"model": _named(r["model"], material.methods), "auroc": r["auroc"], "auroc_i": between(r["auroc_low"], r["auroc_high"]),
         "rejected": f"{r['rejected_tp']:.0f} TP, {r['rejected_fp']:.0f} FP"}
        | {f"{m}": f"{cell(r[f'{m}_before'])} → {cell(r[f'{m}_after'])}" for m in ("ppv", "f1")}
        | {f"{m}_i": between(r[f"{m}_gain_low"], r[f"{m}_gain_high"]) for m in ("ppv", "f1")}
        for r in rows
    ]  # fmt: skip
    columns = {
        "model": "score", "auroc": "AUROC", "auroc_i": "95 % interval", "rejected": "rejected", "ppv": "PPV",
        "ppv_i": "gain, 95 % interval", "f1": "F1",
        "f1_i": "gain, 95 % interval",
    }  # fmt: skip
    first = rows[0]
    body += page.table(
        columns, lines, f"{first['n_tp']:.0f} TP and {first['n_fp']:.0f} FP of {first['patients']:.0f} patients"
    )
    return Section("errors", "Finding errors", body)


def _labelled(lesions: dict[str, np.ndarray]) -> bool:
    return bool(set(lesions["group"].tolist()) & set(GROUPS))


def _tied(said: str) -> str:
    """No line ends between a number and its unit."""
    return re.sub(r"(\d) (mm|%)", "\\1\u00a0\\2", said)


def _small(extra: str) -> str:
    return f"<small>{text(extra)}</small>"


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _compared(row: Row) -> dict[str, Any]:
    return {
        "measure": TITLES.get(row["measure"], row["measure"]), "channel": row["channel"],
        "pair": f"{row['group_a']} – {row['group_b']}", "n": f"{row['n_a']:.0f}, {row['n_b']:.0f}", "delta": row["cliffs_delta"],
        "interval": between(row["delta_low"], row["delta_high"]), "clustered": p_value(row["p_clustered_holm"]),
        "naive": p_value(row["p_naive_holm"]), "mixed": p_value(row["p_mixed_holm"]),
    }  # fmt: skip


def between(low: float, high: float) -> str:
    return "n/a" if np.isnan(low) or np.isnan(high) else f"{cell(low)} to {cell(high)}"


def _method_heading(material: Material, method: MapKind, chapter: str) -> str:
    if len(material.methods) < 2:
        return ""
    name = f"{chapter}-{method.key}"
    return f'<h3 id="{name}"><a href="#{name}">{text(method.title)}</a></h3>'


def _legend(groups: np.ndarray) -> str:
    return '<ul class="legend">' + "".join(f"<li>{page.group(g)}</li>" for g in present(groups)) + "</ul>"


def _named(model: str, methods: Sequence[MapKind]) -> str:
    """A score by what it is made of; the method's key is left out where there is one alone."""
    judge, _, what = model.partition(", ")
    if judge in MODELS:
        made_of = {"": "figures", "maps": "radiomics of maps", "scans": "radiomics of scans", "all": "all of these"}
        return f"{made_of[what]}, {judge}"
    known = {"volume_mm3": "volume"}
    short = model.removeprefix(f"{methods[0].key}_") if len(methods) == 1 else model
    return known.get(model, short.replace("_", " "))


def series_legend(names: Sequence[str]) -> str:
    """Names with the colour and the dashes of their lines."""
    items = []
    for n, name in enumerate(names):
        colour, _, dashes = draw.SERIES[n % len(draw.SERIES)]
        pattern = "" if dashes == "-" else f' stroke-dasharray="{" ".join(f"{2.4 * d:g}" for d in dashes[1])}"'
        line = (
            f'<svg width="40" height="10" aria-hidden="true"><path d="M1 5h38" stroke="{colour}" stroke-width="2.6" '
            f'fill="none"{pattern}/></svg>'
        )
        items.append(f"<li>{line} {text(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'
