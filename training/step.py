"""One step of the optimiser: a pure, compiled function of state and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from training.augment import augment
from training.config import Config
from training.losses import deeply_supervised, supervision_weights, weighted_sum
from training.optimiser import optimiser_of
from xaiseg.errors import InputError
from xaiseg.models import build_network
from xaiseg.models.convolution import learnt_kernels
from xaiseg.models.model import Variables
from xaiseg.models.precision import precision_of


class State(NamedTuple):
    """Everything that changes; what a checkpoint holds.

    params, batch_stats: of the network. optimiser: of optax. average: the moving average of the parameters, or nothing.
    best: the highest validation nDSC so far, float32, -1 before the first. stale: validations since, int32.
    """

    params: Any
    batch_stats: Any
    optimiser: Any
    average: Any
    best: Array
    stale: Array

    def variables(self, averaged: bool) -> Variables:
        """Of the network; `averaged` says that the moving average is there and is meant."""
        trees = {"params": self.average if averaged else self.params, "batch_stats": self.batch_stats}
        return {name: tree for name, tree in trees.items() if tree}


Step = Callable[[State, ArrayLike, ArrayLike, ArrayLike], tuple[State, Array]]
"""`(state, images (B, *patch, C), references (B, *patch), number of the step) -> (state, loss)`; the state given is used up."""


def initial_state(config: Config, variables: Variables | None = None) -> State:
    """Of fresh parameters, drawn with the config's seed, or of given ones."""
    if variables is None:
        network = build_network(config.spec(config.thresholds[0]))
        x = jnp.zeros((1, *config.patch, len(config.channels)))
        variables = jax.jit(network.init)(jax.random.key(config.seed), x)
    # copies: a step uses up the state that it is given
    params = jax.tree.map(jnp.array, variables["params"])
    average = jax.tree.map(jnp.copy, params) if config.average else ()
    statistics = jax.tree.map(jnp.array, dict(variables.get("batch_stats", {})))
    moments = optimiser_of(config).init(params)
    return State(params, statistics, moments, average, jnp.float32(-1), jnp.int32(0))


def make_step(config: Config, mesh: Mesh | None = None) -> Step:
    """The compiled step. Patches are augmented with keys of the config's seed, of the step and of their place in the batch.

    mesh: devices that share each batch, along its axis `batch`; its size must divide the batch. Batch norm and losses are those of
    the whole batch. Parameters are on every device.
    """
    network = build_network(config.spec(config.thresholds[0]))
    optimiser = optimiser_of(config)
    loss_of = weighted_sum(
        config.loss,
        dice_r=config.dice_r,
        dice_over_batch=config.dice_over_batch,
        focal_gamma=config.focal_gamma,
        focal_activation=config.focal_activation,
        most_instances=255,
    )
    heads = [f"head{i}" for i in range(1, config.heads + 1)]
    weights = supervision_weights(config.heads)

    def objective(params: Any, batch_stats: Any, images: Array, references: Array, key: Array) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        with precision_of(config.precision), learnt_kernels():
            (logits, taps), updated = network.apply(
                variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key}
            )
        outputs = [logits, *(taps[name] for name in heads)]
        return deeply_supervised(loss_of, outputs, references, weights), updated.get("batch_stats", {})

    def step(state: State, images: Array, references: Array, number: Array) -> tuple[State, Array]:
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        images, references = augment(key, images, references, config.augmentation, margin=config.margin, mesh=mesh)
        dropping = jax.random.fold_in(key, config.batch)  # augmentation has the numbers below
        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, batch_stats), grads = gradient(state.params, state.batch_stats, images, references, dropping)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an int32 count
            updates, moments = optimiser.update(grads, state.optimiser, state.params, value=loss)
            params = optax.apply_updates(state.params, updates)
            average = state.average
            if config.average:
                average = optax.incremental_update(params, average, 1 - config.average)
        return State(params, batch_stats, moments, average, state.best, state.stale), loss

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    everywhere, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    return jax.jit(
        step, donate_argnums=0, in_shardings=(everywhere, shared, shared, everywhere), out_shardings=everywhere
    )


def batch_mesh(devices: int, batch: int) -> Mesh | None:
    """A mesh of the first `devices` local devices; None for one. Raises InputError where it cannot share the batch."""
    available = jax.local_devices()
    if not 0 < devices <= len(available) or batch % devices:
        raise InputError(
            f"{devices} devices: {len(available)} are there, and a batch of {batch} is shared evenly; give a divisor of {batch} "
            f"of at most {len(available)}"
        )
    return Mesh(np.array(available[:devices]), ("batch",)) if devices > 1 else None
