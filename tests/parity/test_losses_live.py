"""Losses beside MONAI's and nnU-Net's, on random and on degenerate inputs."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch, MONAI and nnU-Net deprecate while they are imported
    torch = pytest.importorskip("torch")
    monai_losses = pytest.importorskip("monai.losses")
    compound = pytest.importorskip("nnunetv2.training.loss.compound_losses")
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from training.losses import (
    cross_entropy_loss,
    deeply_supervised,
    dice_loss,
    focal_loss,
    supervision_weights,
    weighted_sum,
)

pytestmark = pytest.mark.parity
SHAPE = (3, 8, 6, 10)


def references():
    rng = np.random.default_rng(0)
    some = (rng.random(SHAPE) < 0.1).astype(np.float32)
    partly = some.copy()
    partly[1] = 0
    one_voxel = np.zeros(SHAPE, np.float32)
    one_voxel[:, 2, 3, 4] = 1
    return {"some": some, "one item empty": partly, "one voxel": one_voxel, "empty": some * 0, "full": some * 0 + 1}


def predictions():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(*SHAPE, 2)).astype(np.float32)
    sure = np.zeros_like(logits)
    sure[..., 0] = 40  # background, nearly everywhere
    sure[:, :2, ..., 0], sure[:, :2, ..., 1] = 0, 40
    return {"random": logits, "equal": np.zeros_like(logits), "sure": sure}


CASES = [
    pytest.param(logits, reference, id=f"{a}, {b}")
    for a, logits in predictions().items()
    for b, reference in references().items()
]


def to_torch(logits, reference):
    return torch.from_numpy(np.moveaxis(logits, -1, 1).copy()), torch.from_numpy(reference[:, None].copy())


def close(found, expected):
    # sums of 1440 float32 terms, of order one
    np.testing.assert_allclose(float(found), float(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize(("logits", "reference"), CASES)
def test_dice_is_monais(logits, reference, over_batch):
    theirs = monai_losses.DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=over_batch)
    p = jax.nn.softmax(jnp.asarray(logits))[..., 1]
    close(dice_loss(p, jnp.asarray(reference), over_batch), theirs(*to_torch(logits, reference)))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize(("logits", "reference"), CASES)
def test_focal_without_background_is_monais(logits, reference, gamma):
    theirs = monai_losses.FocalLoss(include_background=False, to_onehot_y=True, gamma=gamma)
    found = focal_loss(jnp.asarray(logits), jnp.asarray(reference), gamma, "sigmoid")
    close(found, theirs(*to_torch(logits, reference)))


@pytest.mark.parametrize(("logits", "reference"), CASES)
def test_focal_is_that_of_the_published_scripts(logits, reference):
    y, g = to_torch(logits, reference)
    each = torch.nn.functional.cross_entropy(y, g[:, 0].long(), reduction="none")
    theirs = ((1 - torch.exp(-each)) ** 2 * each).mean()
    close(focal_loss(jnp.asarray(logits), jnp.asarray(reference)), theirs)


@pytest.mark.parametrize(("logits", "reference"), CASES)
def test_cross_entropy_is_pytorchs(logits, reference):
    y, g = to_torch(logits, reference)
    close(
        cross_entropy_loss(jnp.asarray(logits), jnp.asarray(reference)),
        torch.nn.functional.cross_entropy(y, g[:, 0].long()),
    )


@pytest.mark.parametrize(("logits", "reference"), CASES)
def test_deeply_supervised_dice_and_cross_entropy_are_nnunets(logits, reference):
    """Theirs is from -1 to 0 where ours is from 0 to 1."""
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    theirs = compound.DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
    weights = supervision_weights(2)
    coarse = logits[:, ::2], logits[:, ::4, :, ::5]
    targets = reference, reference[:, 1::2], reference[:, 2::4, :, 2::5]
    pairs = [to_torch(y, g) for y, g in zip((logits, *coarse), targets, strict=True)]
    expected = DeepSupervisionWrapper(theirs, weights)([y for y, _ in pairs], [g for _, g in pairs])
    ours = weighted_sum({"dice": 1.0, "cross_entropy": 1.0}, dice_over_batch=True)
    found = deeply_supervised(ours, [jnp.asarray(y) for y in (logits, *coarse)], jnp.asarray(reference), weights)
    close(found, expected + 1)
