"""The training loop, to be read from top to bottom."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from training.cases import Cases
from training.config import Config
from training.dataset import load_volumes
from training.files import Stopped, write_whole
from training.folder import Log, open_folder
from training.optimiser import learning_rate_of, plateau_factor
from training.pipeline import Batches, batches
from training.splits import write_splits
from training.step import State, batch_mesh, initial_state, make_step
from training.validate import Score, validate
from training.volumes import Volume
from xaiseg.checkpoints import save_model
from xaiseg.errors import InputError
from xaiseg.models import Model

Say = Callable[[str], Any]


def train(
    config: Config,
    cases: Cases,
    out: Path,
    command: str = "training.loop.train",
    say: Say = print,
    *,
    devices: int = 1,
    stop: Callable[[], bool] = lambda: False,
    tensorboard: bool = False,
    plans: str = "",
) -> Path:
    """Train until `config.steps`, or it gets no better, from the last checkpoint in `out` if there is one; returns `out/model`.

    An interrupted and resumed run ends with the same parameters, bit for bit, as one that was not interrupted, on the same
    machine and number of devices.

    command: written into the model as its source. devices: of this machine, that share each batch. plans: nnU-Net's, to keep in
    the folder. stop: asked after each step; where it says so the state is saved and `Stopped` raised.

    Raises InputError as `folder.open_folder`, where a scan cannot be used, no training case has a lesion, the loss diverges, or a
    checkpoint cannot be written.
    """
    out = open_folder(out, config, cases)
    if cases.folds and cases.patients and cases.loads:
        write_splits(out / "splits.tsv", cases.folds, cases.patients, cases.loads)
    if plans:
        write_whole(out / "plans.json", plans)
    training, validation = load_volumes(config, cases, out / "volumes", say)
    learning_rate = learning_rate_of(config)
    step_of = make_step(config, batch_mesh(devices, config.batch))
    with Checkpoints(out) as checkpoints:
        state, start = checkpoints.restore(initial_state(config))
        if start:
            say(f"resuming after step {start}")
        if config.patience and int(state.stale) >= config.patience:
            return out / "model"
        with Log(out, start, tensorboard) as log, source_of(config, training, start) as source:
            losses: list[Array] = []
            begun, waited = time.monotonic(), 0.0
            for done in range(start + 1, config.steps + 1):
                images, references = source.next()
                state, loss = step_of(state, images, references, np.int32(done - 1))
                losses.append(loss)
                stopping = stop()
                last = done == config.steps
                saving = done % config.checkpoint_every == 0 or last or stopping
                if done % config.log_every == 0 or saving:
                    mean = float(np.mean(jax.device_get(losses)))
                    if not np.isfinite(mean):
                        raise InputError(
                            f"{out}: the loss is {mean} at step {done}; expected a number: lower learning_rate"
                        )
                    seconds = (time.monotonic() - begun) / len(losses)
                    idle = (source.waited - waited) / (time.monotonic() - begun)
                    rate = float(learning_rate((done - 1) // config.accumulate)) * plateau_factor(state.optimiser)
                    log.write(
                        done, loss=mean, learning_rate=rate, seconds_per_step=round(seconds, 4), idle=round(idle, 4)
                    )
                    left = seconds * (config.steps - done) / 60
                    say(
                        f"step {done}/{config.steps}  loss {mean:.4f}  {seconds:.2f} s/step  "
                        f"{idle:.0%} waiting for data  {left:.0f} min left"
                    )
                    losses, begun, waited = [], time.monotonic(), source.waited
                if validation and (done % config.validate_every == 0 or last):
                    state, score = _validated(config, state, done, validation, out, command, checkpoints)
                    log.write(done, **score._asdict())
                    say(f"step {done}  validation  {describe(score)}")
                    if config.patience and int(state.stale) >= config.patience and not last:
                        say(f"no better for {config.patience} validations: stopping here")
                        last = saving = True
                    begun, waited = time.monotonic(), source.waited
                if last and not validation:
                    save_model(out / "model", model_of(config, state, done, command), overwrite=True)
                if saving:
                    checkpoints.save(done, state)
                if last:
                    break
                if stopping:
                    raise Stopped(f"stopped after step {done}")
    if not (out / "model").is_dir():
        raise InputError(
            f"{out / 'model'}: missing, although the run is finished; expected its model: remove {out} to train again"
        )
    return out / "model"


def _validated(
    config: Config,
    state: State,
    done: int,
    validation: Sequence[Volume],
    out: Path,
    command: str,
    checkpoints: "Checkpoints",
) -> tuple[State, Score]:
    """The state with what it now knows of its best, whose model is exported before the checkpoint of this step is written: a run
    killed in between validates and exports again."""
    if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
        raise InputError(f"{out}: parameters that are no numbers at step {done}; expected numbers: lower learning_rate")
    score = max(validate(model_of(config, state, done, command), validation, config.thresholds), key=lambda s: s.ndsc)
    if score.ndsc <= float(state.best):
        return state._replace(stale=state.stale + np.int32(1)), score
    state = state._replace(best=jnp.float32(score.ndsc), stale=jnp.int32(0))
    save_model(out / "model", model_of(config, state, done, command, score), overwrite=True)
    checkpoints.save_best(done, state)
    return state, score


def source_of(config: Config, volumes: Sequence[Volume], start: int) -> Batches:
    """The batches of the steps from `start` on."""
    return batches(
        volumes,
        patch=config.patch,
        batch=config.batch,
        steps=config.steps,
        seed=config.seed,
        start=start,
        positive_fraction=config.positive_fraction,
        forced=config.forced,
        margin=config.margin,
        instances=config.loss.get("blob", 0) > 0,
    )


class Checkpoints:
    """States by step, written by Orbax while the run goes on, committed by a rename: `last/` the newest two, `best/` the best."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.best, self.last = (self._manager(name, keep) for name, keep in (("best", 1), ("last", 2)))

    def _manager(self, name: str, keep: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        return ocp.CheckpointManager(self.out / "checkpoints" / name, options=options)

    def restore(self, fresh: State) -> tuple[State, int]:
        """The newest state and its step, or the fresh one and 0. What came after it is forgotten: it will come again."""
        start = self.last.latest_step() or 0
        for step in self.best.all_steps():
            if step > start:
                self.best.delete(step)
        if not start:
            return fresh, 0
        try:
            return State(*self.last.restore(start, args=ocp.args.StandardRestore(tuple(fresh)))), start
        except (ValueError, OSError) as error:
            folder = self.out / "checkpoints" / "last" / str(start)
            raise InputError(
                f"{folder}: cannot be read as a state of this config ({str(error).splitlines()[0]}); "
                "delete it to go on from the one before it, or choose another folder with --out"
            ) from error

    def save(self, step: int, state: State) -> None:
        self._save(self.last, step, state)

    def save_best(self, step: int, state: State) -> None:
        self._save(self.best, step, state)

    def _save(self, manager: ocp.CheckpointManager, step: int, state: State) -> None:
        try:
            manager.wait_until_finished()  # as `save` would; what it took is no longer free
            # found out before: threads that run out of room midway print tracebacks of their own
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if shutil.disk_usage(self.out).free < needed:
                raise OSError(f"it takes {-(-needed // 2**20)} MiB")
            manager.save(step, args=ocp.args.StandardSave(tuple(state)))
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> InputError:
        free = shutil.disk_usage(self.out).free // 2**20
        return InputError(
            f"{self.out / 'checkpoints'}: a checkpoint could not be written ({error}; {free} MiB are free); the earlier ones are "
            "intact: make room and give the same command again"
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            for manager in (self.best, self.last):
                manager.wait_until_finished()
                manager.close()
        except (OSError, ValueError) as error:
            if kind is None:
                raise self._failed(error) from error


def model_of(config: Config, state: State, step: int, command: str, score: Score | None = None) -> Model:
    notes: dict[str, Any] = {"step": step, "seed": config.seed}
    if score is not None:
        notes["validation"] = {name: round(value, 4) for name, value in score._asdict().items()}
    spec = config.spec(score.threshold if score else config.thresholds[0], command, notes)
    return Model(spec, state.variables(averaged=config.average > 0))


def describe(score: Score) -> str:
    return (
        f"nDSC {score.ndsc:.3f}  Dice {score.dice:.3f}  lesions found {score.tpr:.0%}  false {score.fdr:.0%}  "
        f"at threshold {score.threshold}"
    )
