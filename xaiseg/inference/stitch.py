"""The stitched prediction: the network over all windows of a volume, blended, as one pure function of the volume."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from xaiseg._types import LocalFn, LogitsFn, TappedFn
from xaiseg.inference.windows import Triple, WindowPlan, plan_windows
from xaiseg.models import Model

WindowDone = Callable[[], None]


@dataclass(frozen=True)
class StitchedPredictor:
    """`predictor(x)` maps a volume `(X, Y, Z, C)` of any size to its blended logits `(X, Y, Z, classes)`.

    It is a pure function of `x` and may be differentiated. Windows run one after another through one compiled step. Inside `jit`
    set `scan`, or the program holds the network once per window; on CPU a scan's gradient is slow, so it is not the default.

    logits_fn: see `_types.LogitsFn`. tapped_fn: the same network with taps, for class-activation maps.
    target_class: the lesion's logit. local_fn: the logits of a tile, which makes Jacobian rows cheaper and changes none.
    tiling: where windows lie, `monai` or `nnunet`. output_activation: of the logits, `softmax` over classes or `sigmoid` of each.
    """

    logits_fn: LogitsFn
    window: Triple
    overlap: float = 0.25
    blending: str = "gaussian"
    target_class: int = 1
    tapped_fn: TappedFn | None = None
    scan: bool = False
    local_fn: LocalFn | None = None
    tiling: str = "monai"
    output_activation: str = "softmax"

    def __post_init__(self) -> None:
        # A Partial is a pytree: compiled steps take the network as an argument, its parameters are not baked in as constants.
        for name in ("logits_fn", "tapped_fn"):
            function = getattr(self, name)
            if function is not None and not isinstance(function, Partial):
                object.__setattr__(self, name, Partial(function))

    @classmethod
    def of(cls, model: Model) -> "StitchedPredictor":
        spec = model.spec
        return cls(
            model.logits_fn,
            spec.window,
            spec.overlap,
            spec.blending,
            spec.target_class,
            model.tapped_fn,
            local_fn=model.local_fn,
            tiling=spec.tiling,
            output_activation=spec.output_activation,
        )

    def plan(self, shape: tuple[int, ...]) -> WindowPlan:
        x, y, z = shape[:3]
        return plan_windows((x, y, z), self.window, self.overlap, self.blending, self.tiling)

    def __call__(self, x: Array, progress: WindowDone | None = None) -> Array:
        plan = self.plan(x.shape)
        padded = pad(x, plan)
        window = jax.ShapeDtypeStruct((1, *self.window, x.shape[-1]), x.dtype)
        logits = jax.eval_shape(self.logits_fn, window)
        jax.eval_shape(lambda y: class_logit(y, self.window, self.target_class), logits)
        total = jnp.zeros((*plan.padded_shape, logits.shape[-1]), x.dtype)
        weight = jnp.asarray(plan.weight, x.dtype)
        if self.scan:
            total, _ = jax.lax.scan(
                lambda acc, start: (_add_window(self.logits_fn, padded, weight, acc, start), None), total, plan.starts
            )
        else:
            for start in plan.starts:
                total = _add_window_jit(self.logits_fn, padded, weight, total, start)
                if progress is not None:
                    jax.block_until_ready(total)
                    progress()
        blended = total / jnp.asarray(plan.total_weight, x.dtype)[..., None]
        return unpad(blended, plan)

    def probability(self, logits: Array) -> Array:
        """Probability of the lesion class: softmax over classes; sigmoid where so trained, and for a single logit."""
        if logits.shape[-1] == 1 or self.output_activation == "sigmoid":
            return jax.nn.sigmoid(logits[..., self.target_class])
        return jax.nn.softmax(logits, axis=-1)[..., self.target_class]

    def most_probable(self, logits: Array) -> Array:
        """Where the lesion class is the most probable one, as a mask; a sigmoid's class where it is more probable than not."""
        if logits.shape[-1] == 1 or self.output_activation == "sigmoid":
            return logits[..., self.target_class] > 0
        return jnp.argmax(logits, axis=-1) == self.target_class


def class_logit(logits: Array, window: tuple[int, ...], target_class: int) -> Array:
    """The logits `window` of one class of a single window, from `(1, *window, classes)`; checked when traced.

    Raises ValueError where the logits have another shape, or no such class: JAX would take the nearest one.
    """
    if logits.ndim != len(window) + 2 or logits.shape[:-1] != (1, *window):
        raise ValueError(f"logits have shape {logits.shape} for a window {window}, expected {(1, *window)} and classes")
    if target_class not in range(logits.shape[-1]):
        raise ValueError(
            f"target_class is {target_class}, but the network has {logits.shape[-1]} classes, numbered from 0"
        )
    return logits[0, ..., target_class]


def pad(x: Array, plan: WindowPlan) -> Array:
    """Zeros around a volume `(X, Y, Z, C)` that is smaller than a window."""
    return jnp.pad(x, (*plan.padding, (0, 0)))


def unpad(x: Array, plan: WindowPlan) -> Array:
    return x[tuple(slice(lo, lo + n) for (lo, _), n in zip(plan.padding, plan.shape, strict=True))]


def cut(padded: Array, start: Array | np.ndarray, window: tuple[int, ...]) -> Array:
    """The window `(*window, C)` that begins at `start` `(3,)`, which may be traced."""
    return jax.lax.dynamic_slice(padded, _corner(start), (*window, padded.shape[-1]))


def _corner(start: Array | np.ndarray) -> Array:
    return jnp.pad(jnp.asarray(start), (0, 1))


def _add_window(logits_fn: LogitsFn, padded: Array, weight: Array, total: Array, start: Array | np.ndarray) -> Array:
    corner = _corner(start)
    window = cut(padded, start, weight.shape)
    blended = logits_fn(window[None])[0] * weight[..., None]
    seen = jax.lax.dynamic_slice(total, corner, blended.shape)
    return jax.lax.dynamic_update_slice(total, seen + blended, corner)


_add_window_jit = partial(jax.jit, donate_argnums=3)(_add_window)
