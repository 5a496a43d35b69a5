"""Instance-level Grad-CAM++ in the form of the paper (Spagnolo et al. 2026, eqs. 8 to 10)."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import Explainer, Info, Instance, Progress, SaliencyMap, TappedFn
from xaiseg.inference import StitchedPredictor, WindowPlan, class_logit, cut, pad
from xaiseg.saliency.rows import crop_to_volume

_NEAR_ZERO = 1e-3


def gradcam_pp(*, layer: str) -> Explainer:
    """Class-activation map of an instance at one tap: `M = ReLU(Σ_k ω_k ⊙ A_k)`, `ω_k[v] = α_k[v] · ReLU(g_k[v])`.

    `A_k` are the activations of `layer`, `g = ∂y'/∂A` for the target `y' = Σ_{v∈Ω} y[v]`, the sum of blended logits, and
    `α = g² / (2g² + g³·Σ_a A[a]) = 1 / (2 + g·ΣA)`, the closed form for `Y = exp(y')` and a head that is piecewise linear in `A`.
    Weights are voxel-wise; nothing is pooled, so other instances do not leak in. Where `g = 0`, `ω = 0`.

    A window's part of the target carries its blend shares; `ΣA` runs over the window's grid. Each window's map is upsampled
    trilinearly to the window and the windows of an instance are added up. Maps are `(x, y, z, 1)`, not negative, in arbitrary
    units. `Info.extra["alpha_near_zero"]` is the fraction of positions with `g > 0` where `|2 + g·ΣA| < 1e-3`, α being ill-defined.
    Raises ValueError for an unknown tap or a predictor without taps.
    """

    def explain(
        key: Array,
        predictor: StitchedPredictor,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        if predictor.tapped_fn is None:
            raise ValueError("Grad-CAM++ needs a network with taps: give the predictor a tapped_fn")
        plan = predictor.plan(image.shape)
        padded = pad(image, plan)
        tap = _tap_shape(predictor.tapped_fn, layer, (1, *predictor.window, image.shape[-1]))
        maps, infos = [], []
        for instance in instances:
            local, share = plan.coverage(instance.voxels)
            windows = np.flatnonzero((share > 0).any(1))
            box = plan.bounding_box(windows)
            total = np.zeros((*box.shape, 1), np.float32)
            undefined = active = 0
            for w in windows:
                cotangent = _cotangent(plan, local[w], share[w])
                cam, near, positive = _window_cam(
                    predictor.tapped_fn, padded, plan.starts[w], cotangent, layer, tap, predictor.target_class
                )
                x, y, z = (plan.starts[w] - np.array(box.start)).tolist()
                a, b, c = plan.window
                total[x : x + a, y : y + b, z : z + c, 0] += np.asarray(cam)
                undefined, active = undefined + int(near), active + int(positive)
                if progress is not None:
                    progress(1)
            maps.append(crop_to_volume(plan, jnp.asarray(total), box))
            extra = {"alpha_near_zero": undefined / active if active else 0.0}
            infos.append(Info(rows=len(windows), windows=len(windows), extra=extra))
        return maps, infos

    return explain


def alpha_paper(gradient: Array, activations: Array) -> Array:
    """`α = 1 / (2 + g·ΣA)`, shapes `(*grid, K)`; `ΣA` over the grid for each feature. 0 where the denominator is 0."""
    denominator = _denominator(gradient, activations)
    return jnp.where(denominator == 0, jnp.zeros_like(denominator), 1 / denominator)


def _denominator(gradient: Array, activations: Array) -> Array:
    axes = tuple(range(activations.ndim - 1))
    return 2 + gradient * activations.sum(axes, keepdims=True)


def _cotangent(plan: WindowPlan, local: np.ndarray, share: np.ndarray) -> np.ndarray:
    held = share > 0
    cotangent = np.zeros(plan.window, np.float32)
    cotangent[tuple(local[held].T)] = share[held]
    return cotangent


def _tap_shape(tapped_fn: TappedFn, layer: str, window: tuple[int, ...]) -> tuple[int, ...]:
    _, taps = jax.eval_shape(tapped_fn, jax.ShapeDtypeStruct(window, jnp.float32), {})
    if layer not in taps:
        raise ValueError(f"no tap {layer!r} in this network; it has {', '.join(taps)}")
    return taps[layer].shape


@partial(jax.jit, static_argnums=(4, 5, 6))
def _window_cam(
    tapped_fn: TappedFn,
    padded: Array,
    start: Array,
    cotangent: Array,
    layer: str,
    tap: tuple[int, ...],
    target_class: int,
) -> tuple[Array, Array, Array]:
    window = cotangent.shape
    x = cut(padded, start, window)

    def target(offset: Array) -> tuple[Array, Array]:
        logits, taps = tapped_fn(x[None], {layer: offset})
        return jnp.sum(class_logit(logits, window, target_class) * cotangent), taps[layer]

    gradient, activations = jax.grad(target, has_aux=True)(jnp.zeros(tap, jnp.float32))
    g, a = gradient[0], activations[0]
    alpha = alpha_paper(g, a)
    weights = jnp.where(g > 0, alpha * g, jnp.zeros_like(g))
    cam = jax.nn.relu((weights * a).sum(-1))
    near = (g > 0) & (jnp.abs(_denominator(g, a)) < _NEAR_ZERO)
    return jax.image.resize(cam, window, "linear"), near.sum(), (g > 0).sum()
