"""The optimiser of a config, from optax's parts."""

from typing import Any

import jax
import optax

from training.config import Config

_PLATEAU_PATIENCE = 5
_PLATEAU_FACTOR = 0.5


def updates_of(config: Config) -> int:
    """Updates of the parameters in the whole run."""
    return max(config.steps // config.accumulate, 1)


def learning_rate_of(config: Config) -> optax.Schedule:
    """The learning rate of each update, `plateau` apart, which multiplies it by what the losses were."""
    after = max(updates_of(config) - config.warmup, 1)
    schedules = {
        "constant": optax.constant_schedule(config.learning_rate),
        "plateau": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, after),
        "polynomial": optax.polynomial_schedule(config.learning_rate, 0.0, 0.9, after),
    }
    schedule = schedules[config.schedule]
    if not config.warmup:
        return schedule
    rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
    return optax.join_schedules([rise, schedule], [config.warmup])


def plateau_factor(state: Any) -> float:
    """What the learning rate is multiplied by after plateaus of the loss, from the optimiser's state; 1 for other schedules."""
    kind = optax.contrib.ReduceLROnPlateauState
    states = [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, kind)) if isinstance(s, kind)]
    return float(states[0].scale) if states else 1.0


def optimiser_of(config: Config) -> optax.GradientTransformationExtraArgs:
    """Clip, decay, direction, learning rate, as PyTorch's Adam, AdamW and SGD take them; `update(…, value=loss)`.

    Weight decay is added to the gradient in `sgd` and `adam`, and to the direction in `adamw`.
    """
    rate = optax.scale_by_learning_rate(learning_rate_of(config))
    coupled = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    if config.optimiser == "sgd":
        parts += [*coupled, optax.trace(config.momentum, nesterov=True), rate]
    elif config.optimiser == "adam":
        parts += [*coupled, optax.scale_by_adam(), rate]
    else:
        parts += [optax.scale_by_adam(), *coupled, rate]
    if config.schedule == "plateau":
        every = max(config.validate_every // config.accumulate, 1)
        parts.append(optax.contrib.reduce_on_plateau(_PLATEAU_FACTOR, _PLATEAU_PATIENCE, accumulation_size=every))
    chain = optax.with_extra_args_support(optax.chain(*parts))
    if config.accumulate > 1:
        chain = optax.with_extra_args_support(optax.MultiSteps(chain, config.accumulate).gradient_transformation())
    return chain
