"""Radiomic features: handed over as they should be, so that MIRP's values are those of loops over the lesion's voxels."""

import itertools

import numpy as np
import pytest
from simulated_run import lesions, write_run

from xaiseg._types import Instance
from xaiseg.analysis import analyse as module
from xaiseg.analysis.analyse import analyse
from xaiseg.analysis.radiomics import Radiomics, lesion_radiomics, radiomic_features
from xaiseg.analysis.run_tables import read_run
from xaiseg.errors import InputError
from xaiseg.imaging import Grid

SPACING = (1.0, 1.5, 3.0)


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("mirp")
    rng = np.random.default_rng(0)
    image = rng.standard_normal((16, 15, 12, 2)).astype(np.float32)
    near = ((np.indices(image.shape[:3]).T - (7, 7, 5)) ** 2).sum(-1).T <= 8
    instance = Instance(3, np.argwhere(near & (rng.random(near.shape) < 0.9)).astype(np.int32))
    return image, instance, lesion_radiomics(image, Grid(image.shape[:3], np.diag([*SPACING, 1])), instance, ("A", "B"))


def test_first_order_statistics_and_volume(found):
    image, instance, row = found
    assert row["morph_vol_approx"] == pytest.approx(len(instance.voxels) * np.prod(SPACING))
    for c, name in enumerate("AB"):
        x = image[tuple(instance.voxels.T)][:, c].astype(float)
        expected = {"mean": x.mean(), "var": x.var(), "min": x.min(), "max": x.max(), "p90": np.percentile(x, 90)}
        expected |= {"energy": (x**2).sum(), "skew": ((x - x.mean()) ** 3).mean() / x.std() ** 3}
        for measure, value in expected.items():
            # MIRP takes percentiles of the nearest rank, and float32
            assert row[f"{name}_stat_{measure}"] == pytest.approx(value, rel=0.1 if measure == "p90" else 1e-5)


def test_co_occurrence_is_that_of_a_loop(found):
    """Contrast and joint entropy of 16 levels, all 13 directions in one symmetric matrix (IBSI's 3-D, merged)."""
    image, instance, row = found
    x = image[tuple(instance.voxels.T)][:, 1].astype(float)
    levels = np.minimum((16 * (x - x.min()) / (x.max() - x.min())).astype(int), 15)
    level = {tuple(v): n for v, n in zip(instance.voxels.tolist(), levels.tolist(), strict=True)}
    counts = np.zeros((16, 16))
    for place, n in level.items():
        for step in itertools.product((-1, 0, 1), repeat=3):
            other = tuple(a + b for a, b in zip(place, step, strict=True))
            if any(step) and other in level:
                counts[n, level[other]] += 1
    p = counts / counts.sum()
    i, j = np.indices(p.shape)
    assert row["B_cm_contrast_d1_3d_v_mrg_fbn_n16"] == pytest.approx((p * (i - j) ** 2).sum(), rel=1e-6)
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert row["B_cm_joint_entr_d1_3d_v_mrg_fbn_n16"] == pytest.approx(entropy, rel=1e-6)


def test_features_of_a_run_are_in_the_order_of_its_lesions(finished):
    pytest.importorskip("mirp")
    run = read_run(finished.out)
    values, names = radiomic_features(run)
    assert values.shape == (len(run), len(names))
    volume = values[:, names.index("morph_vol_approx")]
    np.testing.assert_allclose(volume, run.lesions["volume_mm3"], rtol=1e-5)


def test_models_of_radiomics_and_of_both_stand_beside_saliency(tmp_path, monkeypatch):
    """Radiomics that are the truth find every error, alone and with saliency; pure noise finds none."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(1)
    out = write_run(tmp_path / "run", lesions(rng, 12, {"TP": 1.5, "FP": 1.4}))
    given = []

    def features(run, source):
        given.append(source)
        truth = (run.lesions["group"] == "TP") + 0.1 * np.random.default_rng(0).standard_normal(len(run))
        return Radiomics(np.stack([truth, np.full(len(run), np.nan)], 1), ("truth", "never"))

    monkeypatch.setattr(module, "radiomic_features", features)
    monkeypatch.setattr(module, "check_mirp", lambda: None)
    tables = analyse(out, radiomics=True, source="moved", resamples=50, say=lambda _: None)
    auroc = {row["model"]: row["auroc"] for row in tables["error_detection"]}
    assert given == ["moved"]
    assert auroc["logistic, radiomics"] > 0.99
    assert auroc["logistic, both"] > 0.95
    assert auroc["logistic"] < 0.8
    assert {s["model"] for s in tables["error_scores"]} >= {"boosting", "boosting, radiomics", "boosting, both"}


def test_without_mirp_it_is_said_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("xaiseg.analysis.radiomics.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'xaiseg\[radiomics\]'"):
        analyse(tmp_path / "nothing", radiomics=True)
