"""The stitched prediction: the network over all windows of a volume, blended, as one pure function of the volume."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
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
    window: its sides; None for the whole volume in one piece, padded with zeros (half before, half after) to multiples of `stride`.
    target_class: the lesion's logit. local_fn: the logits of a tile, which makes Jacobian rows cheaper and changes none.
    tiling: where windows lie, `monai` or `nnunet`. output_activation: of the logits, `softmax` over classes or `sigmoid` of each.
    mesh: the devices that an explainer uses, see `devices.device_mesh`; None for JAX's default device.
    """

    logits_fn: LogitsFn
    window: Triple | None
    overlap: float = 0.25
    blending: str = "gaussian"
    target_class: int = 1
    tapped_fn: TappedFn | None = None
    scan: bool = False
    local_fn: LocalFn | None = None
    tiling: str = "monai"
    output_activation: str = "softmax"
    stride: Triple = (1, 1, 1)
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        # A Partial is a pytree: compiled steps take the network as an argument, its parameters are not baked in as constants.
        for name in ("logits_fn", "tapped_fn"):
            function = getattr(self, name)
            if function is not None and not isinstance(function, Partial):
                object.__setattr__(self, name, Partial(function))

    @classmethod
    def of(cls, model: Model, *, whole_volume: bool = False, mesh: Mesh | None = None) -> "StitchedPredictor":
        """The predictor of a model, as its spec says, or over the whole volume at once.

        Raises ValueError for the whole volume where the network takes none: a 2-D one, or one with windows of its own.
        """
        spec = model.spec
        local_fn = model.local_fn
        if local_fn is not None and not whole_volume and math.prod(local_fn.field) >= math.prod(spec.window):
            local_fn = None  # what is wider than the window saves nothing
        return cls(
            model.logits_fn,
            None if whole_volume else spec.window,
            spec.overlap,
            spec.blending,
            spec.target_class,
            model.tapped_fn,
            local_fn=local_fn,
            tiling=spec.tiling,
            output_activation=spec.output_activation,
            stride=model.stride if whole_volume else (1, 1, 1),
            mesh=mesh,
        )

    def plan(self, shape: tuple[int, ...]) -> WindowPlan:
        x, y, z = shape[:3]
        if self.window is None:
            a, b, c = (-(-n // s) * s for n, s in zip((x, y, z), self.stride, strict=True))
            return plan_windows((x, y, z), (a, b, c), 0.0, "constant")
        return plan_windows((x, y, z), self.window, self.overlap, self.blending, self.tiling)

    def fitted(self, plan: WindowPlan) -> "StitchedPredictor":
        """The same predictor, without local logits where a tile is wider than the windows of a plan."""
        local = self.local_fn
        if local is None or all(t <= w for t, w in zip(local.tile, plan.window, strict=True)):
            return self
        return replace(self, local_fn=None)

    def __call__(self, x: Array, progress: WindowDone | None = None) -> Array:
        plan = self.plan(x.shape)
        padded = pad(x, plan)
        window = jax.ShapeDtypeStruct((1, *plan.window, x.shape[-1]), x.dtype)
        logits = logits_shape(self.logits_fn, window)
        jax.eval_shape(lambda y: class_logit(y, plan.window, self.target_class), logits)
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


def logits_shape(logits_fn: LogitsFn, windows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the logits of these windows. Traced once for a network, also where it is wrapped anew for each call."""
    return _apply.eval_shape(logits_fn, windows)


@jax.jit
def _apply(logits_fn: LogitsFn, x: Array) -> Array:
    return logits_fn(x)


def check_grid(logits: Array, window: tuple[int, ...], count: int = 1) -> None:
    """Raise ValueError unless these are the logits `(count, *window, classes)` of so many windows."""
    expected = (count, *window)
    if logits.ndim != len(expected) + 1 or logits.shape[:-1] != expected:
        raise ValueError(f"logits have shape {logits.shape} for a window {window}, expected {expected} and classes")


def class_logit(logits: Array, window: tuple[int, ...], target_class: int) -> Array:
    """The logits `window` of one class of a single window, from `(1, *window, classes)`; checked when traced.

    Raises ValueError where the logits have another shape, or no such class: JAX would take the nearest one.
    """
    check_grid(logits, window)
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
