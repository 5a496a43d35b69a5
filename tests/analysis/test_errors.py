"""Error detection: thresholds and counts against loops, folds by patient, and what is found in simulated cohorts."""

import numpy as np
import pytest
from simulated_run import lesions, write_run

from xaiseg.analysis import errors
from xaiseg.analysis.errors import Counts, Features, best_threshold, cross_validated, detect_errors
from xaiseg.analysis.run_tables import read_run
from xaiseg.errors import InputError

pytest.importorskip("sklearn")


def counts(patients, true=0, false=0, missed=2):
    return Counts(*(np.full(patients, n) for n in (true, false, missed)))


def f1(kept, true, more_true, more_false, missed):
    hits, false = (kept & true).sum() + more_true, (kept & ~true).sum() + more_false
    return 2 * hits / (2 * hits + false + missed + (true & ~kept).sum())


@pytest.mark.parametrize("seed", range(6))
def test_best_threshold_is_that_of_a_loop(seed):
    """Over every threshold that changes anything, with ties; of equals the lowest, which rejects least."""
    rng = np.random.default_rng(seed)
    scores, true = rng.integers(0, 8, 25) / 8, rng.random(25) < 0.5
    others = tuple(rng.integers(0, 9, 3).tolist())
    tried = [-np.inf, *np.unique(scores)]
    values = [f1(scores >= t, true, *others) for t in tried]
    best = tried[int(np.argmax(np.round(values, 12)))]
    found = best_threshold(scores, true, *others)
    np.testing.assert_array_equal(scores >= found, scores >= best)


def test_nothing_is_rejected_where_that_only_costs():
    assert best_threshold(np.array([0.1, 0.9]), np.array([True, True]), 0, 0, 0) == -np.inf
    assert best_threshold(np.array([0.1, 0.9]), np.array([False, True]), 0, 0, 0) == 0.5


def test_no_patient_is_judged_by_a_model_that_saw_it():
    """The judge tells which patients it was given: never one of those it judges, inside and outside."""
    patients = np.repeat(np.arange(11), 3)
    true = np.arange(33) % 2 == 0
    seen = []

    def judge(values, _, judged):
        seen.append((set(values[:, 0]), set(judged[:, 0])))
        return np.zeros(len(judged))

    cross_validated(patients[:, None].astype(float), true, patients, counts(11), judge)
    assert len(seen) == 5 * (4 + 1)
    assert all(not fitted & judged for fitted, judged in seen)
    outer = [judged for fitted, judged in seen if len(fitted | judged) == 11]
    assert sorted(patient for judged in outer for patient in judged) == list(range(11))


def test_thresholds_are_chosen_without_the_patient():
    """Making one patient's lesions absurd changes no decision about it: its folds did not see it."""
    rng = np.random.default_rng(0)
    patients, true = np.repeat(np.arange(10), 6), rng.random(60) < 0.5
    values = (true + rng.standard_normal(60))[:, None]
    before = cross_validated(values, true, patients, counts(10), None)
    flipped = np.where(patients == 3, ~true, true)
    after = cross_validated(values, flipped, patients, counts(10), None)
    mine = patients == 3
    np.testing.assert_array_equal(before.kept[mine], after.kept[mine])
    np.testing.assert_array_equal(before.scores, values[:, 0])


def test_row_counts_rejections_as_missed():
    """A feature that separates TP from FP perfectly: all FP are rejected, no TP; unscored predictions stay."""
    patients = np.repeat(np.arange(10), 4)
    true = np.arange(40) % 4 < 2
    values = np.where(true, 2.0, 1.0)[:, None]
    rows, found = detect_errors(
        Features(values, ("peak",), ("peak",)), true, patients, counts(10, 1, 1, 2), 200, models=["logistic"]
    )
    alone = rows[-1]
    assert alone["model"] == "peak"
    assert (alone["n_tp"], alone["n_fp"], alone["rejected_tp"], alone["rejected_fp"]) == (20, 20, 0, 20)
    assert (alone["auroc"], alone["auroc_low"], alone["auroc_high"]) == (1, 1, 1)
    assert (alone["ppv_before"], alone["ppv_after"]) == (30 / 60, 30 / 40)
    assert alone["f1_before"] == 2 * 30 / (2 * 30 + 30 + 20)
    assert alone["f1_after"] == 2 * 30 / (2 * 30 + 10 + 20)
    assert alone["f1_gain_low"] == pytest.approx(alone["f1_gain"])  # all patients are alike
    assert set(rows[0]) == set(errors.ERROR_COLUMNS)
    assert found["peak"].kept.tolist() == true.tolist()
    assert rows[0]["rejected_fp"] == 20  # logistic regression finds it too


def test_auroc_is_that_of_scikit_learn_with_ties():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    patients, true = rng.integers(0, 12, 90), rng.random(90) < 0.4
    values = np.round(rng.standard_normal((90, 2)) + true[:, None])
    rows, found = detect_errors(
        Features(values, ("a", "b"), ("a", "b")), true, patients, counts(12), 50, models=["logistic"]
    )
    for row in rows:
        assert row["auroc"] == pytest.approx(roc_auc_score(true, found[row["model"]].scores))
    assert rows[0]["auroc"] > max(rows[1]["auroc"], rows[2]["auroc"]) - 0.05  # two features say more than one


def test_nothing_to_find_is_not_found():
    """Noise that differs between patients, who differ in their share of TP: no model does better than chance, by 4 standard errors.

    Folds by lesion would find much: who the patient is gives the group away.
    """
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(40), 6)
    true = rng.random(240) < rng.uniform(0, 1, 40)[patients]
    values = rng.standard_normal((40, 3))[patients] + 0.02 * rng.standard_normal((240, 3))
    rows, _ = detect_errors(Features(values, ("a", "b", "c"), ()), true, patients, counts(40), 100)
    for row in rows:
        assert abs(row["auroc"] - 0.5) < 2 * (row["auroc_high"] - row["auroc_low"])
        assert row["auroc"] < 0.65
    naive = cross_validated(values, true, np.arange(240), counts(240), errors.MODELS["boosting"]).scores
    assert (1 + np.sign(naive[true][:, None] - naive[~true]).mean()) / 2 > 0.7


def test_interval_of_auroc_covers():
    """Of a single feature the true AUROC is known: Φ(1/√(2·(1 + 0.5²))) = 0.737 for a shift of 1, noise of 1 and patients of 0.5.

    Intervals of 150 cohorts of 30 patients hold it in 95 %, less 2 % for percentiles of few patients, within 4 standard errors.
    """
    from scipy.stats import norm

    from xaiseg.analysis.clustered import clustered_effect

    rng, cohorts, held = np.random.default_rng(3), 150, 0
    truth = norm.cdf(1 / np.sqrt(2 * (1 + 0.25)))
    patients = np.repeat(np.arange(30), 8)
    for n in range(cohorts):
        true = rng.random(240) < rng.uniform(0.2, 0.8, 30)[patients]
        values = true + (0.5 * rng.standard_normal(30))[patients] + rng.standard_normal(240)
        _, low, high, _ = clustered_effect(values[true], values[~true], patients[true], patients[~true], 200, n)
        held += (1 + low) / 2 <= truth <= (1 + high) / 2
    assert abs(held / cohorts - 0.95) < 4 * np.sqrt(0.95 * 0.05 / cohorts) + 0.02


def test_features_of_a_run(tmp_path):
    """Look-alikes of lower saliency: the classifiers find them, PPV rises much and F1 does not fall; unknown figures are filled."""
    rows = lesions(np.random.default_rng(4), 24, {"TP": 2.0, "FP": 1.0}, each=4, spread=0.2)
    rows[3]["smoothgrad_FLAIR_mean_ring"] = "n/a"
    run = read_run(write_run(tmp_path / "out", rows))
    features = errors.saliency_features(run.lesions, run.methods)
    assert len(features.names) == 6 * 2 + 2
    assert features.alone == ("smoothgrad_FLAIR_peak", "smoothgrad_T1w_peak", "volume_mm3", "mean_probability")
    patients = np.unique(run.lesions["patient"], return_inverse=True)[1]
    rows, _ = detect_errors(features, run.lesions["group"] == "TP", patients, counts(24), 200)
    found = {row["model"]: row for row in rows}
    for name in ("logistic", "boosting", "smoothgrad_FLAIR_peak"):
        assert found[name]["auroc_low"] > 0.85
        assert found[name]["ppv_gain_low"] > 0.2
        assert found[name]["f1_gain_low"] > 0
    assert found["volume_mm3"]["auroc_low"] < 0.5 < found["volume_mm3"]["auroc_high"]


def test_what_cannot_be_told_apart():
    features = Features(np.zeros((6, 1)), ("peak",), ())
    true = np.array([True, True, False, False, False, False])
    with pytest.raises(InputError, match=r"2 TP of 2 patients, expected 3 or more of at least 2"):
        detect_errors(features, true, np.arange(6), counts(6))
    with pytest.raises(InputError, match="no model forest, expected some of logistic, boosting"):
        detect_errors(features, true, np.arange(6), counts(6), models=["forest"])
    with pytest.raises(InputError, match=r"4 FP of 1 patients|3 TP of 1 patients"):
        detect_errors(features, np.array([True] * 3 + [False] * 3), np.array([0, 0, 0, 0, 1, 2]), counts(3))


def test_missing_scikit_learn(monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"scikit-learn, which is missing: pip install 'xaiseg\[analysis\]'"):
        errors.check_scikit_learn()
