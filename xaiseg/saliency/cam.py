"""Class-activation maps of an instance at named taps: Grad-CAM, Seg-Grad-CAM, HiResCAM, LayerCAM and Grad-CAM++.

All weigh the activations `A_k` of a tap by derivatives of the instance's score `S = Σ_{v∈Ω} t(y[v])`, with `t` the target and `y`
the blended logits. `g_k = ∂S/∂A_k` is an array over the grid of the tap; `k` counts its features.

*Windows.* A volume goes through the network window by window, and each window has activations of its own. On those of window `w`
the score depends through `S_w(y_w) = Σ_v t(rest[v] + s_w(v)·y_w[v])`: a window's part of the target carries its blend shares
`s_w`, and `rest` is what other windows add. Sums and means over the grid (`ΣA`, `w_k`) are over that of one window. Each window's
map is upsampled trilinearly to the window, and the windows of an instance are added up.

*Taps.* `layer` is the name of a tap, or a sequence of names: maps `(x, y, z, T)` have one channel per tap, in that order, all
from one backward pass of each window. Each channel has a scale of its own.

*Region.* `region="instance"`: Ω is the instance. `region="class"`: Ω is wherever the lesion class is the most probable one on the
image that is explained. That is one map, over the whole volume, computed once and returned for each instance, as is its `Info`.
Where the class is nowhere it is zero and took no pass.

Maps are not negative, and their units are arbitrary: compare places, not values, between lesions. All raise ValueError for an
unknown region, or no layer; when called, for a predictor without taps, or without this one, or for a class that does not exist.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from xaiseg._types import Explainer
from xaiseg.saliency.alpha import DERIVATIVES, FORMS, PlusPlus, Transform
from xaiseg.saliency.cam_windows import Layers, Linearised, explainer, over_grid, upsampled, widened
from xaiseg.saliency.targets import Target

Weighing = Callable[[Array, Array], Array]
"""From the gradients and activations `(*grid, K)` of a tap to a map on its grid."""


def gradcam(*, layer: Layers, target: Target | str = "logit", region: str = "instance") -> Explainer:
    """Grad-CAM: `M = ReLU(Σ_k w_k A_k)`, `w_k` the mean of `g_k` over the window's tap grid.

    Selvaraju et al., *Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization*, ICCV 2017, explains a
    class: that is `region="class"`. Of an instance, the default, it is `seg_gradcam`. Since `w_k` is pooled, whatever else
    excites feature `k` in the window shows too, other lesions included. Do not tap what goes straight into an instance norm: that
    does not see a feature's mean, so `w_k = 0`. For layers, target, windows and errors see the module.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, StitchedPredictor
    >>> def tapped(x, offsets):
    ...     a = x + offsets.get("layer", 0.0)
    ...     return 3 * a, {"layer": a}
    >>> predictor = StitchedPredictor(lambda x: 3 * x, (1, 1, 4), target_class=0, tapped_fn=tapped)
    >>> lesion, image = Instance(1, np.array([[0, 0, 1]], np.int32)), jnp.arange(-1.0, 3.0).reshape(1, 1, 4, 1)
    >>> (saliency,), (info,) = gradcam(layer="layer")(jax.random.key(0), predictor, image, [lesion])
    >>> saliency.values.ravel().tolist()  # g = (0, 3, 0, 0), so w = 3/4
    [0.0, 0.0, 0.75, 1.5]
    """
    return explainer("Grad-CAM", _First(_pooled), layer, target, region)


def seg_gradcam(*, layer: Layers, target: Target | str = "logit") -> Explainer:
    """Seg-Grad-CAM of each instance: `gradcam` with `region="instance"`, under the name that the literature has for it.

    Vinogradova, Dibrov & Myers, *Towards Interpretable Semantic Segmentation via Gradient-weighted Class Activation Mapping*, AAAI
    2020: Grad-CAM with a class's logits summed over a set of pixels in place of the score of a class. Of their sets, all pixels
    of the class are `gradcam(region="class")`, and one pixel is an instance of one voxel.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, StitchedPredictor
    >>> def tapped(x, offsets):
    ...     a = x + offsets.get("layer", 0.0)
    ...     return 2 * a, {"layer": a}
    >>> predictor = StitchedPredictor(lambda x: tapped(x, {})[0], (1, 1, 4), target_class=0, tapped_fn=tapped)
    >>> lesion, image = Instance(1, np.array([[0, 0, 2]], np.int32)), jnp.arange(-1.0, 3.0).reshape(1, 1, 4, 1)
    >>> (saliency,), (info,) = seg_gradcam(layer="layer")(jax.random.key(0), predictor, image, [lesion])
    >>> saliency.values.ravel().tolist()
    [0.0, 0.0, 0.5, 1.0]
    """
    return gradcam(layer=layer, target=target, region="instance")


def hirescam(*, layer: Layers, target: Target | str = "logit", region: str = "instance") -> Explainer:
    """HiResCAM: `M = ReLU(Σ_k g_k ⊙ A_k)`. Voxel-wise: what the score does not depend on does not show.

    Draelos & Carin, *Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks*, arXiv
    2011.08891, with Grad-CAM's ReLU. For layers, target, windows and errors see the module.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, StitchedPredictor
    >>> def tapped(x, offsets):
    ...     a = x + offsets.get("layer", 0.0)
    ...     return 3 * a, {"layer": a}
    >>> predictor = StitchedPredictor(lambda x: 3 * x, (1, 1, 4), target_class=0, tapped_fn=tapped)
    >>> lesion, image = Instance(1, np.array([[0, 0, 2]], np.int32)), jnp.arange(-1.0, 3.0).reshape(1, 1, 4, 1)
    >>> (saliency,), (info,) = hirescam(layer="layer")(jax.random.key(0), predictor, image, [lesion])
    >>> saliency.values.ravel().tolist()
    [0.0, 0.0, 3.0, 0.0]
    """
    return explainer("HiResCAM", _First(_elementwise), layer, target, region)


def layercam(*, layer: Layers, target: Target | str = "logit", region: str = "instance") -> Explainer:
    """LayerCAM: `M = ReLU(Σ_k ReLU(g_k) ⊙ A_k)`, voxel-wise as HiResCAM, of positive gradients only.

    Jiang et al., *LayerCAM: Exploring Hierarchical Class Activation Maps for Localization*, IEEE TIP 2021. Its maps of several
    layers are joined by the maximum after scaling; here each is a channel, unscaled. For layers, target, windows and errors see
    the module.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, StitchedPredictor
    >>> def tapped(x, offsets):
    ...     a = x + offsets.get("layer", 0.0)
    ...     return a**2, {"layer": a}
    >>> predictor = StitchedPredictor(lambda x: tapped(x, {})[0], (1, 1, 4), target_class=0, tapped_fn=tapped)
    >>> lesion, image = Instance(1, np.array([[0, 0, 2]], np.int32)), jnp.arange(-1.0, 3.0).reshape(1, 1, 4, 1)
    >>> (saliency,), (info,) = layercam(layer="layer")(jax.random.key(0), predictor, image, [lesion])
    >>> saliency.values.ravel().tolist()
    [0.0, 0.0, 2.0, 0.0]
    """
    return explainer("LayerCAM", _First(_positive), layer, target, region)


def gradcam_pp(
    *,
    layer: Layers,
    form: str = "paper",
    derivatives: str = "closed_form",
    transform: str | Transform = "exp",
    target: Target | str = "logit",
    region: str = "instance",
    chunk: int | None = None,
    minimum_gradient: float = 0.0,
) -> Explainer:
    """Grad-CAM++: weights `ω_k[v] = α_k[v] · ReLU(g_k[v])`, `α = Y'' / (2Y'' + Y'''·Σ_a A[a])`, `Y = h(S)`.

    `Y''`, `Y'''` are derivatives of a smooth transform of the score with respect to the one activation. Where `g ≤ 0`, `ω = 0`.

    form:

    - `paper` (Spagnolo et al. 2026, eqs. 8 to 10): voxel-wise, `M = ReLU(Σ_k ω_k ⊙ A_k)`. Other instances do not leak in.
    - `pooled` (Chattopadhay et al., *Grad-CAM++*, WACV 2018): `M = ReLU(Σ_k w_k A_k)` with `w_k = Σ_v ω_k[v]`.
    - `monai` (`monai.visualize.GradCAMpp`): pooled, with the denominator `2Y'' + Σ_a(A[a]·Y'''[a])`, the cube inside the sum; a
      denominator of zero becomes 1, and 1e-7 is added.
    - `authors` (the code that Chattopadhay et al. published): pooled, with `α` of each feature divided by its sum over `g > 0`.

    transform: `h`, either `exp` or a rising function of a scalar that JAX differentiates three times, taken at the score of the
      whole instance, which costs a forward pass more of each window. `exp(S)` overflows float32 above 88.7; but each of its
      derivatives has the factor `e^S`, one number for the target, which cancels in α, so `exp(s - S)` stands in for it. Likewise
      `ω` has the gradient of `S` where the literature has that of `Y`, the constant `h'(S)` times it (MONAI's weights carry
      `e^S`). α depends on the scale of the target: the mean over Ω would give another map than this sum.
    derivatives: `closed_form` takes `S'' = S''' = 0`, so `Y'' = h''·g²`, `Y''' = h'''·g³`, for `exp` `α = 1/(2 + g·ΣA)`. That
      holds for a logit that is piecewise linear in the tap; instance norm, GELU, attention or another target break it. `exact`
      computes both for every activation that they matter to (`g > 0`; for `monai` `g ≠ 0`), one after another, see `derivatives`:
      some eight passes forward from the tap for each. It suits coarse taps, or small regions of influence.
    minimum_gradient: fraction of the largest `|g|` of a window up to which an activation keeps its closed form. chunk: activations
      at once; by default what memory allows. `progress` is told of windows, not of chunks.

    `Info.extra`, over all taps: `alpha_near_zero`, the fraction of positions with `g > 0` whose denominator is less than 1e-3 of
    `Y''` (`|2 + g·ΣA| < 1e-3`), where α is ill-defined; `alpha_undefined`, the fraction where it is exactly zero or not finite:
    these get no weight. With `exact`, `closed_form_difference`: `max|M_exact - M_closed| / max|M_exact|`, the largest of the taps.

    Also raises ValueError for unknown options, a chunk below 1, or a minimum outside `[0, 1)`.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, StitchedPredictor
    >>> def tapped(x, offsets):
    ...     a = x + offsets.get("layer", 0.0)
    ...     return a, {"layer": a}
    >>> predictor = StitchedPredictor(lambda x: x, (1, 1, 3), target_class=0, tapped_fn=tapped)
    >>> lesion, image = Instance(1, np.array([[0, 0, 1]], np.int32)), jnp.array([1.0, 4.0, 1.0]).reshape(1, 1, 3, 1)
    >>> (saliency,), (info,) = gradcam_pp(layer="layer")(jax.random.key(0), predictor, image, [lesion])
    >>> saliency.values.ravel().tolist()  # 4 / (2 + 6)
    [0.0, 0.5, 0.0]
    """
    for name, value, known in (("form", form, FORMS), ("derivatives", derivatives, DERIVATIVES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, known are {', '.join(known)}")
    if transform != "exp" and not callable(transform):
        raise ValueError(f"transform is {transform!r}, expected exp or a function")
    if (chunk is not None and chunk < 1) or not 0 <= minimum_gradient < 1:
        raise ValueError(f"chunk must be at least 1 and minimum_gradient in [0, 1), not {chunk} and {minimum_gradient}")
    smooth = transform if callable(transform) else None
    rule = PlusPlus(form, smooth, derivatives == "exact", chunk, minimum_gradient)
    return explainer("Grad-CAM++", rule, layer, target, region)


@dataclass(frozen=True)
class _First:
    """A rule of first order."""

    weigh: Weighing
    needs_score = False
    channels = 1
    counts = 0

    def __call__(self, window: Linearised) -> tuple[Array, Array]:
        return _weighed(self.weigh, window.taps(), window.sides)

    def finish(self, maps: Array, counts: list[int]) -> tuple[Array, dict[str, float]]:
        return maps, {}


def _pooled(g: Array, a: Array) -> Array:
    return (g.mean(over_grid(g), keepdims=True) * a).sum(-1)


def _elementwise(g: Array, a: Array) -> Array:
    return (g * a).sum(-1)


def _positive(g: Array, a: Array) -> Array:
    return (jax.nn.relu(g) * a).sum(-1)


@partial(jax.jit, static_argnums=(0, 2))
def _weighed(weigh: Weighing, taps: Any, sides: tuple[int, ...]) -> tuple[Array, Array]:
    return jnp.stack([upsampled(weigh(widened(g), widened(a)), sides) for g, a in taps], -1), jnp.zeros(0, jnp.int32)
