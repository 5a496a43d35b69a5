"""A whole report of a run written by hand: its chapters, what they say, what is missing and by which command it comes."""

import base64
import json
import re
import shutil
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest

from tests.analysis.simulated_run import table
from tests.report.simulated_report import quick, write_report_run
from tests.report.test_html_page import Elements
from xaiseg.analysis.analyse import analyse
from xaiseg.analysis.experiment import write_experiment
from xaiseg.cli import main
from xaiseg.cohort.output import Files
from xaiseg.errors import InputError
from xaiseg.report.html import pages as module
from xaiseg.report.html.experiments import context, sanity, synthetic
from xaiseg.report.html.gallery import chosen
from xaiseg.report.html.material import read_material, read_table

CHAPTERS = [
    "summary",
    "gallery",
    "groups",
    "modality",
    "profiles",
    "errors",
    "context",
    "synthetic",
    "sanity",
    "failures",
    "methods",
    "files",
]


@pytest.fixture(autouse=True)
def without_what_is_slow(monkeypatch):
    quick(monkeypatch)


report = partial(module.report, say=lambda _: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of 7 patients, 28 lesions, with its whole report, figures and all."""
    with pytest.MonkeyPatch.context() as patch:
        quick(patch, figures=True)
        run = write_report_run(tmp_path_factory.mktemp("made"), patients=7)
        pages = report(run)
        before = {path: path.read_bytes() for path in (*pages, *(run / "report").iterdir())}
        report(run)
    return run, pages, before


def content(run):
    return (run / "report.html").read_text()


def test_chapters_stand_in_order(made):
    run, pages, _ = made
    html = content(run)
    assert re.findall(r'<section id="([^"]+)">', html) == CHAPTERS
    assert re.findall(r'<li><a href="#([^"]+)">', html)[: len(CHAPTERS)] == CHAPTERS
    assert [page.name for page in pages] == ["report.html", *(f"sub-{n:02d}.html" for n in range(7))]


def test_pages_need_no_other_file_and_links_lead_somewhere(made):
    _, pages, _ = made
    anchors = {page.name: {a["id"] for _, a in Elements(page.read_text()).found if "id" in a} for page in pages}
    for page in pages:
        elements = Elements(page.read_text()).found
        for tag, attributes in elements:
            assert attributes.get("src", "data:").startswith("data:"), (page, tag)
            assert not [name for name in attributes if name.startswith("on")]
            if tag == "a":
                file, _, anchor = attributes["href"].partition("#")
                assert not file or file in anchors
                assert not anchor or anchor in anchors[file or page.name]
        names = [a["id"] for _, a in elements if "id" in a and "-" not in a["id"]]
        assert len(names) == len(set(names))


def test_cards_are_in_order_of_suspicion_and_hold_their_figures(made):
    pytest.importorskip("sklearn")  # without it nothing scores lesions
    run, _, _ = made
    cards = [a for tag, a in Elements(content(run)).found if a.get("class") == "card"]
    scores = {
        (r["case"], int(r["lesion"])): r["score"]
        for r in read_table(run / "analysis/error_scores.tsv")
        if r["model"] == "logistic"
    }
    values = [json.loads(card["data-values"]) for card in cards]
    assert len(cards) == len(scores) == 28
    assert [v[0] for v in values] == sorted(scores.values())
    peaks = [row["smoothgrad_FLAIR_peak"] for row in read_table(run / "lesions.tsv")]
    assert sorted(v[1] for v in values) == pytest.approx(sorted(peaks), rel=1e-6)
    listed = read_table(run / "report/suspicion.tsv")
    assert [row["score"] for row in listed] == sorted(scores.values())


def test_figures_lie_as_png_and_svg_with_every_point(made):
    run, _, _ = made
    stems = {path.stem for path in (run / "report").glob("*.svg")}
    assert stems == {path.stem for path in (run / "report").glob("*.png")}
    assert {"groups_smoothgrad_FLAIR_peak", "modality_smoothgrad_peak", "profile_smoothgrad_T1w"} <= stems
    assert ("errors_roc" in stems) == (find_spec("sklearn") is not None)
    html = content(run)
    assert all(f"<code>{stem}</code>" in html for stem in stems)
    drawing = (run / "report/groups_smoothgrad_FLAIR_peak.svg").read_text()
    assert "<date>" not in drawing
    # 14 TP as round and 14 FP as square ends of lines without length
    marks = [
        p
        for p in re.findall(r'<path d="([^"]*)"[^>]*?style="([^"]*)"', drawing)
        if "stroke-linecap" in p[1] and p[0].count("M") > 1
    ]
    assert [path.count("M") for path, _ in marks] == [14, 14]


def test_the_same_run_gives_the_same_bytes(made, tmp_path):
    run, pages, before = made
    assert before == {path: path.read_bytes() for path in (*pages, *(run / "report").iterdir())}
    assert str(run.parent) not in content(run)


def test_findings_are_numbers_of_the_tables(made):
    run, _, _ = made
    html = content(run)
    (row,) = [r for r in read_table(run / "analysis/modality.tsv") if r["group"] == "all" and r["quantity"] == "peak"]
    assert (
        f"The peak of FLAIR is {row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) times that of T1w"
        in html
    )
    (row,) = [
        r for r in read_table(run / "analysis/comparisons.tsv") if (r["channel"], r["measure"]) == ("FLAIR", "peak")
    ]
    assert row["cliffs_delta"] > 0.9
    assert f"Cliff&#x27;s delta {row['cliffs_delta']:.2f}" in html
    assert "as published" in html
    assert len(read_table(run / "report/findings.tsv")) == html.count('<li class="holds">') + html.count(
        '<li class="open">'
    ) + html.count('<li class="differs">') + html.count('<li class="plain">')


@pytest.mark.parametrize("chapter", ["context", "synthetic", "sanity"])
def test_what_is_missing_comes_by_a_command(made, chapter):
    run, _, _ = made
    part = re.search(rf'<section id="{chapter}">.*?</section>', content(run), re.DOTALL)[0]
    assert f"xaiseg {chapter} {run.name} --model M" in part


def test_a_subject_has_all_lesions_and_the_viewer(made):
    _, pages, _ = made
    html = pages[1].read_text()
    elements = Elements(html).found
    assert [a["id"] for _, a in elements if a.get("class") == "lesion"] == [f"sub-00-lesion-{n}" for n in (1, 2, 3, 4)]
    scans = json.loads(re.search(r'id="scans">(.*?)</script>', html)[1])
    ids = {a["id"] for tag, a in elements if tag == "script" and "id" in a}
    (scan,) = scans
    assert [lesion["number"] for lesion in scan["lesions"]] == [1, 2, 3, 4]
    named = [
        scan["labels"],
        *(c["id"] for c in scan["channels"]),
        *(m["id"] for x in scan["lesions"] for m in x["maps"]),
    ]
    assert {*named, "niivue", "scans"} == ids
    assert len(named) == 3 + 8
    first = re.search(r'src="data:image/webp;base64,([^"]+)"', html)[1]
    assert base64.b64decode(first)[8:12] == b"WEBP"


def test_hostile_names_of_cases_and_groups(tmp_path):
    run = write_report_run(tmp_path, patients=2, levels={"TP": 2.0, "<svg onload=x>": 1.0}, hostile="<script>alert(1)")
    for page in report(run, viewer=False):  # a manifest cannot have such names
        elements = Elements(page.read_text()).found
        assert not [a for _, a in elements if "onload" in a]
        assert "<script>alert" not in page.read_text()
    assert "&lt;script&gt;alert(1)" in content(run)


def test_without_references_groups_are_missing(tmp_path):
    run = write_report_run(tmp_path, patients=2, levels={"unlabelled": 2.0})
    report(run)
    html = content(run)
    assert "Without reference masks there are no groups to compare." in html
    assert "suspicion of error" not in html
    assert "<dt>nDSC" not in html


def test_without_maps(tmp_path):
    run = write_report_run(tmp_path, patients=2, maps=False)
    report(run)
    assert "No maps were saved, so there are no profiles." in content(run)
    assert "no map of smoothgrad was saved" in (run / "sub-00.html").read_text()
    assert content(run).count("<img") == 8  # the scans are shown all the same


def test_one_channel_that_is_named_as_the_method(tmp_path):
    run = write_report_run(tmp_path, patients=2, method="gradcampp", channels=("gradcampp",))
    report(run)
    html = content(run)
    assert "Maps of one channel" in html
    assert (run / "report/groups_gradcampp_gradcampp_peak.svg").is_file()


def test_failed_cases_are_listed(tmp_path):
    run = write_report_run(tmp_path, patients=2)
    cases = [dict(zip(("case", "status", "TP", "FP", "FN", "message"), row, strict=True))
             for row in (("sub-00", "done", 2, 2, 2, "n/a"), ("sub-01", "partial", 2, 2, 2, "lesion 3: out of memory"),
                         ("sub-07", "failed", "n/a", "n/a", "n/a", "T1w.nii.gz: <b>truncated"))]  # fmt: skip
    table(run / "cases.tsv", cases)
    table(
        run / "logs/failures.tsv", [{"case": "sub-07", "unit": "segmentation", "lesion": "n/a", "message": "truncated"}]
    )
    report(run)
    part = re.search(r'<section id="failures">.*?</section>', content(run), re.DOTALL)[0]
    for said in (
        "2 cases that failed",
        "lesion 3: out of memory",
        "&lt;b&gt;truncated",
        "segmentation",
        "explain command again",
    ):
        assert said in part
    assert not (run / "sub-07.html").exists()  # there is nothing to show


def test_scans_that_are_gone(tmp_path):
    run = write_report_run(tmp_path, patients=2)
    (tmp_path / "scans").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="--source INPUT if they were moved, or --no-viewer"):
        report(run)
    report(run, viewer=False)
    assert "No pictures, for the scans cannot be read" in content(run)
    assert content(run).count("<img") == 0
    report(run, source=tmp_path / "moved/manifest.tsv")
    assert content(run).count("<img") == 8


def test_one_scan_that_cannot_be_read_is_said_and_all_are_an_error(tmp_path):
    run = write_report_run(tmp_path, patients=2)
    (tmp_path / "scans/00_T1w.nii.gz").write_bytes(b"no image")
    lines = []
    module.report(run, say=lines.append)
    assert "00_T1w.nii.gz" in "\n".join(lines)
    assert "00_T1w.nii.gz" in (run / "sub-00.html").read_text()
    assert content(run).count("<img") == 4
    (tmp_path / "scans/01_T1w.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match="no scan could be read"):
        report(run)


def test_without_the_viewer_pages_are_small(tmp_path):
    run = write_report_run(tmp_path, patients=1)
    report(run)
    large = (run / "sub-00.html").stat().st_size
    report(run, viewer=False)
    assert (run / "sub-00.html").stat().st_size < large / 5
    assert "niivue" not in (run / "sub-00.html").read_text().replace("2021 niivue", "")


def test_a_gallery_of_few(tmp_path):
    run = write_report_run(tmp_path, patients=1)
    report(run, gallery=3)
    assert content(run).count('<li class="card"') == 3
    assert "3 of 4 lesions are here" in content(run)


def test_which_lesions_a_small_gallery_has():
    lesions = {"lesion": np.arange(6), "peak": np.array([5.0, 1, 2, 9, np.nan, 3])}
    scores = np.array([0.9, 0.1, 0.8, 0.7, np.nan, 0.2])
    assert chosen(lesions, "peak", scores, 4) == [0, 1, 3, 5]
    assert chosen(lesions, "peak", scores, 6) == list(range(6))
    assert chosen(lesions, "peak", np.full(6, np.nan), 2) == [0, 3]


def test_old_pages_and_figures_are_removed(tmp_path):
    run = write_report_run(tmp_path, patients=1)
    report(run)
    shutil.copy(run / "sub-00.html", run / "sub-99.html")
    (run / "sub-notes.html").write_text("mine")
    (run / "report/old.svg").write_text("old")
    report(run)
    assert not (run / "sub-99.html").exists()
    assert (run / "sub-notes.html").read_text() == "mine"
    assert not (run / "report/old.svg").exists()


def test_an_analysis_of_fewer_lesions_is_said(tmp_path):
    run = write_report_run(tmp_path, patients=2)
    report(run)
    before = (run / "lesions.tsv").read_text().splitlines(keepends=True)
    (run / "lesions.tsv").write_text("".join(before[:-1]))
    report(run)
    assert "the analysis is of 8 lesions and the run now has 7" in content(run)


def test_bad_input(tmp_path, capsys):
    run = write_report_run(tmp_path, patients=1)
    with pytest.raises(InputError, match="has no method occlusion; its methods are smoothgrad"):
        report(run, method="occlusion")
    shutil.copytree(run, tmp_path / "unfinished")
    cases = (run / "cases.tsv").read_text().replace("done", "left")
    (tmp_path / "unfinished/cases.tsv").write_text(cases)
    with pytest.raises(InputError, match="left to do"):
        report(tmp_path / "unfinished")
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "settings.json" in capsys.readouterr().err
    (run / "analysis").mkdir(exist_ok=True)
    (run / "analysis/analysis.json").write_text("{")
    with pytest.raises(InputError, match=r"analysis\.json: cannot be read"):
        report(run)


def test_the_command_says_how_large_pages_are(tmp_path, capsys):
    run = write_report_run(tmp_path, patients=1)
    assert main(["report", str(run), "--no-viewer", "--gallery", "3", "--method", "smoothgrad"]) == 0
    said = capsys.readouterr().out
    assert "not analysed yet" in said
    assert re.search(r"report\.html: [\d.]+ [kM]B, 4 lesions, 3 of them in the gallery", said)
    assert re.search(r"1 page of subjects: [\d.]+ [kM]B", said)


def experiment(run, name, tables, **settings):
    """An experiment's tables and record, as its command writes them."""
    described = {stem: (dict.fromkeys(rows[0], "meaning"), rows) for stem, rows in tables.items()}
    write_experiment(run, name, described, settings=settings, notes=[f"a note on {name}"], started=0.0)


def write_experiments(run):
    distances = [(0.0, 0.2), (5.0, 0.8), ("inf", 0.9)]
    place = {"low": 1.0, "high": "inf", "lesions": 4, "patients": 2}
    experiment(run, "context", {
        "context": [{"case": f"sub-0{n}", "lesion": 1, "distance_mm": d, "mean_probability": p, "detected": 1}
                    for n in (0, 1) for d, p in distances],
        "context_summary": [
            *({"measure": m, "distance_mm": d, "estimate": p, **place, "high": 1.0}
              for m in ("detection_rate", "mean_probability") for d, p in distances),
            {"measure": "detected_90_mm", "distance_mm": "n/a", "estimate": 4.25, **place},
        ],
    }, distances_mm=[0, 5], background=0.0)  # fmt: skip
    experiment(run, "synthetic", {"synthetic_summary": [
        *({"series": s, "diameter_mm": "all", "measure": "detection_rate", "contrast": c, "estimate": c / 4, **place, "high": 1.0}
          for s in ("FLAIR alone", "T1w alone") for c in (0.0, 2.0, 4.0)),
        {"series": "FLAIR alone", "diameter_mm": 6.0, "measure": "detected_50", "contrast": "n/a", "estimate": 2.125, **place},
    ]}, unit="spread")  # fmt: skip
    figures = {"before_mean_probability": 0.9, "after_mean_probability": 0.1, "before_detected": 1, "after_detected": 0}
    experiment(run, "counterfactual", {
        "counterfactual": [{"lesion": 1, "role": role, **figures} for role in ("filled", "neighbour")],
        "counterfactual_summary": [{"role": "filled", "measure": "saliency_change", "estimate": 0.625, "low": 0.5,
                                    "high": 0.75, "lesions": 1}],
    })  # fmt: skip
    ends = {"mean_low": 0.25, "mean_high": 0.75, "gain": 0.1, "gain_low": 0.05, "gain_high": 0.2}
    experiment(run, "sanity", {
        "sanity": [{"case": "sub-00", "explainer": e, "measure": "insertion_blur", "value": 0.5, "control": 0.3}
                   for e in ("smoothgrad", "edges")],
        "sanity_summary": [{"explainer": e, "measure": "insertion_blur", "lesions": 3, "mean": 0.5, **ends, "verdict": v}
                           for e, v in (("smoothgrad", "passes"), ("edges", "fails"))],
    })  # fmt: skip


def test_experiments_that_are_there_are_shown(tmp_path):
    run = write_report_run(tmp_path, patients=2)
    write_experiments(run)
    report(run)
    html = content(run)
    parts = {
        name: re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)[0]
        for name in ("context", "synthetic", "sanity")
    }
    assert "4.25 mm" in parts["context"]
    assert "1.00 to beyond what was tried" in parts["context"]
    assert "2.12" in parts["synthetic"]  # to three digits
    assert "0.625" in parts["synthetic"]
    assert re.search(r"0\.500 <span class=\"good\" title=\"passes\">.*?0\.250 to 0\.750", parts["sanity"])
    assert 'title="fails"' in parts["sanity"]
    for name in ("context", "synthetic", "counterfactual", "sanity"):
        assert f"a note on {name}" in html
        assert f"xaiseg {name} {run.name}" not in html
    stems = {path.stem for path in (run / "report").glob("*.svg")}
    assert {
        "context_mean_probability",
        "synthetic_detection_rate",
        "counterfactual_filled",
        "sanity_insertion_blur",
    } <= stems
    assert "Context: for 4 lesions of 2 patients all beyond a distance from 0 to 5 mm" in html
    assert "Explainers (smoothgrad, edges)" in html


def test_figures_of_experiments_are_drawn(tmp_path, monkeypatch):
    run = write_report_run(tmp_path, patients=2)
    write_experiments(run)
    material = read_material(run, say=lambda _: None)
    monkeypatch.undo()
    files = Files(tmp_path / "figures")
    body = "".join(chapter(material, files).body for chapter in (context, synthetic, sanity))
    assert body.count("<svg width=") == 2 + (1 + 2) + 2 + 1  # with the lines of a legend of two series
    assert all(path.stat().st_size > 2000 for path in (tmp_path / "figures").iterdir())


def test_missed_lesions_are_points_of_their_own(tmp_path):
    run = write_report_run(tmp_path / "a", patients=2)
    missed = write_report_run(tmp_path / "b", patients=2, levels={"FN": 1.0, "TP": 2.0}, instances="reference")
    analyse(run, missed=missed, resamples=40, say=lambda _: None)
    material = read_material(run)
    assert sorted(set(material.lesions["group"].tolist())) == ["FN", "FP", "TP"]
    report(run)
    assert content(run).count('<li class="card"') == 8  # of the main run alone
    shutil.rmtree(missed)
    report(run)
    assert "FN are in the tables, not as points in the figures" in content(run)


def test_two_methods(tmp_path):
    run = write_report_run(tmp_path, patients=2)
    rows = (run / "lesions.tsv").read_text().splitlines()
    names = rows[0].split("\t")
    kept = [n for n, name in enumerate(names) if name.startswith("smoothgrad_")]
    more = [
        [names[n].replace("smoothgrad", "gradient") if i == 0 else row.split("\t")[n] for n in kept]
        for i, row in enumerate(rows)
    ]
    (run / "lesions.tsv").write_text(
        "\n".join("\t".join([row, *cells]) for row, cells in zip(rows, more, strict=True)) + "\n"
    )
    settings = json.loads((run / "logs/settings.json").read_text())
    settings["identity"]["methods"]["gradient"] = {"aggregate": "mean", "target": "logit"}
    (run / "logs/settings.json").write_text(json.dumps(settings))
    sidecar = json.loads((run / "desc-smoothgrad_saliency.json").read_text()) | {
        "MethodKey": "gradient",
        "Method": "Gradient, mean",
    }
    (run / "desc-gradient_saliency.json").write_text(json.dumps(sidecar))
    for path in run.rglob("*desc-smoothgrad_lesion*"):
        shutil.copy(path, path.with_name(path.name.replace("smoothgrad", "gradient")))
    report(run, method="gradient")
    html = content(run)
    assert "peak, T1w, gradient: highest first" in html
    assert '<h3 id="groups-gradient">' in html
    assert "smoothgrad: The peak of FLAIR" in html
    page = (run / "sub-00.html").read_text()
    assert page.count("<img") == 2 * 4
    (scan,) = json.loads(re.search(r'id="scans">(.*?)</script>', page)[1])
    assert [m["name"] for m in scan["lesions"][0]["maps"]] == [
        "FLAIR, smoothgrad",
        "T1w, smoothgrad",
        "FLAIR, gradient",
        "T1w, gradient",
    ]


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path):
    run = write_report_run(tmp_path, patients=2)
    report(run)
    before = {path.name: path.read_bytes() for path in run.glob("*.html")}
    for path in (tmp_path / "scans").glob("*FLAIR*"):
        path.unlink()
    with pytest.raises(InputError, match="no scan could be read"):
        report(run)
    assert {path.name: path.read_bytes() for path in run.glob("*.html")} == before
    assert not list(run.glob(".report-*"))


def test_records_and_tables_of_another_form_are_told(tmp_path):
    run = write_report_run(tmp_path, patients=2)
    report(run)
    for file, content, said in (
        ("analysis/context.json", "[]", r"context\.json: cannot be read \(a list, not an object\)"),
        ("analysis/comparisons.tsv", "method\tchannel\nsmoothgrad\tFLAIR\n", r"comparisons\.tsv: no column measure"),
        ("logs/settings.json", "[1]", r"settings\.json: cannot be read \(a list"),
        ("logs/settings.json", '{"identity": {"command": "explain"}}', r"settings\.json: no model or methods"),
    ):
        path = run / file
        before = path.read_text() if path.exists() else None
        path.write_text(content)
        with pytest.raises(InputError, match=said):
            report(run)
        path.unlink() if before is None else path.write_text(before)
