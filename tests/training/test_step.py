"""A step: optimiser, schedules, averages, accumulation, heads, precision, devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.augment import PAPER, Augmentation
from training.config import Config
from training.optimiser import learning_rate_of, optimiser_of, plateau_factor
from training.step import batch_mesh, initial_state, make_step

PLAIN = Augmentation()


def batch(items: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = np.zeros((items, 8, 8, 8), np.uint8)
    reference[:, 2:5, 3:6, 1:4] = 1
    image = rng.normal(size=(items, 8, 8, 8, 2)) + reference[..., None]
    return image.astype(np.float32), reference


def run(config: Config, count: int = 2, mesh=None, batches=None):
    state, step, losses = initial_state(config), make_step(config, mesh), []
    for number in range(count):
        images, references = batches[number] if batches else batch(config.batch)
        state, loss = step(state, images, references, np.int32(number))
        losses.append(float(loss))
    return state, losses


def close(a, b, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.05, 0.1, 0.1, 0.1, 0.1]),
        ("cosine", [0, 0.05, *(0.05 * (1 + np.cos(np.pi * np.arange(4) / 8)))]),
        ("polynomial", [0, 0.05, *(0.1 * (1 - np.arange(4) / 8) ** 0.9)]),
    ],
)
def test_schedules_are_their_formulas_after_the_warm_up(tiny: Config, schedule: str, expected: list[float]) -> None:
    rate = learning_rate_of(replace(tiny, steps=10, warmup=2, learning_rate=0.1, schedule=schedule))
    np.testing.assert_allclose([float(rate(n)) for n in range(6)], expected, rtol=1e-6)


def test_a_plateau_halves_the_rate(tiny: Config) -> None:
    config = replace(tiny, schedule="plateau", optimiser="sgd", momentum=0.0, learning_rate=1.0, validate_every=2)
    config = replace(config, weight_decay=0.0)
    optimiser, params = optimiser_of(config), {"w": jnp.ones(())}
    state, sizes = optimiser.init(params), []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(16):
            updates, state = optimiser.update({"w": jnp.ones(())}, state, params, value=jnp.float32(3.0))
            sizes.append(-float(updates["w"]))
    assert sizes[:10] == [1.0] * 10
    assert sizes[-1] == plateau_factor(state) == 0.5
    adam = optimiser_of(replace(config, schedule="cosine", optimiser="adam"))
    assert plateau_factor(adam.init({"norm": {"scale": jnp.zeros(2)}})) == 1  # a norm's scale is another


def test_sgd_takes_decay_into_momentum_as_pytorch_does(tiny: Config) -> None:
    config = replace(
        tiny, optimiser="sgd", momentum=0.9, learning_rate=0.1, schedule="constant", weight_decay=0.5, clip=1.0
    )
    optimiser = optimiser_of(config)
    w = np.float32(2.0)
    state, velocity, expected = optimiser.init({"w": jnp.float32(w)}), 0.0, float(w)
    for _ in range(3):
        updates, state = optimiser.update({"w": jnp.float32(4.0)}, state, {"w": jnp.float32(w)}, value=jnp.float32(0))
        w = w + updates["w"]
        gradient = 1.0 + 0.5 * expected  # clipped, then decayed
        velocity = 0.9 * velocity + gradient
        expected -= 0.1 * (gradient + 0.9 * velocity)
        assert float(w) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_accumulated_batches_are_one_large_one(tiny: Config) -> None:
    """Without batch norm, and with a loss that is a mean over items."""
    options = {**tiny.options, "norm": "instance"}
    config = replace(
        tiny, options=options, augmentation=PLAIN, optimiser="sgd", momentum=0.0, schedule="constant", batch=4
    )
    images, references = batch(4)
    large, _ = run(config, 1, batches=[(images, references)])
    halves = [(images[:2], references[:2]), (images[2:], references[2:])]
    small, _ = run(replace(config, batch=2, accumulate=2), 2, batches=halves)
    close(small.params, large.params)
    started = initial_state(config)
    assert (
        max(
            float(jnp.abs(a - b).max())
            for a, b in zip(*map(jax.tree.leaves, (started.params, large.params)), strict=True)
        )
        > 1e-4
    )


def test_the_average_follows_the_parameters(tiny: Config) -> None:
    config = replace(tiny, average=0.75, augmentation=PLAIN)
    expected = jax.tree.map(np.asarray, initial_state(config).params)
    for count in (1, 2, 3):
        state, _ = run(config, count)
        expected = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * np.asarray(p), expected, state.params)
    close(state.average, expected)


@pytest.mark.slow
def test_coarser_grids_are_supervised(tiny: Config) -> None:
    options = {
        "filters": [4, 6, 8, 8],
        "kernel_size": [3] * 4,
        "strides": [1, 2, 2, 2],
        "upsample_kernel_size": [2] * 3,
    }
    config = replace(tiny, architecture="dynunet", options={**options, "heads": 2}, augmentation=PLAIN)
    assert config.heads == 2
    before, (after, _) = initial_state(config).params, run(config, 1)
    moved = {
        name: float(jnp.abs(after.params[name]["kernel"] - before[name]["kernel"]).max()) for name in ("head1", "head2")
    }
    assert moved["head1"] > 1e-4
    # nnU-Net gives the coarsest grid no weight: weight decay alone moves it
    assert moved["head2"] < moved["head1"] / 10


@pytest.mark.slow
def test_bfloat16_keeps_float32_masters(tiny: Config) -> None:
    config = replace(tiny, augmentation=PLAIN)
    _, exact = run(config, 3)
    state, rounded = run(replace(config, precision="bfloat16"), 3)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))} == {np.dtype(np.float32)}
    # bfloat16 has 8 bits: errors of a percent
    np.testing.assert_allclose(rounded, exact, rtol=0.03)
    assert rounded != exact


@pytest.mark.parametrize("augmentation", [PLAIN, pytest.param(PAPER, marks=pytest.mark.slow)], ids=["plain", "paper"])
def test_two_devices_are_one(tiny: Config, augmentation: Augmentation) -> None:
    """Batch norm is that of the whole batch, and each patch is augmented alike."""
    config = replace(tiny, batch=4, augmentation=augmentation, optimiser="sgd", momentum=0.9)
    one, losses = run(config, 2)
    two, shared = run(config, 2, batch_mesh(2, 4))
    np.testing.assert_allclose(shared, losses, rtol=1e-5)
    close((two.params, two.batch_stats), (one.params, one.batch_stats), rtol=1e-4)  # sums in another order
    assert len(jax.tree.leaves(two.params)[0].devices()) == 2


def test_devices_that_cannot_share_a_batch() -> None:
    assert batch_mesh(1, 3) is None
    with pytest.raises(
        ValueError, match="2 devices: 2 are there, and a batch of 3 is shared evenly; give a divisor of 3"
    ):
        batch_mesh(2, 3)
    with pytest.raises(ValueError, match="4 devices: 2 are there"):
        batch_mesh(4, 4)
