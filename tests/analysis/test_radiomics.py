"""Radiomic features: handed over as they should be, so that MIRP's values are those of loops over the lesion's voxels."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from simulated_run import lesions, write_run

from xaiseg.analysis import analyse as module
from xaiseg.analysis.analyse import analyse
from xaiseg.analysis.radiomics import Radiomics, features, map_radiomics, scan_radiomics
from xaiseg.analysis.run_tables import read_run
from xaiseg.errors import InputError

SPACING = (1.0, 1.5, 3.0)


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("mirp")
    rng = np.random.default_rng(0)
    image = rng.standard_normal((16, 15, 12, 2)).astype(np.float32)
    near = ((np.indices(image.shape[:3]).T - (7, 7, 5)) ** 2).sum(-1).T <= 8
    mask = near & (rng.random(near.shape) < 0.9)
    return image, mask, features(image, mask, SPACING, ("A", "B"), shape=True)


def test_first_order_statistics_and_volume(found):
    image, mask, row = found
    assert row["morph_vol_approx"] == pytest.approx(mask.sum() * np.prod(SPACING))
    for c, name in enumerate("AB"):
        x = image[mask][:, c].astype(float)
        expected = {"mean": x.mean(), "var": x.var(), "min": x.min(), "max": x.max(), "p90": np.percentile(x, 90)}
        expected |= {"energy": (x**2).sum(), "skew": ((x - x.mean()) ** 3).mean() / x.std() ** 3}
        for measure, value in expected.items():
            # MIRP takes percentiles of the nearest rank, and float32
            assert row[f"{name}_stat_{measure}"] == pytest.approx(value, rel=0.1 if measure == "p90" else 1e-5)


def test_co_occurrence_is_that_of_a_loop(found):
    """Contrast and joint entropy of 16 levels, all 13 directions in one symmetric matrix (IBSI's 3-D, merged)."""
    image, mask, row = found
    x = image[mask][:, 1].astype(float)
    levels = np.minimum((16 * (x - x.min()) / (x.max() - x.min())).astype(int), 15)
    level = {tuple(v): n for v, n in zip(np.argwhere(mask).tolist(), levels.tolist(), strict=True)}
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


def test_features_of_scans_are_in_the_order_of_the_lesions(finished):
    pytest.importorskip("mirp")
    run = read_run(finished.out)
    values, names = scan_radiomics(run)
    assert values.shape == (len(run), len(names))
    volume = values[:, names.index("morph_vol_approx")]
    np.testing.assert_allclose(volume, run.lesions["volume_mm3"], rtol=1e-5)


def test_features_of_maps_are_of_the_lesion_grown_by_two_voxels(tiny_run):
    """Mean and largest value of each map, found again in the files voxel by voxel; a lesion without a map has none."""
    pytest.importorskip("mirp")
    run = read_run(tiny_run.out)
    gone = run.file(1, f"space-orig_desc-smoothgrad_lesion-{int(run.lesions['lesion'][1]):03d}_saliency.nii.gz")
    gone.unlink()
    notes: list[str] = []
    values, names = map_radiomics(run, notes)
    assert notes == [f"radiomics: 1 of {len(run)} lesions have no usable map of smoothgrad"]
    assert np.isnan(values[1]).all()
    number = int(run.lesions["lesion"][0])
    labels = nib.load(run.file(0, "space-orig_desc-instances_dseg.nii.gz"))
    saved = nib.load(run.file(0, f"space-orig_desc-smoothgrad_lesion-{number:03d}_saliency.nii.gz"))
    whole = np.zeros((*labels.shape, 2))
    start = np.rint(np.linalg.inv(labels.affine) @ saved.affine[:, 3])[:3].astype(int)
    whole[tuple(slice(a, a + n) for a, n in zip(start, saved.shape[:3], strict=True))] = saved.get_fdata()
    inside = [
        whole[v] for v in np.ndindex(labels.shape) if _steps(v, np.argwhere(np.asarray(labels.dataobj) == number)) <= 2
    ]
    for c, channel in enumerate(("FLAIR", "T1w")):
        for measure, expected in (("mean", np.mean(inside, 0)[c]), ("max", np.max(inside, 0)[c])):
            found = values[0, names.index(f"smoothgrad_{channel}_stat_{measure}")]
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def _steps(voxel, lesion):
    """Steps from a voxel to a lesion, each to one of 18 neighbours: changing one or two coordinates by 1."""
    apart = np.abs(lesion - voxel)
    return np.maximum(apart.max(1), -(-apart.sum(1) // 2)).min()


def test_models_of_radiomics_and_of_both_stand_beside_saliency(tmp_path, monkeypatch):
    """Radiomics that are the truth find every error, alone and with saliency; pure noise finds none."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(1)
    out = write_run(tmp_path / "run", lesions(rng, 12, {"TP": 1.5, "FP": 1.4}))
    given = []

    def of_scans(run, source):
        given.append(source)
        truth = (run.lesions["group"] == "TP") + 0.1 * np.random.default_rng(0).standard_normal(len(run))
        return Radiomics(np.stack([truth, np.full(len(run), np.nan)], 1), ("truth", "never"))

    monkeypatch.setattr(module, "scan_radiomics", of_scans)
    monkeypatch.setattr(module, "check_mirp", lambda: None)
    tables = analyse(out, radiomics=["scans"], source="moved", resamples=50, say=lambda _: None)
    auroc = {row["model"]: row["auroc"] for row in tables["error_detection"]}
    assert given == ["moved"]
    assert auroc["logistic, scans"] > 0.99
    assert auroc["logistic, all"] > 0.95
    assert auroc["logistic"] < 0.8
    assert {s["model"] for s in tables["error_scores"]} >= {"boosting", "boosting, scans", "boosting, all"}


def test_without_mirp_it_is_said_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("xaiseg.analysis.radiomics.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'xaiseg\[radiomics\]'"):
        analyse(tmp_path / "nothing", radiomics=["maps"])
