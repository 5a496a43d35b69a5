"""Grad-CAM++ against a transcription of the paper's equations in PyTorch (stored), and by hand on a network of one layer."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Instance
from xaiseg.checkpoints import convert
from xaiseg.inference import StitchedPredictor
from xaiseg.saliency import gradcam_pp

FIXTURES = Path(__file__).parent.parent / "fixtures"
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def predictor():
    return StitchedPredictor.of(convert(FIXTURES / "unet_batch.pth", window=(16, 16, 16)))


@pytest.mark.parametrize(("lesion", "windows"), [("one", 1), ("border", 4)])
def test_maps_are_the_papers_equations(predictor, lesion, windows):
    """At the published layer, `model.1.submodule.2.conv` of MONAI's network."""
    stored = np.load(FIXTURES / "gradcam_pp.npz")
    image, voxels = jnp.asarray(stored["x"], jnp.float32), stored[f"{lesion}_voxels"]
    (found,), (info,) = gradcam_pp(layer="decoder1.conv")(KEY, predictor, image, [Instance(1, voxels)])
    expected = np.zeros((*image.shape[:3], 1), np.float32)
    expected[tuple(slice(s, s + n) for s, n in zip(found.start, found.values.shape, strict=False))] = found.values
    # the project's bound is 1e-4 of the largest value; α = 1/(2 + gΣA) loses a digit or two where its denominator is small
    np.testing.assert_allclose(expected[..., 0], stored[lesion], atol=1e-5 * stored[lesion].max())
    assert (info.rows, info.windows) == (windows, windows)


def one_layer(x, offsets):
    """Two activations of each voxel, `x` and its double; the lesion's logit is their sum and itself piecewise linear in them."""
    activations = jnp.concatenate([x, 2 * x], -1) + offsets.get("layer", 0.0)
    return jnp.stack([x[..., 0], activations.sum(-1)], -1), {"layer": activations}


def explain_one_layer(values, voxels):
    values = jnp.asarray(values, jnp.float32)[None, None, :, None]
    predictor = StitchedPredictor(lambda x: one_layer(x, {})[0], values.shape[:3], tapped_fn=one_layer)
    (found,), (info,) = gradcam_pp(layer="layer")(KEY, predictor, values, [Instance(1, np.array(voxels, np.int32))])
    return found.values[0, 0, :, 0], info


def test_one_layer_by_hand():
    """Ω = voxels 1 and 3, where g = 1; ΣA = 3 and 6, so ω = 1/5 and 1/8 there; M = ReLU(x/5 + 2x/8)."""
    found, info = explain_one_layer([5.0, 2.0, -3.0, -1.0], [[0, 0, 1], [0, 0, 3]])
    np.testing.assert_allclose(found, [0, 2 / 5 + 4 / 8, 0, 0], rtol=1e-6)
    assert info.extra == {"alpha_near_zero": 0.0}


def test_where_alpha_is_ill_defined_is_reported():
    """ΣA = -1.9999 and -3.9998: of the four activations with g > 0, the two of the first channel have |2 + ΣA| < 1e-3."""
    found, info = explain_one_layer([0.5, 0.5, -2.9999], [[0, 0, 0], [0, 0, 1]])
    assert info.extra == {"alpha_near_zero": 0.5}
    assert np.isfinite(found).all()


def test_an_unknown_layer_is_named_with_those_there_are(predictor):
    image, lesion = jnp.ones((16, 16, 16, 2)), Instance(1, np.array([[3, 3, 3]], np.int32))
    with pytest.raises(ValueError, match=r"no tap 'decoder9' in this network; it has .*decoder1\.conv, encoder0"):
        gradcam_pp(layer="decoder9")(KEY, predictor, image, [lesion])


def test_a_network_without_taps_is_refused():
    predictor = StitchedPredictor(lambda x: x, (4, 4, 4))
    with pytest.raises(ValueError, match="give the predictor a tapped_fn"):
        gradcam_pp(layer="layer")(KEY, predictor, jnp.ones((4, 4, 4, 2)), [])


@pytest.mark.parametrize("layer", ["encoder0", "bottleneck.conv", "decoder0.conv"])
def test_other_layers_come_out_on_the_input_grid(predictor, layer):
    image = jax.random.normal(KEY, (18, 20, 17, 2))
    (found,), _ = gradcam_pp(layer=layer)(KEY, predictor, image, [Instance(1, np.array([[0, 1, 0]], np.int32))])
    assert found.values.shape == (16, 16, 16, 1)
    assert np.isfinite(found.values).all()
    assert (found.values >= 0).all()
