"""Losses for lesions that fill a thousandth of a scan. Pure functions of logits and a reference.

`B` items, the lesion class last of two. A sum over voxels that divides another is smoothed by `s` = 1e-5 voxels, as MONAI's and
nnU-Net's: a patch without lesion has a gradient, and an empty prediction of it the loss 0.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

_SMOOTH = 1e-5

Loss = Callable[[Array, Array], Array]
"""`(logits (B, X, Y, Z, 2), reference (B, X, Y, Z)) -> scalar`."""


def normalised_dice_loss(probability: Array, reference: Array, r: float = 0.001) -> Array:
    """`1 - (2TP + s) / (κ·FP + 2TP + FN + s)`, soft, averaged over the batch.

    `TP = Σ p·g`, `FP = Σ p·(1-g)`, `FN = Σ (1-p)·g` over the voxels of each item, `κ = (1-r)·|G| / (r·(V-|G|))`, and 1 where
    the reference `G` is empty or everything. Source: arXiv 2302.05432.

    probability, reference: `(B, X, Y, Z)`, of the lesion class, floating point. Returns a scalar.
    """
    true = _sum(probability * reference)
    false = _sum(probability * (1 - reference))
    missed = _sum((1 - probability) * reference)
    positive = _sum(reference)
    negative = _sum(1 - reference)
    kappa = jnp.where((positive > 0) & (negative > 0), (1 - r) * positive / (r * jnp.maximum(negative, 1)), 1.0)
    score = (2 * true + _SMOOTH) / (kappa * false + 2 * true + missed + _SMOOTH)
    return (1 - score).mean()


def dice_loss(probability: Array, reference: Array, over_batch: bool = False) -> Array:
    """`1 - (2·Σ p·g + s) / (Σ p + Σ g + s)`, averaged over the batch; shapes as `normalised_dice_loss`.

    over_batch: sums run over the voxels of all items together, as nnU-Net's do, so that a patch without lesion does not count as
    a lesion missed. MONAI's `DiceLoss` of the lesion class.
    """
    if over_batch:
        probability, reference = (x.reshape(1, -1) for x in (probability, reference))
    total = _sum(probability) + _sum(reference)
    return (1 - (2 * _sum(probability * reference) + _SMOOTH) / (total + _SMOOTH)).mean()


def focal_loss(logits: Array, reference: Array, gamma: float = 2.0, activation: str = "softmax") -> Array:
    """`-(1 - p_t)^γ · log p_t`, averaged over all voxels; `p_t` is the probability of the voxel's own class.

    logits: `(B, X, Y, Z, 2)`. reference: `(B, X, Y, Z)`, 0 or 1. activation: `softmax` of both logits, as the published scripts, or
    `sigmoid` of the lesion's alone, as MONAI's `FocalLoss(include_background=False)`, whose softmax would be of one logit and the
    loss always 0. Returns a scalar. Source: Lin et al., Focal loss for dense object detection, arXiv 1708.02002.
    """
    log_p_t = _log_own(logits, reference) if activation == "softmax" else _log_own_sigmoid(logits, reference)
    return _mean(-((1 - jnp.exp(log_p_t)) ** gamma) * log_p_t)


def _log_own(logits: Array, reference: Array) -> Array:
    odds = _log_odds(logits)
    return jax.nn.log_sigmoid(jnp.where(reference > 0, odds, -odds))


def _log_odds(logits: Array) -> Array:
    """Of the lesion class: its sigmoid is the softmax of both, several times faster on CPU than one over an axis of two."""
    return logits[..., 1] - logits[..., 0]


def _log_own_sigmoid(logits: Array, reference: Array) -> Array:
    return jax.nn.log_sigmoid(jnp.where(reference > 0, logits[..., 1], -logits[..., 1]))


def cross_entropy_loss(logits: Array, reference: Array) -> Array:
    """`-log p_t`, averaged over all voxels; shapes as `focal_loss`."""
    return _mean(-_log_own(logits, reference))


def blob_loss(probability: Array, instances: Array, most: int) -> Array:
    """The Dice loss of each instance alone, averaged over an item's instances and then over the items that have any; 0 without any.

    For instance `n` all voxels of other instances are left out of prediction and reference:
    `L_n = 1 - (2·Σ_{G_n} p + s) / (Σ_{G_n ∪ background} p + |G_n| + s)`. A lesion of ten voxels counts as one of a thousand.
    Source: Kofler et al., blob loss, arXiv 2205.08209.

    probability: `(B, X, Y, Z)`. instances: `(B, X, Y, Z)` integers, 0 for background, instances numbered from 1. most: instances
    of one item that can be told apart; those with higher numbers count as the last one. Returns a scalar.
    """

    def item(p: Array, labels: Array) -> tuple[Array, Array]:
        labels = jnp.minimum(labels.astype(jnp.int32), most).reshape(-1)
        held = jax.ops.segment_sum(p.reshape(-1), labels, most + 1)
        size = jax.ops.segment_sum(jnp.ones_like(p).reshape(-1), labels, most + 1)[1:]
        each = 1 - (2 * held[1:] + _SMOOTH) / (held[0] + held[1:] + size + _SMOOTH)
        there = size > 0
        return jnp.where(there, each, 0).sum() / jnp.maximum(there.sum(), 1).astype(p.dtype), there.any()

    each, there = jax.vmap(item)(probability, instances)
    return each.sum() / jnp.maximum(there.sum(), 1).astype(each.dtype)


def _sum(x: Array) -> Array:
    """Over the voxels of each item. Of one flat axis, because XLA on CPU adds up several one after the other, in float32."""
    return x.reshape(len(x), -1).sum(-1)


def _mean(x: Array) -> Array:
    """Over all voxels; flat as `_sum`."""
    return x.reshape(-1).mean()


LOSSES = ("normalised_dice", "dice", "focal", "cross_entropy", "blob")


def weighted_sum(
    weights: Mapping[str, float],
    *,
    dice_r: float = 0.001,
    dice_over_batch: bool = False,
    focal_gamma: float = 2.0,
    focal_activation: str = "softmax",
    most_instances: int = 64,
) -> Loss:
    """The sum of losses, each times its weight. The paper's is `{"normalised_dice": 0.5, "focal": 1.0}`.

    weights: by names of `LOSSES`. The options are those of the functions above. The reference of the loss is a mask, or with
    `blob` a map of instances. Raises ValueError for another name.
    """
    if unknown := set(weights) - set(LOSSES):
        raise ValueError(f"loss {sorted(unknown)[0]!r} is unknown; known are {', '.join(LOSSES)}")

    def loss(logits: Array, reference: Array) -> Array:
        logits = logits.astype(jnp.float32)
        probability = jax.nn.sigmoid(_log_odds(logits))
        mask = (reference > 0).astype(jnp.float32)
        parts: dict[str, Callable[[], Array]] = {
            "normalised_dice": lambda: normalised_dice_loss(probability, mask, dice_r),
            "dice": lambda: dice_loss(probability, mask, dice_over_batch),
            "focal": lambda: focal_loss(logits, mask, focal_gamma, focal_activation),
            "cross_entropy": lambda: cross_entropy_loss(logits, mask),
            "blob": lambda: blob_loss(probability, reference, most_instances),
        }
        return sum((weight * parts[name]() for name, weight in weights.items() if weight), jnp.float32(0))

    return loss


def deeply_supervised(loss: Loss, logits: Sequence[Array], reference: Array, weights: Sequence[float]) -> Array:
    """`Σ_i w_i · loss(logits_i, reference on their grid) / Σ_i w_i`.

    logits: `(B, *grid_i, 2)`, the finest first, on grids that divide the reference's. The reference is taken at the voxel nearest
    to the centre of each coarse one, as nnU-Net does.
    """
    parts = [w * loss(y, at_nearest(reference, y.shape[1:-1])) for w, y in zip(weights, logits, strict=True) if w]
    return sum(parts, jnp.float32(0)) / sum(weights)


def supervision_weights(heads: int) -> tuple[float, ...]:
    """nnU-Net's, for the finest logits and `heads` coarser ones: 1, 1/2, 1/4, …, the coarsest of several 0, over their sum.

    >>> supervision_weights(3)
    (0.5714285714285714, 0.2857142857142857, 0.14285714285714285, 0.0)
    """
    weights = [0.5**i for i in range(heads + 1)]
    if heads:
        weights[-1] = 0.0
    return tuple(w / sum(weights) for w in weights)


def at_nearest(reference: Array, grid: Sequence[int]) -> Array:
    """`(B, X, Y, Z)` on a coarser grid: at index `⌊(i + 1/2)·N/n⌋` of each axis."""
    for axis, (n, to) in enumerate(zip(reference.shape[1:], grid, strict=True), 1):
        if n != to:
            reference = reference.take(((jnp.arange(to) * 2 + 1) * n) // (2 * to), axis=axis)
    return reference
