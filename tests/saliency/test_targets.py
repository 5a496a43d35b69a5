"""Targets against their formulas, alone and through blended windows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Instance
from xaiseg.inference import StitchedPredictor, pad
from xaiseg.saliency import TARGETS, Target, input_gradient, jacobian_rows, signed_max
from xaiseg.saliency.rows import head_of
from xaiseg.saliency.score import score, window_scores
from xaiseg.saliency.targets import head

KEY = jax.random.key(0)
LOGITS = np.random.default_rng(0).standard_normal((50, 3)) * 3
LESION = Instance(1, np.array([[1, 2, 1], [2, 2, 1], [2, 2, 2], [5, 0, 3]], np.int32))
IMAGE = jax.random.normal(jax.random.key(1), (6, 5, 7, 2))


def three_classes(x):
    """Smooth, couples neighbours, (N, *window, 2) -> (N, *window, 3)."""
    mixed = x[..., 0] * jnp.roll(x[..., 1], 1, 1)
    return jnp.stack([jnp.sin(mixed), 2 * jnp.tanh(jnp.roll(mixed, -1, 3)) + x[..., 1], x[..., 0] ** 2], -1)


def softmax(y):
    e = np.exp(y - y.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def strongest_other(y):
    return np.maximum(y[:, 0], y[:, 2])


FORMULAS = {
    ("logit", "softmax"): lambda y: y[:, 1],
    ("log_odds", "softmax"): lambda y: np.log(softmax(y)[:, 1] / (1 - softmax(y)[:, 1])),
    ("probability", "softmax"): lambda y: softmax(y)[:, 1],
    ("margin", "softmax"): lambda y: y[:, 1] - strongest_other(y),
    ("logit", "sigmoid"): lambda y: y[:, 1],
    ("log_odds", "sigmoid"): lambda y: y[:, 1],
    ("probability", "sigmoid"): lambda y: 1 / (1 + np.exp(-y[:, 1])),
    ("margin", "sigmoid"): lambda y: y[:, 1],
}


@pytest.mark.parametrize(("kind", "activation"), FORMULAS)
def test_a_target_is_its_formula_and_its_gradient_a_finite_difference(kind, activation):
    formula, step = FORMULAS[kind, activation], 1e-6
    with jax.enable_x64(True):
        found = head(kind, 1, activation, 3)
        chosen = found.choose(jnp.asarray(LOGITS))
        np.testing.assert_allclose(found(chosen), formula(LOGITS), rtol=1e-12)
        bumps = step * np.eye(3)
        expected = np.stack([(formula(LOGITS + b) - formula(LOGITS - b)) / (2 * step) for b in bumps], -1)
        classes = found.classes or (0, 1, 2)
        # central differences: step² and rounding over the step, 1e-10
        np.testing.assert_allclose(found.gradient(chosen), expected[:, list(classes)], atol=1e-8)
        others = [c for c in range(3) if c not in classes]
        assert np.abs(expected[:, others]).max(initial=0) < 1e-9
        assert found.linear == np.allclose(expected, expected[0], atol=1e-9)


def test_a_single_logit_is_a_sigmoids():
    y = jnp.array([[0.5], [-2.0]])
    assert [head(kind, 0, "softmax", 1).linear for kind in TARGETS] == [True, True, False, True]
    np.testing.assert_allclose(head("probability", 0, "softmax", 1)(y), jax.nn.sigmoid(y[:, 0]))


def test_the_margin_to_one_class():
    found = head(Target("margin", against=2), 1, "softmax", 3)
    np.testing.assert_allclose(
        found(found.choose(jnp.asarray(LOGITS, jnp.float32))), LOGITS[:, 1] - LOGITS[:, 2], rtol=1e-5
    )
    assert found.linear


def stitched_rows(predictor, target):
    """Rows of the target of the whole stitched prediction, by reverse mode through all windows."""
    found = head_of(predictor, target, IMAGE)
    return np.asarray(jax.jacrev(lambda x: found(found.choose(predictor(x)))[tuple(LESION.voxels.T)])(IMAGE))


def whole(saliency):
    volume = np.zeros(IMAGE.shape, np.float32)
    volume[tuple(slice(s, s + n) for s, n in zip(saliency.start, saliency.values.shape[:3], strict=True))] = (
        saliency.values
    )
    return volume


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "target", [*TARGETS, Target("margin", against=2), Target(function=lambda y: jnp.sin(y[..., 1]) * y[..., 0])]
)
def test_rows_of_every_target_through_blended_windows(target, activation):
    predictor = StitchedPredictor(three_classes, (4, 4, 4), output_activation=activation)
    rows = stitched_rows(predictor, target)
    expected = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
    (found,), (info,) = jacobian_rows(signed_max(), target=target, chunk=3)(KEY, predictor, IMAGE, [LESION])
    assert info.windows > 1
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(whole(found), expected, atol=1e-5)  # float32; values of order one
    (summed,), _ = input_gradient(target=target)(KEY, predictor, IMAGE, [LESION])
    np.testing.assert_allclose(whole(summed), rows.sum(0), atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_window_scores_have_the_derivatives_of_the_target(target):
    predictor = StitchedPredictor(three_classes, (4, 4, 4))
    plan, lesion_head = predictor.plan(IMAGE.shape), head_of(predictor, target, IMAGE)
    padded, total = pad(IMAGE, plan), np.zeros(IMAGE.shape)
    for part in window_scores(predictor, plan, padded, LESION, lesion_head):
        window = plan.slices(part.start)
        gradient = jax.grad(
            lambda x, p=part: score(lesion_head, three_classes(x[None])[0], jnp.asarray(p.share), jnp.asarray(p.rest))
        )(padded[window])
        total[window] += gradient
    np.testing.assert_allclose(total, stitched_rows(predictor, target).sum(0), atol=1e-5)


def test_what_is_no_target():
    with pytest.raises(ValueError, match="target is 'loss', known are logit, log_odds, probability, margin"):
        Target("loss")
    with pytest.raises(ValueError, match="only the margin"):
        Target("logit", against=1)
    with pytest.raises(ValueError, match="the network has 2 classes"):
        head(Target("margin", against=5), 1, "softmax", 2)
    with pytest.raises(ValueError, match="to itself"):
        head(Target("margin", against=1), 1, "softmax", 2)
    predictor = replace(StitchedPredictor(three_classes, (4, 4, 4)), target_class=3)
    with pytest.raises(ValueError, match="target_class is 3, but the network has 3 classes"):
        jacobian_rows(signed_max())(KEY, predictor, IMAGE, [LESION])
