"""Losses for lesions that fill a thousandth of a scan. Pure functions of logits and a reference mask."""

import jax
import jax.numpy as jnp
from jax import Array

_SMOOTH = 1e-5  # voxels: gives a patch without lesion a gradient, and an empty prediction of it the loss 0


def normalised_dice_loss(probability: Array, reference: Array, r: float = 0.001) -> Array:
    """`1 - (2TP + s) / (κ·FP + 2TP + FN + s)`, soft, averaged over the batch; s = 1e-5.

    `TP = Σ p·g`, `FP = Σ p·(1-g)`, `FN = Σ (1-p)·g` over the voxels of each item, `κ = (1-r)·|G| / (r·(V-|G|))`, and 1 where
    the reference `G` is empty or everything. Source: arXiv 2302.05432.

    probability, reference: `(B, X, Y, Z)`, of the lesion class, floating point. Returns a scalar.
    """
    axes = tuple(range(1, probability.ndim))
    true = (probability * reference).sum(axes)
    false = (probability * (1 - reference)).sum(axes)
    missed = ((1 - probability) * reference).sum(axes)
    positive = reference.sum(axes)
    negative = (1 - reference).sum(axes)
    kappa = jnp.where((positive > 0) & (negative > 0), (1 - r) * positive / (r * jnp.maximum(negative, 1)), 1.0)
    score = (2 * true + _SMOOTH) / (kappa * false + 2 * true + missed + _SMOOTH)
    return (1 - score).mean()


def focal_loss(logits: Array, reference: Array, gamma: float = 2.0) -> Array:
    """`mean(-(1 - p_t)^γ · log p_t)` over all voxels, `p_t` the softmax probability of the voxel's own class.

    logits: `(B, X, Y, Z, 2)`, the lesion class last. reference: `(B, X, Y, Z)`, 0 or 1. Returns a scalar.
    Source: Lin et al., Focal loss for dense object detection, arXiv 1708.02002.
    """
    log_p = jax.nn.log_softmax(logits)
    log_p_t = jnp.where(reference > 0, log_p[..., 1], log_p[..., 0])
    return (-((1 - jnp.exp(log_p_t)) ** gamma) * log_p_t).mean()


def combined_loss(
    logits: Array,
    reference: Array,
    dice_weight: float = 0.5,
    focal_weight: float = 1.0,
    dice_r: float = 0.001,
    focal_gamma: float = 2.0,
) -> Array:
    """`dice_weight · normalised_dice_loss + focal_weight · focal_loss`; shapes as `focal_loss`. The paper's loss."""
    probability = jax.nn.softmax(logits)[..., 1]
    dice = normalised_dice_loss(probability, reference, dice_r)
    return dice_weight * dice + focal_weight * focal_loss(logits, reference, focal_gamma)
