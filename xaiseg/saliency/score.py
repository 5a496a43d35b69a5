"""An instance's target as a function of one window's logits: what class-activation maps and the like differentiate.

`S = Σ_{v∈Ω} t(y[v])` with the blended logits `y[v] = Σ_w s_w(v) y_w[v]`. As a function of the logits of window `w` alone the others
are fixed: `S_w(y_w) = Σ_v t(rest[v] + s_w(v) · y_w[v])`. The derivatives of all `S_w` together are those of `S`.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import Instance, LogitsFn
from xaiseg.inference import StitchedPredictor, WindowPlan, cut, logits_shape
from xaiseg.saliency.targets import Head


class WindowScore(NamedTuple):
    """Of one window and one instance.

    start: `(3,)` of the window in the padded volume.
    share: `(*window,)` float32, of each voxel of the instance, 0 elsewhere.
    rest: `(*window, n)`, what the other windows add to the blended logits; of a linear target, which needs none, `(1, 1, 1, n)`.
    """

    start: np.ndarray
    share: np.ndarray
    rest: np.ndarray


def window_scores(
    predictor: StitchedPredictor, plan: WindowPlan, padded: Array, instance: Instance, head: Head
) -> Iterator[WindowScore]:
    """The scores of all windows that hold voxels of an instance. A target that is not linear takes a forward pass of each."""
    local, share = plan.coverage(instance.voxels)
    windows = np.flatnonzero((share > 0).any(1)).tolist()
    held = {w: share[w] > 0 for w in windows}
    classes = len(head.classes) if head.classes is not None else _classes(predictor, plan, padded)
    # on the host: gathering so few numbers is not worth a program for each size of lesion
    parts: dict[int, np.ndarray] = {}
    blended = np.zeros((len(instance.voxels), classes), padded.dtype)
    if not head.linear:
        for w in windows:
            logits = np.asarray(_window_logits(predictor.logits_fn, padded, plan.starts[w], plan.window, head))
            parts[w] = np.zeros_like(blended)
            parts[w][held[w]] = share[w][held[w], None].astype(logits.dtype) * logits[tuple(local[w][held[w]].T)]
            blended += parts[w]
    for w in windows:
        places = tuple(local[w][held[w]].T)
        dense = np.zeros(plan.window, np.float32)
        dense[places] = share[w][held[w]]
        if head.linear:
            rest = np.zeros((1, 1, 1, classes), np.float32)
        else:
            rest = np.zeros((*plan.window, classes), padded.dtype)
            rest[places] = (blended - parts[w])[held[w]]
        yield WindowScore(plan.starts[w], dense, rest)


def score(head: Head, logits: Array, share: Array, rest: Array) -> Array:
    """`S_w` of the logits `(*window, classes)` of a window; for use within a compiled step."""
    chosen = head.choose(logits)
    share = share.astype(chosen.dtype)[..., None]
    value = head(rest.astype(chosen.dtype) + share * chosen)
    return jnp.sum(jnp.where(share[..., 0] > 0, value, jnp.zeros_like(value)))


@partial(jax.jit, static_argnums=(3, 4))
def _window_logits(logits_fn: LogitsFn, padded: Array, start: Array, window: tuple[int, ...], head: Head) -> Array:
    return head.choose(logits_fn(cut(padded, start, window)[None])[0])


def _classes(predictor: StitchedPredictor, plan: WindowPlan, padded: Array) -> int:
    window = jax.ShapeDtypeStruct((1, *plan.window, padded.shape[-1]), padded.dtype)
    return logits_shape(predictor.logits_fn, window).shape[-1]
