"""The stitched prediction against MONAI's (stored), and as a function that may be differentiated, scanned and compiled."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Instance
from xaiseg.checkpoints import convert
from xaiseg.inference import StitchedPredictor, pad, unpad
from xaiseg.saliency import gradcam_pp, jacobian_rows, mean

FIXTURES = Path(__file__).parent.parent / "fixtures"
WINDOW = (16, 16, 16)


@pytest.fixture(scope="module")
def model():
    return convert(FIXTURES / "unet_batch.pth", window=WINDOW)


def plain(x):
    """A network that is an ordinary function and nonlinear, (N, *window, 2) -> (N, *window, 2)."""
    rolled = jnp.roll(x, 1, axis=2)
    return jnp.stack([jnp.tanh(x[..., 0] + rolled[..., 1]), x[..., 1] ** 2 - rolled[..., 0]], -1)


@pytest.mark.parametrize(("name", "blending"), [("below", "gaussian"), ("above", "constant")])
def test_logits_are_monais(model, name, blending):
    stored = np.load(FIXTURES / f"stitched_{name}.npz")
    predictor = StitchedPredictor.of(model.with_spec(blending=blending))
    logits = predictor(jnp.asarray(stored["x"], jnp.float32))
    # float32 against MONAI in float64, logits of order one
    np.testing.assert_allclose(logits, stored["y"], atol=1e-5)


def test_a_volume_of_one_window_is_the_network(model):
    x = jax.random.normal(jax.random.key(0), (*WINDOW, 2))
    # one window: its logits times w, divided by w
    expected = jax.jit(lambda f, x: f(x))(model.logits_fn, x[None])[0]
    np.testing.assert_allclose(StitchedPredictor.of(model)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 5, 7), (4, 3, 2)])
def test_a_plain_function_is_stitched_as_the_loop_says(shape):
    predictor = StitchedPredictor(plain, (4, 4, 4))
    x = np.asarray(jax.random.normal(jax.random.key(1), (*shape, 2)))
    plan = predictor.plan(shape)
    padded = np.pad(x, (*plan.padding, (0, 0)))
    total, weight = np.zeros((*plan.padded_shape, 2)), np.zeros(plan.padded_shape)
    for start in plan.starts:
        at = plan.slices(start)
        total[at] += np.asarray(plain(padded[at][None])[0]) * plan.weight[..., None]
        weight[at] += plan.weight
    expected = unpad(total / weight[..., None], plan)
    np.testing.assert_allclose(predictor(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_scan_and_jit_change_nothing():
    x = jax.random.normal(jax.random.key(2), (6, 5, 7, 2))
    loop = StitchedPredictor(plain, (4, 4, 4))
    expected = loop(x)
    for predictor in (replace(loop, scan=True), jax.jit(loop), jax.jit(replace(loop, scan=True))):
        np.testing.assert_allclose(predictor(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_the_gradient_is_the_sum_over_windows(scan):
    """Each window pulls back the shares of the blended cotangent that it holds; the rest of the volume gets nothing from it."""
    predictor = StitchedPredictor(plain, (4, 4, 4), scan=scan)
    x = jax.random.normal(jax.random.key(3), (6, 3, 5, 2))
    cotangent = jax.random.normal(jax.random.key(4), x.shape)
    plan = predictor.plan(x.shape)
    padded, spread = np.asarray(pad(x, plan)), np.asarray(pad(cotangent, plan))
    expected = np.zeros(padded.shape)
    for start in plan.starts:
        at = plan.slices(start)
        share = plan.weight / plan.total_weight[at]
        _, pull = jax.vjp(plain, jnp.asarray(padded[at][None]))
        expected[at] += np.asarray(pull(jnp.asarray((spread[at] * share[..., None])[None]))[0])[0]
    gradient = jax.grad(lambda x: jnp.sum(predictor(x) * cotangent))(x)
    np.testing.assert_allclose(gradient, unpad(expected, plan), rtol=1e-5, atol=1e-5)


def test_progress_counts_windows():
    predictor = StitchedPredictor(plain, (4, 4, 4))
    seen = []
    predictor(jnp.ones((6, 5, 7, 2)), progress=lambda: seen.append(1))
    assert len(seen) == len(predictor.plan((6, 5, 7)).starts) == 8


def test_probability_is_the_lesions():
    logits = np.random.default_rng(0).normal(size=(2, 3, 4, 3)).astype(np.float32)
    predictor = StitchedPredictor(plain, (4, 4, 4), target_class=2)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(predictor.probability(jnp.asarray(logits)), expected[..., 2], rtol=1e-5)
    single = predictor.probability(jnp.asarray(logits[..., :1]))
    np.testing.assert_allclose(single, 1 / (1 + np.exp(-logits[..., 0])), rtol=1e-5)


def test_windows_of_every_volume_share_one_program():
    traces = []

    def counted(x):
        traces.append(x.shape)
        return x * 2

    predictor = StitchedPredictor(counted, (4, 4, 4))
    for _ in range(2):
        predictor(jnp.ones((9, 4, 6, 2)))
    # one trace for the shape of the logits at each call, one for the program
    assert len(traces) <= 3


@pytest.mark.parametrize("target_class", [2, -1])
def test_a_class_that_the_network_does_not_have(model, target_class):
    """JAX would take the nearest one without a word."""
    predictor = replace(StitchedPredictor.of(model), target_class=target_class)
    image, lesion = jnp.zeros((*WINDOW, 2)), Instance(1, np.zeros((1, 3), np.int32))
    for run in (predictor, lambda x: jacobian_rows(mean())(jax.random.key(0), predictor, x, [lesion])):
        with pytest.raises(ValueError, match=f"target_class is {target_class}, but the network has 2 classes"):
            run(image)
    with pytest.raises(ValueError, match="target_class is"):
        gradcam_pp(layer="bottleneck")(jax.random.key(0), predictor, image, [lesion])
