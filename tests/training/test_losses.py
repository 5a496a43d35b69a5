"""Losses against loops over voxels in float64 and against values worked out by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.losses import combined_loss, focal_loss, normalised_dice_loss
from xaiseg.metrics import normalised_dice

# Sums of a few hundred float32 terms: relative rounding of about 1e-6.
RTOL = 1e-5


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Logits (2, 4, 5, 6, 2) and a reference with few and with many voxels."""
    rng = np.random.default_rng(0)
    reference = np.stack([rng.random((4, 5, 6)) < 0.05, rng.random((4, 5, 6)) < 0.4]).astype(np.float32)
    return rng.normal(size=(2, 4, 5, 6, 2)).astype(np.float32), reference


def loop_dice(probability: np.ndarray, reference: np.ndarray, r: float) -> float:
    scores = []
    for p, g in zip(probability.astype(float), reference, strict=True):
        tp = fp = fn = n = 0.0
        for v in itertools.product(*map(range, p.shape)):
            n += g[v]
            tp += p[v] * g[v]
            fp += p[v] * (1 - g[v])
            fn += (1 - p[v]) * g[v]
        kappa = (1 - r) * n / (r * (p.size - n))
        scores.append(2 * tp / (kappa * fp + 2 * tp + fn))
    return 1 - sum(scores) / len(scores)


@pytest.mark.parametrize("r", [0.001, 0.1])
def test_normalised_dice_is_the_loop(batch: tuple[np.ndarray, np.ndarray], r: float) -> None:
    logits, reference = batch
    probability = np.asarray(jax.nn.softmax(jnp.asarray(logits))[..., 1])
    found = normalised_dice_loss(jnp.asarray(probability), jnp.asarray(reference), r)
    np.testing.assert_allclose(found, loop_dice(probability, reference, r), rtol=RTOL)


def test_normalised_dice_of_binary_masks_is_the_metric(batch: tuple[np.ndarray, np.ndarray]) -> None:
    _, reference = batch
    predicted = np.roll(reference, 1, axis=3)
    loss = normalised_dice_loss(jnp.asarray(predicted), jnp.asarray(reference))
    metric = np.mean([normalised_dice(p > 0, g > 0) for p, g in zip(predicted, reference, strict=True)])
    np.testing.assert_allclose(1 - loss, metric, atol=1e-6)  # the smoothing of 1e-5 voxels in about ten


def test_normalised_dice_of_an_empty_reference() -> None:
    empty = jnp.zeros((1, 4, 4, 4))
    assert normalised_dice_loss(empty, empty) == 0.0
    np.testing.assert_allclose(normalised_dice_loss(empty + 0.5, empty), 1 - 1e-5 / (32 + 1e-5), rtol=1e-6)
    gradient = jax.grad(normalised_dice_loss)(empty + 1e-6, empty)
    assert (gradient > 0).all()


def test_normalised_dice_of_a_full_reference_has_no_kappa() -> None:
    full = jnp.ones((1, 2, 2, 2))
    np.testing.assert_allclose(normalised_dice_loss(full / 4, full), 1 - 4 / (4 + 6), rtol=1e-5)  # TP 2, FN 6


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_is_the_loop(batch: tuple[np.ndarray, np.ndarray], gamma: float) -> None:
    logits, reference = batch
    total = 0.0
    for v in itertools.product(*map(range, reference.shape)):
        a, b = (float(value) for value in logits[v])
        own = b if reference[v] else a
        p = math.exp(own) / (math.exp(a) + math.exp(b))
        total -= (1 - p) ** gamma * math.log(p)
    np.testing.assert_allclose(
        focal_loss(jnp.asarray(logits), jnp.asarray(reference), gamma), total / reference.size, rtol=RTOL
    )


def test_focal_is_finite_for_sure_mistakes_and_zero_for_sure_hits() -> None:
    logits = jnp.array([[-200.0, 200.0]])
    wrong, right = jnp.zeros(1), jnp.ones(1)
    np.testing.assert_allclose(focal_loss(logits, wrong), 400.0)
    assert np.isfinite(jax.grad(focal_loss)(logits, wrong)).all()
    assert focal_loss(logits, right) == 0.0
    assert np.isfinite(jax.grad(focal_loss)(logits, right)).all()


def test_combined_weighs_both(batch: tuple[np.ndarray, np.ndarray]) -> None:
    logits, reference = map(jnp.asarray, batch)
    probability = jax.nn.softmax(logits)[..., 1]
    expected = 0.5 * normalised_dice_loss(probability, reference) + focal_loss(logits, reference)
    np.testing.assert_allclose(combined_loss(logits, reference), expected, rtol=1e-6)
    other = 2.0 * normalised_dice_loss(probability, reference, 0.1) + 3.0 * focal_loss(logits, reference, 1.0)
    np.testing.assert_allclose(combined_loss(logits, reference, 2.0, 3.0, 0.1, 1.0), other, rtol=1e-6)
