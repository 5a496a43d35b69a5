"""The pictures of context and synthetic lesions: what is drawn is what was measured, the same bytes each time."""

import numpy as np
import pytest

from xaiseg.analysis.context import ContextCurve, context_summary
from xaiseg.analysis.insertion import insertion_summary
from xaiseg.report.context import context_figure, insertion_figure

CHANNELS = ("FLAIR", "T1w")


def curves(count, steps=12):
    rng = np.random.default_rng(0)
    distances = np.append(np.arange(float(steps)), np.inf)
    place = np.append(distances[:-1], 3 * steps)
    found = []
    for n in range(count):
        probability = 0.9 / (1 + np.exp(-(place - rng.normal(5, 2)) / 1.5))
        found.append(ContextCurve(n, distances, probability, probability, probability, probability > 0.5, 1))
    return found


@pytest.mark.parametrize("count", [1, 9])
def test_context(count, tmp_path):
    found = curves(count)
    summary = context_summary(found, [f"$p{n // 2}" for n in range(count)], resamples=50)
    fig = context_figure(found, summary, None)
    axes = {ax.get_label(): ax for ax in fig.axes}
    rate = next(line for line in axes["Lesions detected"].lines if len(line.get_xdata()) == 12)
    np.testing.assert_allclose(rate.get_ydata(), np.mean([c.detected[:-1] for c in found], axis=0))
    thick = [line for line in axes["Mean lesion probability"].lines if len(line.get_xdata()) == 12][-1]
    np.testing.assert_allclose(thick.get_ydata(), np.mean([c.mean_probability[:-1] for c in found], axis=0))
    at = next(row["estimate"] for row in summary if row["measure"] == "detected_50_mm")
    marks = [line.get_xdata()[0] for line in axes["Lesions detected"].lines if line.get_marker() == "^"]
    assert at in marks
    for name in ("a.png", "b.png"):
        assert context_figure(found, summary, tmp_path / name) is None
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_context_that_is_never_enough():
    found = [c.__class__(c.label, c.distance_mm, *[0 * c.mean_logit] * 3, c.mean_logit > 9, 1) for c in curves(4)]
    fig = context_figure(found, context_summary(found, list("abcd"), resamples=50), None)
    assert any("not reached" in text.get_text() for ax in fig.axes for text in ax.texts)


def rows(shift, saliency):
    rng = np.random.default_rng(1)
    found = []
    for n in range(6):
        for contrast in (0.0, 1.0, 2.0, 3.0):
            row = {"lesion": n, "patient": n // 2, "contrast_FLAIR": contrast}
            row["detected"] = int(contrast > rng.normal(1.5 + shift, 0.5))
            found.append(row | ({f"saliency_{c}_peak": contrast + rng.normal() for c in CHANNELS} if saliency else {}))
    return found


@pytest.mark.parametrize("saliency", [False, True])
def test_insertion(saliency, tmp_path):
    series = {}
    for name, shift in (("FLAIR alone", 0.0), ("both", -0.5)):
        series[name] = (rows(shift, saliency), insertion_summary(rows(shift, saliency), "contrast_FLAIR", resamples=50))
    options = {"unit": "standard deviations", "saliency_unit": "Δlogit"}
    fig = insertion_figure(series, "contrast_FLAIR", CHANNELS, None, **options)
    assert len(fig.axes) == 1 + 2 * saliency
    lines = [line for line in fig.axes[0].lines if line.get_label() in series]
    for line, (found, _) in zip(lines, series.values(), strict=True):
        mean = [np.mean([r["detected"] for r in found if r["contrast_FLAIR"] == c]) for c in (0, 1, 2, 3)]
        np.testing.assert_allclose(line.get_ydata(), mean)
    if saliency:
        drawn = [line.get_ydata() for line in fig.axes[1].lines if len(line.get_xdata()) == 4]
        first = series["FLAIR alone"][0]
        expected = [np.mean([r["saliency_FLAIR_peak"] for r in first if r["contrast_FLAIR"] == c]) for c in range(4)]
        np.testing.assert_allclose(drawn[0], expected)
    insertion_figure(series, "contrast_FLAIR", CHANNELS, tmp_path / "a.png", **options)
    insertion_figure(series, "contrast_FLAIR", CHANNELS, tmp_path / "b.png", **options)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match="can be told apart"):
        insertion_figure({}, "contrast_FLAIR", CHANNELS, None, **options)
