"""Lesions put into an image: contrasts in closed form, detection and saliency as of each image alone."""

import doctest
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import CHANNELS, tiny_model, volumes
from xaiseg.analysis import insertion
from xaiseg.analysis.insertion import insert_lesion, insertion_rows, insertion_summary, tissue_spread
from xaiseg.analysis.lesion_shape import ellipsoid
from xaiseg.errors import InputError
from xaiseg.imaging.normalise import zscore_nonzero
from xaiseg.inference import StitchedPredictor
from xaiseg.saliency import jacobian_rows, smoothgrad
from xaiseg.saliency.aggregators import mean

SPACING = (1.0, 0.5, 4.0)


def test_examples():
    assert doctest.testmod(insertion).failed == 0


@pytest.fixture(scope="module")
def image():
    found = volumes()
    return np.stack([zscore_nonzero(found[name], name) for name in CHANNELS], -1)


def test_what_is_added_is_the_contrast(image):
    lesion = ellipsoid(image.shape, SPACING, (12, 10, 14), (6.0, 5.0, 24.0), edge_mm=2.0)
    out = insert_lesion(image, lesion, (1.5, -0.75))
    added = out.astype(np.float64) - image
    weight = np.zeros(image.shape[:3])
    weight[lesion.box] = lesion.weight
    # float32 numbers of order 1
    np.testing.assert_allclose(added, weight[..., None] * np.array([1.5, -0.75]) * (image != 0), atol=5e-7)
    full = weight == 1
    assert full.sum() > 10
    np.testing.assert_allclose(added[full & (image != 0).all(-1)].mean(0), [1.5, -0.75], atol=1e-6)
    assert (out[(weight == 0)] == image[weight == 0]).all()
    # the mean contrast times the volume is what was put in
    assert added[..., 0].sum() * 2.0 == pytest.approx(1.5 * lesion.volume_mm3(SPACING), rel=1e-5)


def test_the_background_stays():
    image = np.zeros((12, 12, 12, 2), np.float32)
    image[6:] = 1
    lesion = ellipsoid(image.shape, (1, 1, 1), (6, 6, 6), 6.0)
    assert (insert_lesion(image, lesion, (1, 1))[:6] == 0).all()
    with pytest.raises(InputError, match="wholly in the background"):
        insert_lesion(image, ellipsoid(image.shape, (1, 1, 1), (2, 6, 6), 3.0), (1, 1))
    with pytest.raises(InputError, match="one number for each channel"):
        insert_lesion(image, lesion, (1,))


def test_spread_of_the_tissue_around():
    """Noise of known spread, other tissue and a lesion beside it left out."""
    rng = np.random.default_rng(0)
    image = (rng.normal(size=(40, 40, 20, 2)) * [0.1, 0.3] + [1, 2]).astype(np.float32)
    tissue = np.zeros(image.shape[:3], bool)
    tissue[:24] = True
    image[24:] += 5
    exclude = np.zeros(image.shape[:3], bool)
    exclude[10:16, 10:30, 5:15] = True
    image[exclude] += 5
    lesion = ellipsoid(image.shape, (1, 1, 2), (20, 20, 10), 6.0)
    found = tissue_spread(image, lesion, (1, 1, 2), tissue=tissue, exclude=exclude)
    # about 1000 voxels: a median absolute deviation is known to 4 %
    np.testing.assert_allclose(found, [0.1, 0.3], rtol=0.12)
    reach = np.linalg.norm((np.indices(image.shape[:3]).transpose(1, 2, 3, 0) - (20, 20, 10)) * (1, 1, 2), axis=-1)
    used = image[(reach > 3.6) & (reach < 10) & tissue & ~exclude]
    np.testing.assert_allclose(found, used.std(0), rtol=0.1)
    with pytest.raises(InputError, match="voxels of tissue within 8 mm"):
        tissue_spread(image, lesion, (1, 1, 2), tissue=np.zeros(image.shape[:3], bool))


@pytest.mark.parametrize("tiles", [False, True])
def test_rows_are_those_of_each_image_alone(image, tiles):
    model = tiny_model()
    predictor = replace(StitchedPredictor.of(model), local_fn=model.local_logits(4) if tiles else None)
    lesion = ellipsoid(image.shape, SPACING, (8, 19, 14), (5.0, 4.0, 12.0))
    contrasts = np.array([[0, 0], [1.0, 0], [2.0, -1.0], [4.0, -1.0], [0, -2.0]])
    unit = np.array([0.9, 0.5])
    rows = insertion_rows(predictor, image, SPACING, lesion, contrasts, CHANNELS, threshold=0.5, unit=unit)
    assert rows[0]["detected"] == 0
    assert {r["detected"] for r in rows} == {0, 1}
    held = tuple(lesion.voxels.T)
    for row, contrast in zip(rows, contrasts, strict=True):
        whole = insert_lesion(image, lesion, contrast * unit)
        logits = StitchedPredictor.of(model)(jnp.asarray(whole))
        probability = np.asarray(predictor.probability(logits))[held]
        # as in context: float32's rounding of logits of order 1 to 10
        assert row["mean_probability"] == pytest.approx(probability.mean(), abs=1e-5)
        assert row["max_probability"] == pytest.approx(probability.max(), abs=1e-5)
        assert row["mean_logit"] == pytest.approx(np.asarray(logits)[held][:, 1].mean(), abs=1e-5)
        assert row["detected"] == int((probability > 0.5).any())
        assert [row["contrast_FLAIR"], row["added_T1w"]] == pytest.approx([contrast[0], contrast[1] * 0.5])
        assert row["volume_mm3"] == pytest.approx(2.0 * lesion.weight.sum())


def test_saliency_is_that_of_each_image_explained_alone():
    def couples(x):
        mixed = jnp.roll(x[..., 0], 1, 1) * x[..., 1]
        return jnp.stack([x[..., 0], jnp.tanh(mixed) + jnp.sin(jnp.roll(mixed, 1, 2))], -1)

    predictor = StitchedPredictor(couples, (6, 6, 6))
    image = np.random.default_rng(0).normal(size=(9, 8, 7, 2)).astype(np.float32)
    lesion = ellipsoid(image.shape, (1, 1, 1), (4, 4, 3), 3.0)
    explain, key = smoothgrad(samples=2, noise=0.05, aggregate="mean"), jax.random.key(5)
    contrasts = np.array([[0, 0], [2.0, -1.0]])
    options = {"threshold": 0.5, "explain": explain, "key": key}
    rows = insertion_rows(predictor, image, (1, 1, 1), lesion, contrasts, CHANNELS, **options)
    for row, contrast in zip(rows, contrasts, strict=True):
        (found,), _ = explain(key, predictor, jnp.asarray(insert_lesion(image, lesion, contrast)), [lesion.instance()])
        values = np.zeros(image.shape)
        values[tuple(slice(a, a + n) for a, n in zip(found.start, found.values.shape, strict=False))] = found.values
        inside = values[tuple(lesion.voxels.T)]
        for c, name in enumerate(CHANNELS):
            expected = {
                "peak": values[..., c].max(),
                "minimum": values[..., c].min(),
                "mean_inside": inside[:, c].mean(),
                "positive_mass": np.maximum(values[..., c], 0).sum(),
                "negative_mass": np.minimum(values[..., c], 0).sum(),
            }
            for measure, value in expected.items():
                # the image is rounded once more here
                assert row[f"saliency_{name}_{measure}"] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert rows[0]["saliency_FLAIR_peak"] != rows[1]["saliency_FLAIR_peak"]


def test_saliency_of_a_linear_network_does_not_depend_on_contrast():
    predictor = StitchedPredictor(lambda x: jnp.stack([0 * x[..., 0], 2 * x[..., 0] - x[..., 1]], -1), (8, 8, 8))
    image = np.ones((10, 10, 10, 2), np.float32)
    lesion = ellipsoid(image.shape, (1, 1, 1), (5, 5, 5), 4.0)
    rows = insertion_rows(
        predictor, image, (1, 1, 1), lesion, np.array([[0, 0], [3.0, 0]]), CHANNELS, threshold=0.9,
        explain=jacobian_rows(mean()), key=jax.random.key(0),
    )  # fmt: skip
    for row in rows:
        assert row["saliency_FLAIR_positive_mass"] == pytest.approx(2, rel=1e-5)
        assert row["saliency_T1w_negative_mass"] == pytest.approx(-1, rel=1e-5)
    assert rows[1]["mean_logit"] - rows[0]["mean_logit"] == pytest.approx(
        2 * 3 * lesion.weight[lesion.weight >= 0.5].mean(), rel=1e-5
    )


def test_the_contrast_from_which_lesions_are_found():
    """Lesion n is found from contrast n on: half of ten at 4."""
    rows = [
        {"lesion": n, "patient": f"p{n // 2}", "contrast_FLAIR": float(c), "detected": int(c >= n)}
        for n in range(10)
        for c in range(12)
    ]
    found = {(r["measure"], r["contrast_FLAIR"]): r for r in insertion_summary(rows, "contrast_FLAIR")}
    assert found["detection_rate", 3.0]["estimate"] == pytest.approx(0.4)
    assert found["detected_50", None]["estimate"] == pytest.approx(4)
    assert found["detected_90", None]["estimate"] == pytest.approx(8)
    assert found["detected_50", None]["low"] < 4 < found["detected_50", None]["high"]
    assert found["detected_50", None]["patients"] == 5
    with pytest.raises(InputError, match="once at each level"):
        insertion_summary(rows[:-1], "contrast_FLAIR")
