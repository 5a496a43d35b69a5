"""Training beside PyTorch's: the same first weights, the same batches, 20 steps of each of the paper's networks.

Their losses and parameters stay together. Adam takes steps of the learning rate in the direction of a gradient however small: where
one is a rounding, it goes where the rounding says: the learning rate is four times the paper's and not more, and a bias ahead of a
norm, which has no effect at all, is left out.
"""

import re
import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch and MONAI deprecate while they are imported
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")

from scripts import train_in_torch
from scripts.benchmarks.networks import model_of, state_of, trainable_network
from training.augment import Augmentation
from training.config import Config
from training.losses import weighted_sum
from training.step import initial_state, make_step

pytestmark = pytest.mark.parity

STEPS = 20
PATCHES = {"unet": (32, 32, 32), "dynunet": (32, 32, 32), "swin_unetr": (64, 32, 32)}
OPTIMISERS = {
    "adam": {"optimiser": "adam", "learning_rate": 4e-5},
    "adamw": {"optimiser": "adamw", "learning_rate": 4e-5, "weight_decay": 1e-2, "schedule": "polynomial"},
    "sgd": {"optimiser": "sgd", "learning_rate": 1e-2, "weight_decay": 3e-5, "clip": 12.0, "schedule": "cosine"},
}
CASES = [("unet", "adam"), ("unet", "sgd"), ("dynunet", "adamw"), ("dynunet", "sgd"), ("swin_unetr", "sgd")]


def batches(patch):
    """Bright blobs on noise; one item of each batch has none."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        reference = np.zeros((2, *patch), np.float32)
        x, y, z = (rng.integers(4, n - 8) for n in patch)
        reference[0, x : x + 6, y : y + 5, z : z + 7] = 1
        image = rng.normal(size=(2, *patch, 2)) + reference[..., None] * np.array([2.0, -1.0])
        yield image.astype(np.float32), reference


def papers_loss(logits, reference):
    """0.5 · normalised Dice + focal, written from the formulas."""
    p = torch.softmax(logits, 1)[:, 1].flatten(1)
    g = reference.flatten(1)
    size, voxels = g.sum(1), g.shape[1]
    kappa = torch.where(size > 0, 0.999 * size / (0.001 * (voxels - size)), torch.ones_like(size))
    tp, fp, fn = (p * g).sum(1), (p * (1 - g)).sum(1), ((1 - p) * g).sum(1)
    dice = 1 - ((2 * tp + 1e-5) / (kappa * fp + 2 * tp + fn + 1e-5)).mean()
    each = torch.nn.functional.cross_entropy(logits, reference.long(), reduction="none")
    return 0.5 * dice + ((1 - torch.exp(-each)) ** 2 * each).mean()


def theirs(net, name, config):
    rate, decay = config.learning_rate, config.weight_decay
    kinds = {
        "adam": lambda p: torch.optim.Adam(p, rate, weight_decay=decay),
        "adamw": lambda p: torch.optim.AdamW(p, rate, weight_decay=decay),
        "sgd": lambda p: torch.optim.SGD(p, rate, 0.99, weight_decay=decay, nesterov=True),
    }
    optimiser = kinds[config.optimiser](net.parameters())
    curves = {
        "constant": lambda t: 1.0,
        "polynomial": lambda t: (1 - t / STEPS) ** 0.9,
        "cosine": lambda t: (1 + np.cos(np.pi * t / STEPS)) / 2,
    }
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, curves[config.schedule])
    losses = []
    for images, references in batches(config.patch):
        optimiser.zero_grad()
        logits = net(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
        loss = papers_loss(logits, torch.from_numpy(references))
        loss.backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return losses, model_of(name, state_of(net), config.patch).variables


def ours(variables, config):
    state, step, losses = initial_state(config, variables), make_step(config), []
    for number, (images, references) in enumerate(batches(config.patch)):
        state, loss = step(state, images, references, np.int32(number))
        losses.append(float(loss))
    return losses, state.variables(averaged=False)


def without_effect(name, path):
    """A bias ahead of a norm; of the U-Net the logits' is the only one that has none behind it."""
    return name == "unet" and re.search(r"_conv/bias$", path) and not path.endswith("decoder0_conv/bias")


@pytest.mark.parametrize(("name", "optimiser"), CASES)
def test_twenty_steps_are_pytorchs(name, optimiser):
    net = trainable_network(name)
    model = model_of(name, state_of(net), PATCHES[name])
    config = replace(
        Config(),
        architecture=name,
        options=dict(model.spec.options),
        patch=PATCHES[name],
        window=PATCHES[name],
        batch=2,
        steps=STEPS,
        augmentation=Augmentation(),
        **OPTIMISERS[optimiser],
    )
    losses, variables = ours(model.variables, config)
    expected, wanted = theirs(net, name, config)
    # the networks learn something in these steps
    assert np.mean(expected[-3:]) < np.mean(expected[:3])
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    found, wanted = (dict(jax.tree_util.tree_leaves_with_path(dict(v))) for v in (variables, wanted))
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        path = "/".join(str(part.key) for part in key)
        if not without_effect(name, path):
            np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-3, err_msg=path)
    started = dict(jax.tree_util.tree_leaves_with_path(dict(model.variables)))
    moved = max(float(np.abs(value - np.asarray(started[key])).max()) for key, value in wanted.items())
    assert moved > (5e-3 if optimiser == "sgd" else 3e-4)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("over_batch", [False, True])
def test_the_loss_of_the_script_that_trains_in_pytorch(over_batch, empty):
    weights = {"dice": 1.0, "cross_entropy": 0.5, "focal": 2.0, "normalised_dice": 0.25}
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 6, 7, 2)).astype(np.float32)
    reference = (rng.random((3, 5, 6, 7)) > (1 if empty else 0.9)).astype(np.float32)
    config = Config(loss=weights, dice_over_batch=over_batch)
    got = train_in_torch._loss(config, torch.from_numpy(np.moveaxis(logits, -1, 1)), torch.from_numpy(reference))
    expected = weighted_sum(weights, dice_over_batch=over_batch)(logits, reference)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
