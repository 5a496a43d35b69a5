"""Losses against loops over voxels in float64 and against values worked out by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.losses import (
    at_nearest,
    blob_loss,
    cross_entropy_loss,
    deeply_supervised,
    dice_loss,
    focal_loss,
    normalised_dice_loss,
    supervision_weights,
    weighted_sum,
)
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


@pytest.mark.parametrize("over_batch", [False, True])
def test_dice_is_the_formula(batch: tuple[np.ndarray, np.ndarray], over_batch: bool) -> None:
    logits, reference = batch
    p = np.asarray(jax.nn.softmax(jnp.asarray(logits))[..., 1], np.float64)
    items = [(p, reference)] if over_batch else list(zip(p, reference, strict=True))
    expected = np.mean([1 - 2 * (q * g).sum() / (q.sum() + g.sum()) for q, g in items])
    found = dice_loss(jnp.asarray(p, jnp.float32), jnp.asarray(reference), over_batch)
    np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_dice_of_an_empty_reference() -> None:
    """Over the batch an empty patch counts with its false positives only."""
    empty = jnp.zeros((1, 4, 4, 4))
    assert dice_loss(empty, empty) == 0.0
    np.testing.assert_allclose(dice_loss(empty + 0.5, empty), 1, atol=1e-6)
    one = empty.at[0, 0].set(1)
    both = jnp.concatenate([empty, one])
    assert dice_loss(both, both) == 0.0
    np.testing.assert_allclose(
        dice_loss(jnp.concatenate([one, one]), both, over_batch=True), 1 - 2 * 16 / (32 + 16), rtol=1e-6
    )


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_of_the_lesion_s_logit_alone(batch: tuple[np.ndarray, np.ndarray], gamma: float) -> None:
    logits, reference = batch
    p = 1 / (1 + np.exp(-logits[..., 1].astype(float)))
    own = np.where(reference > 0, p, 1 - p)
    found = focal_loss(jnp.asarray(logits), jnp.asarray(reference), gamma, "sigmoid")
    np.testing.assert_allclose(found, (-((1 - own) ** gamma) * np.log(own)).mean(), rtol=RTOL)


def test_cross_entropy_is_focal_without_focus(batch: tuple[np.ndarray, np.ndarray]) -> None:
    logits, reference = map(jnp.asarray, batch)
    np.testing.assert_allclose(cross_entropy_loss(logits, reference), focal_loss(logits, reference, 0.0), rtol=RTOL)


def instances() -> np.ndarray:
    """Three lesions, none, and one."""
    labels = np.zeros((3, 4, 5, 6), np.int32)
    labels[0, 0, 0, :2], labels[0, 2, 1:4], labels[0, 3, 4, 5] = 1, 2, 3
    labels[2, 1:3, 1:3, 1:3] = 1
    return labels


def published_blob_loss(p: np.ndarray, labels: np.ndarray) -> float:
    """Instance by instance, both masks multiplied by what is not another instance."""
    items = []
    for q, own in zip(p.astype(float), labels, strict=True):
        if own.any():
            each = []
            for n in range(1, own.max() + 1):
                mask = (own == 0) | (own == n)
                each.append(1 - 2 * (q * (own == n)).sum() / ((q * mask).sum() + (own == n).sum()))
            items.append(np.mean(each))
    return float(np.mean(items))


def test_blob_is_the_published_loop() -> None:
    labels = instances()
    p = np.random.default_rng(3).random(labels.shape).astype(np.float32)
    found = blob_loss(jnp.asarray(p), jnp.asarray(labels), 5)
    np.testing.assert_allclose(found, published_blob_loss(p, labels), rtol=RTOL)
    merged = blob_loss(jnp.asarray(p), jnp.asarray(labels), 2)  # the third counts with the second
    np.testing.assert_allclose(merged, published_blob_loss(p, np.minimum(labels, 2)), rtol=RTOL)


def test_blob_without_instances_is_zero_and_has_a_gradient_of_zero() -> None:
    p, empty = jnp.full((2, 3, 3, 3), 0.5), jnp.zeros((2, 3, 3, 3), jnp.int32)
    assert blob_loss(p, empty, 4) == 0.0
    assert (jax.grad(blob_loss)(p, empty, 4) == 0).all()


def test_blob_counts_a_small_lesion_as_a_large_one() -> None:
    labels = instances()[:1]
    missed_small, missed_large = (jnp.asarray((labels > 0) & (labels != n), jnp.float32) for n in (1, 2))
    np.testing.assert_allclose(
        blob_loss(missed_small, jnp.asarray(labels), 3), blob_loss(missed_large, jnp.asarray(labels), 3), rtol=1e-4
    )


def test_the_sum_weighs_its_parts(batch: tuple[np.ndarray, np.ndarray]) -> None:
    logits, reference = map(jnp.asarray, batch)
    p = jax.nn.softmax(logits)[..., 1]
    papers = 0.5 * normalised_dice_loss(p, reference) + focal_loss(logits, reference)
    np.testing.assert_allclose(
        weighted_sum({"normalised_dice": 0.5, "focal": 1.0})(logits, reference), papers, rtol=1e-6
    )
    labels = (2 * reference).astype(jnp.int32)  # instances: a mask of what is not zero to the others
    others = {"normalised_dice": 2.0, "dice": 3.0, "focal": 4.0, "cross_entropy": 5.0, "blob": 6.0}
    options = {"dice_r": 0.1, "dice_over_batch": True, "focal_gamma": 1.0, "focal_activation": "sigmoid"}
    expected = (
        2 * normalised_dice_loss(p, reference, 0.1)
        + 3 * dice_loss(p, reference, over_batch=True)
        + 4 * focal_loss(logits, reference, 1.0, "sigmoid")
        + 5 * cross_entropy_loss(logits, reference)
        + 6 * blob_loss(p, labels, 64)
    )
    np.testing.assert_allclose(weighted_sum(others, **options)(logits, labels), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="loss 'hinge' is unknown; known are normalised_dice"):
        weighted_sum({"hinge": 1.0})


def test_nearest_takes_the_voxel_at_the_centre() -> None:
    grid = jnp.arange(2 * 8 * 6 * 4).reshape(2, 8, 6, 4)
    np.testing.assert_array_equal(at_nearest(grid, (4, 2, 4)), grid[:, 1::2, 1::3])
    assert at_nearest(grid, (8, 6, 4)) is grid


def test_deep_supervision_weighs_grids(batch: tuple[np.ndarray, np.ndarray]) -> None:
    logits, reference = map(jnp.asarray, batch)
    coarse = logits[:, ::2, :, ::3]
    found = deeply_supervised(cross_entropy_loss, [logits, coarse, coarse], reference, (3.0, 1.0, 0.0))
    expected = 3 * cross_entropy_loss(logits, reference) + cross_entropy_loss(coarse, reference[:, 1::2, :, 1::3])
    np.testing.assert_allclose(found, expected / 4, rtol=1e-6)


def test_weights_of_grids_are_nnunets() -> None:
    assert supervision_weights(0) == (1.0,)
    np.testing.assert_allclose(supervision_weights(3), np.array([1, 0.5, 0.25, 0]) / 1.75)
