"""Sentences about tables whose numbers are known: what they say, and whether that is called published."""

from pathlib import Path

import numpy as np
import pytest

from xaiseg.analysis.run_tables import MapKind, Run
from xaiseg.report.html.findings import DIFFERS, HOLDS, OPEN, PLAIN, findings, side
from xaiseg.report.html.material import Material

KIND = MapKind("smoothgrad", "SmoothGrad", "Δlogit", ("FLAIR", "T1w"))


def material(method=KIND, records=None, **tables):
    lesions = {"patient": np.array(["a", "b"]), "group": np.array(["TP", "FP"])}
    lesions |= {method.column(c, "minimum"): np.array([-1.0, -1.0]) for c in method.channels}
    run = Run(Path("out"), lesions, [], (method,), {"model": {}})
    return Material(run, lesions, tables, {"analysis": {}, **(records or {})}, [], {}, {})


def modality(ratio, low, high, p=0.001, pair=("FLAIR", "T1w")):
    return {
        "method": "smoothgrad", "group": "all", "quantity": "peak", "channel_a": pair[0], "channel_b": pair[1], "n": 40.0,
        "ratio": ratio,        "ratio_low": low, "ratio_high": high, "larger_a": 0.9, "p_clustered_holm": p,
    }  # fmt: skip


def comparison(delta, low, high, p=0.01, groups=("TP", "FP")):
    return {
        "method": "smoothgrad", "channel": "FLAIR", "measure": "peak", "group_a": groups[0], "group_b": groups[1],
        "cliffs_delta": delta,        "delta_low": low, "delta_high": high, "p_clustered_holm": p, "p_naive_holm": 1e-9,
    }  # fmt: skip


def test_the_side_of_an_interval():
    assert [
        side(0.1, 0.3),
        side(-0.3, -0.1),
        side(-0.1, 0.1),
        side(1.2, 2, 1.0),
        side(np.nan, np.nan),
        side(None, 1),
    ] == [1, -1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (modality(2.5, 2.0, 3.0), HOLDS),
        (modality(0.5, 0.4, 0.6), DIFFERS),
        (modality(1.1, 0.9, 1.3), OPEN),
        (modality(2.5, 2.0, 3.0, p=0.3), OPEN),
        (modality(2.5, np.nan, np.nan, p=np.nan), OPEN),
        (modality(0.5, 0.4, 0.6, pair=("T1w", "FLAIR")), HOLDS),
        (modality(2.5, 2.0, 3.0, pair=("T2", "PD")), PLAIN),
    ],
)
def test_flair_over_t1w(row, verdict):
    (found,) = findings(material(modality=[row]))
    assert found.verdict == verdict
    assert f"The peak of {row['channel_a']} is {row['ratio']:.2f}" in found.text
    assert ("no interval" in found.text) == np.isnan(row["ratio_low"])


@pytest.mark.parametrize(
    ("row", "said", "verdict"),
    [
        (
            comparison(0.4, 0.2, 0.6),
            "is higher in TP than in FP: Cliff's delta 0.40 (0.20 to 0.60), p 0.01 clustered",
            HOLDS,
        ),
        (comparison(-0.4, -0.6, -0.2), "is lower in TP than in FP", DIFFERS),
        (comparison(0.1, -0.1, 0.3), "does not clearly differ between TP and FP", OPEN),
        (comparison(0.4, 0.2, 0.6, p=0.2), "does not clearly differ between TP and FP", OPEN),
        (comparison(np.nan, np.nan, np.nan), "too few lesions", OPEN),
    ],
)
def test_tp_over_fp(row, said, verdict):
    (found,) = findings(material(comparisons=[row]))
    assert said in found.text
    assert found.verdict == verdict


def test_of_the_groups_neighbours_are_compared():
    pairs = [("TP", "FP"), ("TP", "FN"), ("TP", "TN"), ("FP", "FN"), ("FP", "TN"), ("FN", "TN")]
    found = findings(material(comparisons=[comparison(0.4, 0.2, 0.6, groups=pair) for pair in pairs]))
    assert [f.text.split(" is higher in ")[1].split(":")[0] for f in found] == [
        "TP than in FP",
        "FP than in FN",
        "FN than in TN",
    ]
    without_fn = [pair for pair in pairs if "FN" not in pair]
    found = findings(material(comparisons=[comparison(0.4, 0.2, 0.6, groups=pair) for pair in without_fn]))
    assert [f.text.split(" is higher in ")[1].split(":")[0] for f in found] == ["TP than in FP", "FP than in TN"]


def profile(means, width=0.01, patients=9.0, channel="FLAIR"):
    return [
        {"method": "smoothgrad", "group": "TP", "channel": channel, "from_mm": float(n - 2), "to_mm": float(n - 1), "mean": m,
         "low": m - width, "high": m + width, "lesions": 30.0, "patients": patients} for n, m in enumerate(means)
    ]  # fmt: skip


def test_the_sign_of_the_profile():
    (found,) = findings(material(profiles=profile([0.5, 0.4, 0.1, 0.05, -0.005, -0.1, -0.2])))
    assert "saliency of TP on FLAIR is positive" in found.text
    assert "negative from 2 mm on, clearly so in 2 of 5 bins" in found.text
    assert found.verdict == OPEN  # in fewer than half of them
    (found,) = findings(material(profiles=profile([0.5, 0.4, 0.1, 0.05, -0.1, -0.1, -0.2])))
    assert found.verdict == HOLDS
    (found,) = findings(material(profiles=profile([0.5, 0.4, 0.1, 0.05])))
    assert "its mean is nowhere negative" in found.text
    assert found.verdict == DIFFERS
    (found,) = findings(material(profiles=profile([-0.5, -0.4, 0.1, 0.05])))
    assert found.verdict == DIFFERS
    (found,) = findings(material(profiles=profile([0.5, 0.4, 0.1, -0.2], patients=4.0)))
    assert found.verdict == OPEN


def error(name, features, auroc, gain):
    row = {
        "model": name,
        "features": features,
        "n_tp": 30.0,
        "n_fp": 20.0,
        "patients": 12.0,
        "ppv_before": 0.6,
        "ppv_after": 0.8,
    }
    row |= {"f1_before": 0.7, "f1_after": 0.75, "auroc": auroc, "auroc_low": auroc - 0.05, "auroc_high": auroc + 0.05}
    return row | {"f1_gain": gain, "f1_gain_low": gain - 0.02, "f1_gain_high": gain + 0.02}


def test_errors():
    rows = [error("logistic", 14.0, 0.85, 0.05), error("mean_probability", 1.0, 0.9, 0.05)]
    (found,) = findings(material(error_detection=rows))
    assert "AUROC of 0.85 (0.80 to 0.90)" in found.text
    assert "PPV from 0.60 to 0.80 and F1 from 0.70 to 0.75" in found.text
    assert "alone: AUROC 0.90 (0.85 to 0.95)" in found.text
    assert found.verdict == HOLDS
    assert findings(material(error_detection=[error("logistic", 14.0, 0.85, 0.0)]))[0].verdict == OPEN
    assert findings(material(error_detection=[error("logistic", 14.0, 0.85, -0.05)]))[0].verdict == DIFFERS


def context(detected, level, patients=9.0):
    names = {"detected_50_mm": (0.0, 0.0, 0.0), "detected_90_mm": detected, "level_off_mm": level}
    return [
        {"measure": m, "estimate": e, "low": a, "high": b, "lesions": 20.0, "patients": patients} for m, (e, a, b) in names.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("detected", "level", "verdict"),
    [
        ((7.1, 6.0, 8.0), (13.0, 12.0, 14.0), HOLDS),
        ((3.5, 0.0, 5.3), (13.0, 12.0, 14.0), DIFFERS),
        ((5.5, 3.0, 7.5), (13.0, 12.0, 14.0), OPEN),
        ((7.1, 6.0, 8.0), (np.nan, np.nan, np.nan), DIFFERS),
        ((7.1, 6.0, np.inf), (20.0, 14.0, np.inf), OPEN),
    ],
)
def test_context(detected, level, verdict):
    (found,) = findings(material(context_summary=context(detected, level)))
    assert "Half are detected with none of it" in found.text
    assert f"90 % are detected from {detected[0]:.1f} mm on ({detected[1]:.1f} to " in found.text
    assert ("beyond what was tried" in found.text) == np.isinf(detected[2])
    assert found.verdict == verdict
    assert findings(material(context_summary=context(detected, level, 3.0)))[0].verdict == OPEN


def test_experiments():
    inserted = [
        {
            "series": "FLAIR alone",
            "diameter_mm": "all",
            "measure": "detected_50",
            "estimate": 3.0,
            "low": 2.5,
            "high": np.inf,
        },
        {
            "series": "T1w alone",
            "diameter_mm": "all",
            "measure": "detected_50",
            "estimate": np.nan,
            "low": np.nan,
            "high": np.nan,
        },
        {"series": "T1w alone", "diameter_mm": 4.0, "measure": "detected_50", "estimate": 1.0, "low": 1.0, "high": 1.0},
    ]
    filled = [
        {"role": "filled", "before_mean_probability": p, "after_mean_probability": 0.1, "after_detected": d}
        for p, d in ((0.8, 0.0), (0.6, 1.0))
    ]
    gain = {"gain": 0.2, "gain_low": 0.1, "gain_high": 0.3}
    sanity = [
        {"explainer": "smoothgrad", "measure": "insertion_blur", **gain},
        {"explainer": "smoothgrad", "measure": "deletion_road", "gain": 0.1, "gain_low": -0.1, "gain_high": 0.3},
        {"explainer": "smoothgrad", "measure": "deletion_road_drop", **gain},
        {"explainer": "edges", "measure": "insertion_blur", **gain},
        {"explainer": "gradient", "measure": "insertion_blur", **gain},
    ]
    records = {"synthetic": {"settings": {"unit": "spread"}}}
    texts = [
        f.text
        for f in findings(
            material(KIND, records, synthetic_summary=inserted, counterfactual=filled, sanity_summary=sanity)
        )
    ]
    assert texts == [
        "Contrast from which half of the inserted lesions are detected (in standard deviations of the tissue around): "
        "FLAIR alone 3.00 (2.50 to beyond); T1w alone none that was tried.",
        "Filled with normal-appearing tissue, the mean probability of 2 lesions goes from 0.70 to 0.10 (medians); "
        "1 of them are still detected.",
        "smoothgrad beats a random order in insertion by blur, not clearly in deletion by ROAD; a mere edge detector does so in "
        "1 of 1, so that these alone prove little.",
    ]


def test_nothing_is_said_of_nothing():
    assert findings(material()) == []
