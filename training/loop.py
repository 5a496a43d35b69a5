"""The training loop, to be read from top to bottom."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array

from training.cases import Cases
from training.config import Config
from training.folder import Log, open_folder
from training.losses import combined_loss
from training.patches import sample
from training.validate import Score, validate
from training.volumes import Volume, volume_of_case, volume_of_phantom
from xaiseg.checkpoints import save_model
from xaiseg.errors import InputError
from xaiseg.models import Model, build_network

Batch = tuple[np.ndarray, np.ndarray]


class State(NamedTuple):
    """Everything that changes. `best` is the highest validation nDSC so far, -1 before the first; float32 scalar."""

    params: Any
    batch_stats: Any
    optimiser: Any
    best: Array


def train(
    config: Config, cases: Cases, out: Path, command: str = "training.loop.train", say: Callable[[str], Any] = print
) -> Path:
    """Train until `config.steps`, from the last checkpoint in `out` if there is one; returns the model folder `out/model`.

    An interrupted and resumed run ends with the same parameters, bit for bit, as one that was not interrupted, on the same
    machine. `command` is written into the model as its source.

    Raises InputError as `folder.open_folder`, where a scan cannot be used, no training case has a lesion, or the loss diverges.
    """
    out = open_folder(out, config, cases)
    training, validation = load_volumes(config, cases, out / "volumes", say)
    optimiser, learning_rate = make_optimiser(config)
    train_step = make_train_step(config, optimiser)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(out / "checkpoints", options=options) as manager:
        state = initial_state(config, optimiser)
        start = manager.latest_step() or 0
        if start:
            state = State(*manager.restore(start, args=ocp.args.StandardRestore(tuple(state))))
            say(f"resuming after step {start}")
        log = Log(out / "log.jsonl", start)
        losses: list[Array] = []
        begun = time.monotonic()
        for step, batch in prefetched(config, training, start):
            state, loss = train_step(state, *batch)
            losses.append(loss)
            done, last = step + 1, step + 1 == config.steps
            checkpoint_due = done % config.checkpoint_every == 0 or last
            if done % config.log_every == 0 or checkpoint_due:
                mean = float(np.mean(jax.device_get(losses)))
                if not np.isfinite(mean):
                    raise InputError(
                        f"{out}: the loss is {mean} at step {done}; expected a number: lower learning_rate"
                    )
                rate = (time.monotonic() - begun) / (done - start)
                log.write(
                    step=done, loss=mean, learning_rate=float(learning_rate(step)), seconds_per_step=round(rate, 4)
                )
                left = rate * (config.steps - done) / 60
                say(f"step {done}/{config.steps}  loss {mean:.4f}  {rate:.2f} s/step  {left:.0f} min left")
                losses = []
            if validation and (done % config.validate_every == 0 or last):
                model = make_model(config, state, done, command)
                score = max(validate(model, validation, config.thresholds), key=lambda s: s.ndsc)
                log.write(step=done, **score._asdict())
                say(f"step {done}  validation  {describe(score)}")
                if score.ndsc > state.best:
                    state = state._replace(best=jnp.float32(score.ndsc))
                    # Before the checkpoint of this step: a run killed in between validates and exports again.
                    save_model(out / "model", make_model(config, state, done, command, score), overwrite=True)
            if last and not validation:
                save_model(out / "model", make_model(config, state, done, command), overwrite=True)
            if checkpoint_due:
                manager.save(done, args=ocp.args.StandardSave(tuple(state)))
    return out / "model"


def load_volumes(
    config: Config, cases: Cases, folder: Path, say: Callable[[str], Any] = print
) -> tuple[list[Volume], list[Volume]]:
    """The volumes to train on and to validate with."""
    makers = {
        "training": [partial(volume_of_case, folder, case) for case in cases.training]
        + [partial(volume_of_phantom, folder, seed) for seed in range(*config.phantoms or (0,))],
        "validation": [partial(volume_of_case, folder, case) for case in cases.validation]
        + [partial(volume_of_phantom, folder, seed) for seed in range(*config.validation_phantoms or (0,))],
    }
    volumes = {side: [make(config) for make in side_makers] for side, side_makers in makers.items()}
    voxels = sum(len(volume.lesion) for volume in volumes["training"])
    say(
        f"{len(volumes['training'])} cases to train on ({voxels} lesion voxels), {len(volumes['validation'])} to validate with"
    )
    if voxels == 0:
        names = ", ".join(volume.name for volume in volumes["training"][:3])
        raise InputError(
            f"training cases ({names}, …): no lesion voxel in any reference; expected some: check the masks"
        )
    return volumes["training"], volumes["validation"]


def prefetched(config: Config, volumes: Sequence[Volume], start: int) -> Iterator[tuple[int, Batch]]:
    """The steps from `start` and their batches, each cut while the step before it is computed."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(sample, config, volumes, start)
        for step in range(start, config.steps):
            batch = upcoming.result()
            if step + 1 < config.steps:
                upcoming = pool.submit(sample, config, volumes, step + 1)
            yield step, batch


def make_optimiser(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    schedules = {
        "constant": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, config.steps),
        "polynomial": optax.polynomial_schedule(config.learning_rate, 0.0, 0.9, config.steps),
    }
    schedule = schedules[config.schedule]
    return optax.adamw(schedule, weight_decay=config.weight_decay), schedule


def initial_state(config: Config, optimiser: optax.GradientTransformation) -> State:
    network = build_network(config.spec(config.thresholds[0]))
    x = jnp.zeros((1, *config.patch, len(config.channels)))
    variables = jax.jit(network.init)(jax.random.key(config.seed), x)
    params = variables["params"]
    return State(params, variables.get("batch_stats", {}), optimiser.init(params), jnp.float32(-1))


def make_train_step(
    config: Config, optimiser: optax.GradientTransformation
) -> Callable[[State, np.ndarray, np.ndarray], tuple[State, Array]]:
    """The compiled `(state, images, references) -> (state, loss)`."""
    network = build_network(config.spec(config.thresholds[0]))

    def loss_fn(params: Any, batch_stats: Any, images: Array, references: Array) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        (logits, _), updated = network.apply(variables, images, train=True, mutable=["batch_stats"])
        weights = (config.dice_weight, config.focal_weight, config.dice_r, config.focal_gamma)
        return combined_loss(logits, references, *weights), updated.get("batch_stats", {})

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: State, images: Array, references: Array) -> tuple[State, Array]:
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), grads = gradient(state.params, state.batch_stats, images, references)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an int32 count
            updates, moments = optimiser.update(grads, state.optimiser, state.params)
        return State(optax.apply_updates(state.params, updates), batch_stats, moments, state.best), loss

    return train_step


def make_model(config: Config, state: State, step: int, command: str, score: Score | None = None) -> Model:
    notes: dict[str, Any] = {"step": step, "seed": config.seed}
    if score is not None:
        notes["validation"] = {name: round(value, 4) for name, value in score._asdict().items()}
    spec = config.spec(score.threshold if score else config.thresholds[0], command, notes)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return Model(spec, {name: tree for name, tree in variables.items() if tree})


def describe(score: Score) -> str:
    return (
        f"nDSC {score.ndsc:.3f}  Dice {score.dice:.3f}  lesions found {score.tpr:.0%}  false {score.fdr:.0%}  "
        f"at threshold {score.threshold}"
    )
