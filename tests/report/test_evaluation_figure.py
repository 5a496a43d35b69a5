"""The picture of an evaluation: what is drawn is what was measured, for usual and for degenerate cohorts."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from xaiseg.imaging import Grid
from xaiseg.metrics import evaluate_case, summarise
from xaiseg.report import evaluation
from xaiseg.report.evaluation import evaluation_figure, wilson

SHAPE = (20, 20, 10)


def cohort(scans, density=0.01):
    rng = np.random.default_rng(0)
    rows, lesions = [], []
    for n in range(scans):
        predicted, reference = (rng.random(SHAPE) < density * (n % 4) for _ in range(2))
        predicted |= reference & (rng.random(SHAPE) < 0.5)
        measures, found = evaluate_case(predicted, reference, Grid(SHAPE, np.eye(4)))
        rows.append({"case": f"sub-$0{n}", "patient": str(n), "subject": str(n), **measures})
        lesions += found
    return rows, lesions, summarise(rows, [row["patient"] for row in rows], 50)


@pytest.mark.parametrize("scans", [1, 6])
def test_panels_hold_the_data(scans, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(evaluation, "finish", lambda fig, _: figures.append(fig))
    rows, lesions, summary = cohort(scans)
    evaluation_figure(rows, lesions, summary, tmp_path / "e.png")
    axes = {ax.get_label(): ax for ax in figures[0].axes}
    volumes = axes["Lesion volume"].collections[0].get_offsets()
    expected = [(row["reference_volume_ml"], row["predicted_volume_ml"]) for row in rows]
    np.testing.assert_allclose(volumes, expected)
    apart = axes["Bland-Altman"].collections[0].get_offsets()
    np.testing.assert_allclose(apart, [((x + y) / 2, y - x) for x, y in expected])
    scores = axes["nDSC of each scan"].collections[-1].get_offsets()
    np.testing.assert_allclose(scores[:, 1], sorted((row["ndsc"] for row in rows), reverse=True))
    rates = axes["Reference lesions found"].collections
    sizes = [x for x in lesions if x["mask"] == "reference"]
    smallest = [x["group"] == "TP" for x in sizes if x["volume_mm3"] < 3]
    if smallest:
        assert float(rates[0].get_offsets()[0, 1]) == pytest.approx(np.mean(smallest))
        panel = axes["Reference lesions found"]
        assert [label.get_text() for label in panel.get_xticklabels()[:2]] == ["0", "3"]
        assert panel.texts[0].get_text() == f"n={len(smallest)}"
    else:
        assert len(rates) == 0


@pytest.mark.parametrize("scans", [1, 3])
def test_the_file(scans, tmp_path: Path):
    """Also for scans without any lesion; the same bytes each time."""
    evaluation_figure(*cohort(scans), tmp_path / "one.png")
    evaluation_figure(*cohort(scans), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert matplotlib.image.imread(tmp_path / "one.png").shape[1] == 1600
    assert len(list(tmp_path.iterdir())) == 2


def test_wilson_is_where_the_score_test_rejects():
    """At either end the rate is 1.96 standard errors away, the error being that of the end."""
    for hits, n in ((0, 5), (3, 7), (20, 20)):
        for end in wilson(hits, n):
            assert (hits / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, abs=1e-6)
