"""Clustered comparisons against loops, scipy and statsmodels, and their error rates and power on simulated cohorts."""

import numpy as np
import pytest
from scipy import stats

from xaiseg.analysis.clustered import (
    clustered_effect,
    clustered_median,
    clustered_signed_rank,
    holm,
    mixed_model_p,
    pair_signs,
)

# In standard deviations within patients; where patients vary as much, delta = 2Φ(0.4) - 1 = 0.31. The paper gives no effect sizes,
# only p < 0.001 for all pairs in 687 patients.
SHIFT = 0.8


def cohort(rng, patients, shift=0.0, spread=1.0):
    """Lesions of two groups: 1 + Poisson(7) a patient, alike within it (correlation 0.5), a uniform share of them of group a."""
    of = np.repeat(np.arange(patients), 1 + rng.poisson(7, patients))
    first = rng.random(len(of)) < rng.uniform(0, 1, patients)[of]
    values = (spread * rng.standard_normal(patients))[of] + rng.standard_normal(len(of)) + shift * first
    return values[first], values[~first], of[first], of[~first]


def test_holm_is_that_of_statsmodels_and_leaves_out_what_is_unknown():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.array([0.01, 0.2, 0.01, 0.8, 0.04, 0.003])
    np.testing.assert_allclose(holm(p), multitest.multipletests(p, method="holm")[1], rtol=1e-12)
    with_gaps = np.insert(p, [0, 3], np.nan)
    np.testing.assert_allclose(holm(with_gaps), np.insert(holm(p), [0, 3], np.nan))


def test_holm_keeps_the_error_rate_of_a_family():
    """Of families of 12 under no effect, about 5 % have any adjusted p below 0.05; without adjusting, 1 - 0.95^12 = 46 % do."""
    families = np.random.default_rng(0).uniform(size=(2000, 12))
    rate = np.mean([holm(p).min() < 0.05 for p in families])
    assert abs(rate - (1 - (1 - 0.05 / 12) ** 12)) < 4 * np.sqrt(0.05 * 0.95 / 2000)
    assert (families.min(1) < 0.05).mean() > 0.4


def test_signs_of_pairs_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr("xaiseg.analysis.clustered._BLOCK", 20)  # several blocks
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, 11).astype(float), rng.integers(0, 5, 9).astype(float)
    of_a, of_b = rng.integers(0, 4, 11), rng.integers(0, 4, 9)
    expected = np.zeros((4, 4))
    for i, p in zip(a, of_a, strict=True):
        for j, q in zip(b, of_b, strict=True):
            expected[p, q] += np.sign(i - j)
    np.testing.assert_array_equal(pair_signs(a, b, of_a, of_b, 4), expected)


def test_delta_is_the_rank_biserial_correlation():
    """2U/(n_a n_b) - 1, with ties, from scipy's U."""
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 9, 30).astype(float), rng.integers(2, 11, 25).astype(float)
    u = stats.mannwhitneyu(a, b).statistic
    found = clustered_effect(a, b, rng.integers(0, 9, 30), rng.integers(0, 9, 25), 50)
    assert found.delta == pytest.approx(2 * u / (30 * 25) - 1)


def test_jackknife_and_bootstrap_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    a, b, of_a, of_b = cohort(rng, 8, 0.5)

    def delta(patients):
        x = np.concatenate([a[of_a == p] for p in patients])
        y = np.concatenate([b[of_b == p] for p in patients])
        return np.sign(x[:, None] - y).mean()

    found = clustered_effect(a, b, of_a, of_b, 200, 5)
    without = np.array([delta([q for q in range(8) if q != p]) for p in range(8)])
    error = np.sqrt(7 / 8 * ((without - without.mean()) ** 2).sum())
    assert found.p == pytest.approx(2 * stats.t.sf(abs(delta(range(8))) / error, 7))
    drawn = np.random.default_rng(5).integers(0, 8, (200, 8))  # as `resample_weights` draws
    low, high = np.quantile([delta(patients) for patients in drawn], [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high))


def test_few_patients_cannot_show_much():
    of = np.repeat(np.arange(4), 5)
    low, high = np.linspace(0, 1, 20), np.linspace(2, 3, 20)
    found = clustered_effect(high, low, of, of, 100)
    assert found.delta == 1
    assert found.p == 1 / 8  # 2^(1-4): of 16 exchanges of groups within patients two are as extreme
    one = clustered_effect(high, low, np.zeros(20, int), np.zeros(20, int), 100)
    assert one.delta == 1
    assert np.isnan(one[1:]).all()
    of_one = clustered_effect(high, low, np.zeros(20, int), of, 100)
    assert np.isnan(of_one.p)  # nobody knows how group a varies between patients


def rates(patients, shift, cohorts, seed, mixed_every=0):
    """Shares of cohorts with p < 0.05: naive, clustered, mixed; and those whose interval holds the true delta of no effect."""
    rng = np.random.default_rng(seed)
    hits, mixed = np.zeros(3), []
    for n in range(cohorts):
        a, b, of_a, of_b = cohort(rng, patients, shift)
        effect = clustered_effect(a, b, of_a, of_b, 300, n)
        hits += stats.mannwhitneyu(a, b).pvalue < 0.05, effect.p < 0.05, effect.low <= 0 <= effect.high
        if mixed_every and n % mixed_every == 0:
            mixed.append(mixed_model_p(a, b, of_a, of_b) < 0.05)
    return (*hits / cohorts, np.mean(mixed) if mixed else np.nan, len(mixed))


def bound(rate, n):
    """4 binomial standard errors."""
    return 4 * np.sqrt(rate * (1 - rate) / n)


@pytest.mark.parametrize("patients", [20, 40])
def test_nominal_error_rate_with_clustered_lesions_and_no_effect(patients):
    """The naive test rejects 17 to 21 %, the clustered ones about 5 %.

    Tolerances: 4 binomial standard errors, and 1.5 % for what Student's t lacks with few patients (measured over 2000 cohorts:
    5.6 % for 6, 6.7 % for 10, 5.7 % for 20, 5.8 % for 40, 4.7 % for 100); 2 % for percentiles of 20 patients.
    """
    cohorts = 300
    naive, clustered, covered, *_ = rates(patients, 0.0, cohorts, seed=patients)
    assert naive > 0.05 + bound(0.05, cohorts) + 0.03
    assert abs(clustered - 0.05) < bound(0.05, cohorts) + 0.015
    assert abs(covered - 0.95) < bound(0.05, cohorts) + 0.02


@pytest.mark.slow
def test_mixed_model_keeps_the_nominal_rate_too():
    pytest.importorskip("statsmodels")
    *_, mixed, n = rates(20, 0.0, 400, seed=4, mixed_every=1)
    assert abs(mixed - 0.05) < bound(0.05, n)


def test_power_where_groups_differ():
    """Measured over 60 cohorts: clustered 87 % with 40 patients and 100 % with 80; of half the shift 28, 65 and (160) 88 %."""
    naive, clustered, *_ = rates(94, SHIFT, 20, seed=5)
    assert naive == 1
    assert clustered > 0.9


def test_all_pairs_of_the_papers_cohort():
    """687 patients, four groups a shift apart: every clustered p-value is below 0.001, as the paper reports of naive ones."""
    rng = np.random.default_rng(6)
    of = np.repeat(np.arange(687), 8)
    group = rng.integers(0, 4, len(of))
    values = rng.standard_normal(687)[of] + rng.standard_normal(len(of)) - SHIFT * group
    for a in range(4):
        for b in range(a + 1, 4):
            sides = group == a, group == b
            found = clustered_effect(*(values[s] for s in sides), *(of[s] for s in sides), 50)
            assert found.p < 1e-3
            assert found.low > 0


def test_mixed_model_is_the_balanced_analysis_of_variance():
    """Where every patient has as many lesions of both groups, the model's test is that of the difference within patients.

    In a balanced design with a random intercept, REML gives `t = d/√(2 s²/n)` with s² the residual mean square, and the Wald test
    takes t for normal.
    """
    pytest.importorskip("statsmodels")
    rng = np.random.default_rng(6)
    of = np.repeat(np.arange(12), 5)
    base = 3 * rng.standard_normal(12)[of]
    a, b = base + rng.standard_normal(60) + 0.5, base + rng.standard_normal(60)
    ranks = stats.rankdata(np.concatenate([a, b])) / 120
    group, patient = np.repeat([1.0, 0.0], 60), np.concatenate([of, of])
    design = np.concatenate([group[:, None], np.eye(12)[patient]], 1)
    fitted, residual, *_ = np.linalg.lstsq(design, ranks)
    t = fitted[0] / np.sqrt(residual[0] / (120 - 13) * 2 / 60)
    # the optimiser stops within 1e-3 of t
    assert mixed_model_p(a, b, of, of) == pytest.approx(2 * stats.norm.sf(abs(t)), rel=0.02)


def test_signed_rank_with_one_lesion_a_patient_is_wilcoxons():
    d = np.array([1.2, -0.3, 2.0, 0.7, -1.1, 0.4, 3.1, 0.9, 1.5])
    assert clustered_signed_rank(d, np.arange(9)) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue)
    many = np.random.default_rng(7).standard_normal(60) + 0.2
    expected = stats.wilcoxon(many, method="asymptotic", correction=False).pvalue
    assert clustered_signed_rank(many, np.arange(60)) == pytest.approx(expected)


def test_signed_rank_changes_the_signs_of_a_patient_together():
    """Against a loop over all changes of sign; zeros are left out."""
    rng = np.random.default_rng(8)
    d, of = np.append(rng.standard_normal(15) + 0.5, 0.0), np.append(np.repeat(np.arange(5), 3), 6)
    signed = np.sign(d) * np.append(stats.rankdata(np.abs(d[:15])), 0)
    sums = [signed[of == p].sum() for p in range(5)]
    totals = [abs(sum(s if k >> n & 1 else -s for n, s in enumerate(sums))) for k in range(32)]
    assert clustered_signed_rank(d, of) == pytest.approx(np.mean(np.array(totals) >= abs(sum(sums)) - 1e-9))
    assert np.isnan(clustered_signed_rank(d[:3], of[:3]))


@pytest.mark.parametrize("patients", [8, 30])
def test_signed_rank_keeps_its_nominal_rate_where_lesions_are_alike(patients):
    """Naive Wilcoxon rejects five times as often. For 8 patients the changes of sign are counted out, beyond 14 T is normal."""
    rng, cohorts = np.random.default_rng(9), 400
    of = np.repeat(np.arange(patients), 6)
    hits = np.zeros(2)
    for _ in range(cohorts):
        d = rng.standard_normal(patients)[of] + rng.standard_normal(len(of))
        hits += clustered_signed_rank(d, of) < 0.05, stats.wilcoxon(d).pvalue < 0.05
    assert abs(hits[0] / cohorts - 0.05) < bound(0.05, cohorts) + 0.01
    assert hits[1] / cohorts > 0.2


def test_median_and_its_resamples_are_those_of_a_loop():
    rng = np.random.default_rng(10)
    values, of = rng.integers(0, 20, 21).astype(float), rng.integers(0, 6, 21)
    drawn = np.random.default_rng(2).integers(0, 6, (100, 6))
    medians = [np.median(np.concatenate([values[of == p] for p in patients])) for patients in drawn]
    expected = (np.median(values), *np.quantile(medians, [0.025, 0.975]))
    assert clustered_median(values, of, 100, 2) == pytest.approx(expected)
    assert np.isnan(clustered_median(values, np.zeros(21, int))[1:]).all()
