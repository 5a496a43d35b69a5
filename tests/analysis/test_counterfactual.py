"""The scan without a lesion: each row as from both images segmented and explained whole."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from tests.tiny import BLOBS, CHANNELS, SHAPE, blob, tiny_model, volumes
from xaiseg._types import Instance, SaliencyMap
from xaiseg.analysis.altered import passes_at_most
from xaiseg.analysis.counterfactual import counterfactual_rows
from xaiseg.analysis.map_figures import relative_change
from xaiseg.errors import InputError
from xaiseg.imaging.normalise import zscore_nonzero
from xaiseg.inference import StitchedPredictor
from xaiseg.saliency import smoothgrad

SPACING = (1.0, 0.5, 4.0)


@pytest.fixture(scope="module")
def image():
    found = volumes()
    return np.stack([zscore_nonzero(found[name], name) for name in CHANNELS], -1)


@pytest.fixture(scope="module")
def filled(image):
    """The first blob and a rim of one voxel, as noise around the median of the rest."""
    mask = ndimage.binary_dilation(blob(*BLOBS[0]))
    noise = np.random.default_rng(1).normal(0, 0.2, image.shape)
    middle = np.median(image[(image != 0).all(-1)], axis=0)
    return np.where(mask[..., None], middle + noise, image).astype(np.float32)


def instances():
    return [Instance(n, np.argwhere(blob(*b)).astype(np.int32)) for n, b in zip((3, 8), BLOBS, strict=True)]


def test_rows_are_those_of_both_images_alone(image, filled):
    predictor = replace(StitchedPredictor.of(tiny_model()), local_fn=None)
    lesion, other = instances()
    rows = counterfactual_rows(predictor, image, filled, SPACING, lesion, [other], CHANNELS, threshold=0.5)
    assert [(row["lesion"], row["role"]) for row in rows] == [(3, "filled"), (8, "neighbour")]
    apart = (lesion.voxels[:, None] - other.voxels[None]) * np.array(SPACING)
    assert rows[0]["distance_mm"] == 0
    assert rows[1]["distance_mm"] == pytest.approx(np.linalg.norm(apart, axis=-1).min())
    assert rows[0]["changed_voxels"] == (filled != image).any(-1).sum()
    assert (rows[0]["before_detected"], rows[0]["after_detected"], rows[1]["after_detected"]) == (1, 0, 1)
    for moment, one in (("before", image), ("after", filled)):
        logits = predictor(jnp.asarray(one))
        probability = np.asarray(predictor.probability(logits))
        for row, instance in zip(rows, (lesion, other), strict=True):
            held = tuple(instance.voxels.T)
            # float32's rounding of logits of order 1 to 10
            assert row[f"{moment}_mean_probability"] == pytest.approx(probability[held].mean(), abs=1e-5)
            assert row[f"{moment}_max_probability"] == pytest.approx(probability[held].max(), abs=1e-5)
            assert row[f"{moment}_mean_logit"] == pytest.approx(np.asarray(logits)[held][:, 1].mean(), abs=1e-5)


def test_saliency_is_that_of_both_images_alone():
    def couples(x):
        return jnp.stack([x[..., 0], jnp.tanh(jnp.roll(x[..., 0], 1, 1) * x[..., 1])], -1)

    predictor = StitchedPredictor(couples, (6, 6, 6))
    image = np.random.default_rng(0).normal(size=(9, 8, 7, 2)).astype(np.float32)
    lesion, other = (Instance(n, np.array([[n, 4, 3], [n, 5, 3]], np.int32)) for n in (2, 5))
    filled = image.copy()
    filled[1:4, 3:7, 2:5] = 0.5
    explain, key = smoothgrad(samples=2, noise=0.05, aggregate="mean"), jax.random.key(5)
    options = {"threshold": 0.5, "explain": explain, "key": key}
    rows = counterfactual_rows(predictor, image, filled, (1, 1, 1), lesion, [other], CHANNELS, **options)
    maps = [explain(key, predictor, jnp.asarray(one), [lesion, other])[0] for one in (image, filled)]
    for row, *pair in zip(rows, *maps, strict=True):
        values = []
        for moment, found in zip(("before", "after"), pair, strict=True):
            values.append(np.asarray(found.values))
            assert row[f"{moment}_saliency_FLAIR_peak"] == pytest.approx(values[-1][..., 0].max())
            assert row[f"{moment}_saliency_T1w_minimum"] == pytest.approx(values[-1][..., 1].min())
        change = np.linalg.norm(values[1] - values[0]) / np.linalg.norm(values[0])
        assert row["saliency_change"] == pytest.approx(change)
    assert rows[0]["saliency_change"] > 0
    # the network looks one voxel back: the neighbour sees nothing of the change
    assert rows[1]["saliency_change"] < rows[0]["saliency_change"] / 10


def test_a_neighbour_that_sees_nothing_of_it_takes_one_pass_a_window(image):
    """Windows of 8: the far corner shares none with the change."""
    predictor = replace(StitchedPredictor.of(tiny_model()), window=(8, 8, 8), local_fn=None)
    lesion = Instance(1, np.array([[4, 4, 4]], np.int32))
    far = Instance(2, np.array([[20, 24, 18]], np.int32))
    changed = image.copy()
    changed[4, 4, 4] += 1
    calls: list[int] = []
    rows = counterfactual_rows(
        predictor, image, changed, SPACING, lesion, [far], CHANNELS, threshold=0.5, progress=calls.append
    )
    assert rows[1]["before_mean_logit"] == rows[1]["after_mean_logit"]
    windows = [passes_at_most(predictor, image.shape, i.voxels, 1) for i in (lesion, far)]
    assert sum(calls) == 2 * windows[0] + windows[1]


def test_what_is_refused(image):
    predictor = StitchedPredictor.of(tiny_model())
    lesion, other = instances()
    with pytest.raises(InputError, match="nothing of lesion 3 was filled"):
        counterfactual_rows(predictor, image, image, SPACING, lesion, [other], CHANNELS, threshold=0.5)
    with pytest.raises(InputError, match="give one on its grid"):
        counterfactual_rows(predictor, image, image[1:], SPACING, lesion, [], CHANNELS, threshold=0.5)


def test_the_change_of_maps_with_other_crops():
    """Against whole volumes of zeros."""
    rng = np.random.default_rng(0)
    maps, whole = [], np.zeros((2, *SHAPE, 2))
    for canvas, start, sides in zip(whole, [(2, 3, 4), (5, 1, 4)], [(6, 7, 8), (7, 9, 3)], strict=True):
        values = rng.normal(size=(*sides, 2))
        canvas[tuple(slice(a, a + n) for a, n in zip(start, sides, strict=True))] = values
        maps.append(SaliencyMap(values, start))
    expected = np.linalg.norm(whole[1] - whole[0]) / np.linalg.norm(whole[0])
    assert relative_change(*maps) == pytest.approx(expected)
    assert np.isnan(relative_change(SaliencyMap(0 * maps[0].values, (2, 3, 4)), maps[1]))
