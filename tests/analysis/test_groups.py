"""Tables of groups and channels, figure by figure, against numpy and scipy on a simulated cohort."""

import numpy as np
import pytest
from scipy import stats
from simulated_run import lesions, write_run

from xaiseg.analysis.clustered import clustered_effect, clustered_signed_rank, holm, mixed_model_p
from xaiseg.analysis.groups import COMPARISON_COLUMNS, GROUP_COLUMNS, compare_groups, describe_groups
from xaiseg.analysis.modality import (
    LESION_COLUMNS,
    MODALITY_COLUMNS,
    SHARE_COLUMNS,
    compare_channels,
    lesion_ratios,
    mass_shares,
)
from xaiseg.analysis.run_tables import MapKind, read_run


@pytest.fixture(autouse=True)
def without_mixed_models(request, monkeypatch):
    """They take most of the time, and have a test of their own."""
    if "mixed" not in request.node.name:
        monkeypatch.setattr("xaiseg.analysis.groups.has_mixed_models", lambda: False)


LEVELS = {"TP": 2.0, "FP": 1.5, "FN": 1.2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rows = lesions(np.random.default_rng(0), 12, LEVELS)
    rows[0]["smoothgrad_FLAIR_peak"] = "n/a"  # a TP
    return read_run(write_run(tmp_path_factory.mktemp("run") / "out", rows))


def test_groups_are_counted_and_summarised(run):
    rows = describe_groups(run.lesions, run.methods)
    assert all(list(row) == list(GROUP_COLUMNS) for row in rows)
    assert len(rows) == 6 * 2 * 3
    row = rows[0]
    assert [row[name] for name in ("measure", "channel", "group")] == ["peak", "FLAIR", "TP"]
    values = run.lesions["smoothgrad_FLAIR_peak"][run.lesions["group"] == "TP"]
    assert (row["n"], row["undefined"], row["patients"]) == (35, 1, 12)
    assert [row["q1"], row["median"], row["q3"]] == pytest.approx(np.nanquantile(values, [0.25, 0.5, 0.75]))


def test_comparisons_are_those_of_their_parts(run):
    rows = compare_groups(run.lesions, run.methods, 100, 3)
    assert all(set(row) <= set(COMPARISON_COLUMNS) for row in rows)
    assert len(rows) == 6 * 2 * 3
    row = next(r for r in rows if (r["measure"], r["channel"], r["group_b"]) == ("minimum", "T1w", "FN"))
    assert row["group_a"] == "TP"
    values, group, patient = (run.lesions[c] for c in ("smoothgrad_T1w_minimum", "group", "patient"))
    a, b = group == "TP", group == "FN"
    naive = stats.mannwhitneyu(values[a], values[b])
    assert (row["u"], row["p_naive"]) == (naive.statistic, naive.pvalue)
    effect = clustered_effect(values[a], values[b], patient[a], patient[b], 100, 3)
    assert (row["cliffs_delta"], row["delta_low"], row["delta_high"], row["p_clustered"]) == effect
    assert row["cliffs_delta"] < 0  # minima are lower where peaks are higher
    family = [r for r in rows if r["measure"] == "minimum"]
    assert len(family) == 6  # three pairs in two channels
    np.testing.assert_allclose(
        [r["p_clustered_holm"] for r in family], holm(np.array([r["p_clustered"] for r in family]))
    )


def test_mixed_models_stand_beside_them(run):
    pytest.importorskip("statsmodels")
    part = run.chosen(run.lesions["group"] != "FN")
    values, group, patient = (part.lesions[c] for c in ("smoothgrad_FLAIR_peak", "group", "patient"))
    row = compare_groups(part.lesions, run.methods, 20)[0]
    sides = [(group == g) & np.isfinite(values) for g in ("TP", "FP")]
    expected = mixed_model_p(*(values[s] for s in sides), *(patient[s] for s in sides))
    assert row["p_mixed"] == expected < 0.01
    assert row["p_mixed_holm"] >= expected


def test_few_lesions_and_one_patient_are_not_tested(run):
    few = run.chosen((run.lesions["group"] != "FN") | (run.lesions["patient"] == "00") & (run.lesions["lesion"] < 5))
    rows = compare_groups(few.lesions, run.methods, 50)
    row = next(r for r in rows if r["group_b"] == "FN")
    assert row["n_b"] == 1
    assert "p_naive" not in row
    assert np.isnan(row["p_naive_holm"])
    one = run.chosen(run.lesions["patient"] == "03")
    row = compare_groups(one.lesions, run.methods, 50)[0]
    assert np.isfinite(row["p_naive"])
    assert np.isnan([row["p_clustered"], row["p_clustered_holm"], row["delta_low"]]).all()


def test_channels_within_lesions(run):
    rows = compare_channels(run.lesions, run.methods, 200)
    assert all(set(row) <= set(MODALITY_COLUMNS) for row in rows)
    assert [row["group"] for row in rows] == ["all", "TP", "FP", "FN"] * 2
    called = np.isin(run.lesions["group"], ["TP", "FP"])
    a, b = (
        run.lesions[f"smoothgrad_{c}_positive_mass"] - run.lesions[f"smoothgrad_{c}_negative_mass"]
        for c in ("FLAIR", "T1w")
    )
    a, b = a[called], b[called]
    row = rows[4]
    assert (row["quantity"], row["n"], row["patients"], row["larger_a"]) == ("mass", 72, 12, 1)
    assert row["ratio"] == pytest.approx(np.median(a / b))
    assert row["ratio_low"] < 3.0 < row["ratio_high"]  # as simulated
    assert row["p_clustered"] == clustered_signed_rank(a - b, run.lesions["patient"][called])
    assert row["p_clustered"] == 2 / 2**12  # all lesions of 12 patients are of one sign
    assert row["p_clustered_holm"] == 4 * row["p_clustered"]


def test_shares_and_ratios_of_lesions(run):
    masses = [
        run.lesions[f"smoothgrad_{c}_positive_mass"] - run.lesions[f"smoothgrad_{c}_negative_mass"]
        for c in ("FLAIR", "T1w")
    ]
    share = masses[0] / (masses[0] + masses[1])
    rows = mass_shares(run.lesions, run.methods, 50)
    assert all(list(row) == list(SHARE_COLUMNS) for row in rows)
    fn = {row["channel"]: row["share"] for row in rows if row["group"] == "FN"}
    assert fn["FLAIR"] == pytest.approx(np.median(share[run.lesions["group"] == "FN"]))
    assert fn["FLAIR"] + fn["T1w"] == pytest.approx(1)
    ratios = list(lesion_ratios(run.lesions, run.methods))
    assert len(ratios) == len(run)
    assert set(ratios[5]) == set(LESION_COLUMNS)
    assert ratios[5]["mass_ratio"] == pytest.approx(masses[0][5] / masses[1][5])
    assert ratios[5]["mass_share"] == pytest.approx(share[5])
    assert np.isnan(ratios[0]["peak_ratio"])


def test_any_number_of_channels():
    """Three channels have three pairs; a method with one map channel of its own name has none, and its columns no channel."""
    rng = np.random.default_rng(1)
    three = MapKind("vargrad", "", "", ("A", "B", "C"))
    one = MapKind("gradcam", "", "", ("gradcam",))
    columns = {m.column(c, q): rng.uniform(1, 2, 9) for m in (three, one) for c in m.channels
               for q in ("peak", "minimum", "mean_inside", "mean_ring", "positive_mass", "negative_mass")}  # fmt: skip
    assert "gradcam_peak" in columns
    table = columns | {"group": np.array(["TP", "FP", "FN"] * 3), "patient": np.repeat(list("abc"), 3)}
    rows = compare_channels(table, (three, one), 50)
    assert {(row["channel_a"], row["channel_b"]) for row in rows} == {("A", "B"), ("A", "C"), ("B", "C")}
    shares = {row["channel"]: row for row in mass_shares(table, (three, one), 50) if row["group"] == "all"}
    assert list(shares) == ["A", "B", "C"]
    assert len(compare_groups(table, (three, one), 50)) == 6 * 3 * (3 + 1)


def test_a_peak_that_is_not_positive_has_no_ratio():
    table = {f"m_{c}_{q}": np.array(v) for c, v in (("A", [2.0, 1, -1]), ("B", [1.0, -1, -2]))
             for q in ("peak", "positive_mass")}  # fmt: skip
    table |= {f"m_{c}_negative_mass": np.zeros(3) for c in "AB"}
    table |= {"group": np.array(["TP"] * 3), "patient": np.array(list("abc"))}
    row = compare_channels(table, [MapKind("m", "", "", ("A", "B"))], 50)[0]
    assert (row["n"], row["undefined"], row["ratio"], row["larger_a"]) == (3, 2, 2, 1)
