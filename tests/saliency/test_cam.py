"""Class-activation maps: by hand, against a stored transcription in PyTorch, and against the whole stitched score.

For the last the volume is stitched window by window in float64, and the score is differentiated as one function of the offsets at
the tap in each window, by finite differences; the formulas are written out in NumPy.
"""

import doctest
import inspect
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from xaiseg._types import Explainer, Instance
from xaiseg.checkpoints import convert
from xaiseg.inference import StitchedPredictor
from xaiseg.inference.devices import device_mesh
from xaiseg.saliency.cam import gradcam, gradcam_pp, hirescam, layercam, seg_gradcam
from xaiseg.saliency.noise import noisy
from xaiseg.saliency.rows import head_of
from xaiseg.saliency.targets import Target

FIXTURES = Path(__file__).parent.parent / "fixtures"
KEY = jax.random.key(0)
METHODS = {
    "grad-cam": gradcam,
    "seg-grad-cam": seg_gradcam,
    "hirescam": hirescam,
    "layercam": layercam,
    "grad-cam++": gradcam_pp,
    "exact": lambda **options: gradcam_pp(derivatives="exact", transform=jax.nn.softplus, form="authors", **options),
}
FORMS = ("paper", "pooled", "monai", "authors")


# A network of one layer, and what each method makes of it


def one_layer(x, offsets):
    """Two activations of each voxel, `x` and its double; the lesion's logit is their sum and itself piecewise linear in them."""
    activations = jnp.concatenate([x, 2 * x], -1) + offsets.get("layer", 0.0)
    return jnp.stack([x[..., 0], activations.sum(-1)], -1), {"layer": activations}


def difference(x, offsets):
    """The same activations, of which the second counts against the lesion."""
    activations = jnp.concatenate([x, 2 * x], -1) + offsets.get("layer", 0.0)
    return jnp.stack([x[..., 0], activations[..., 0] - activations[..., 1]], -1), {"layer": activations}


def cubes(x, offsets):
    activations = x + offsets.get("layer", 0.0)
    return activations**3, {"layer": activations}


def explain_line(explain, network, values, voxels, target_class=1, **options):
    """Along the last axis of a volume in one window."""
    values = jnp.asarray(values, jnp.float32)[None, None, :, None]
    logits_fn = lambda x: network(x, {})[0]  # noqa: E731
    predictor = StitchedPredictor(logits_fn, values.shape[:3], tapped_fn=network, target_class=target_class, **options)
    lesion = Instance(1, np.array([[0, 0, v] for v in voxels], np.int32))
    (found,), (info,) = explain(KEY, predictor, values, [lesion])
    return np.asarray(found.values[0, 0, :, 0]), info


LINE = [5.0, 2.0, -3.0, -1.0]


@pytest.mark.parametrize(
    ("explain", "expected"),
    [
        # g = 1 at voxels 1 and 3; ΣA = 3 and 6
        (gradcam(layer="layer"), [7.5, 3, 0, 0]),  # w = 1/2 of both features
        (seg_gradcam(layer="layer"), [7.5, 3, 0, 0]),
        (hirescam(layer="layer"), [0, 6, 0, 0]),
        (layercam(layer="layer"), [0, 6, 0, 0]),
        (gradcam_pp(layer="layer"), [0, 2 / 5 + 4 / 8, 0, 0]),  # ω = 1/5 and 1/8
        (gradcam_pp(layer="layer", form="pooled"), [4.5, 1.8, 0, 0]),  # w = 2/5 and 2/8
        (gradcam_pp(layer="layer", form="monai"), [25 / 3, 10 / 3, 0, 0]),  # Σ A g³ = 1 and 2: w = 2/3 and 2/4
        (gradcam_pp(layer="layer", form="authors"), [15, 6, 0, 0]),  # α = 1/2 of either voxel: w = 1
    ],
)
def test_one_layer_by_hand(explain, expected):
    found, info = explain_line(explain, one_layer, LINE, [1, 3])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (info.rows, info.windows, info.samples) == (1, 1, 1)
    assert info.extra in ({}, {"alpha_near_zero": 0.0, "alpha_undefined": 0.0})


@pytest.mark.parametrize(
    ("explain", "expected"),
    [
        # g = (1, -1) at voxels 1 and 3
        (gradcam(layer="layer"), [0, 0, 1.5, 0.5]),  # w = ±1/2
        (hirescam(layer="layer"), [0, 0, 0, 1]),
        (layercam(layer="layer"), [0, 2, 0, 0]),
        (gradcam_pp(layer="layer"), [0, 2 / 5, 0, 0]),
        (gradcam_pp(layer="layer", form="pooled"), [2, 0.8, 0, 0]),
        (gradcam_pp(layer="layer", form="monai"), [10 / 3, 4 / 3, 0, 0]),
        (gradcam_pp(layer="layer", form="authors"), [5, 2, 0, 0]),
    ],
)
def test_activations_that_count_against_the_lesion(explain, expected):
    found, _ = explain_line(explain, difference, LINE, [1, 3])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_grad_cam_sees_nothing_before_an_instance_norm():
    def normed(x, offsets):
        activations = x + offsets.get("layer", 0.0)
        return (activations - activations.mean((1, 2, 3), keepdims=True)) / activations.std(), {"layer": activations}

    found, _ = explain_line(gradcam(layer="layer"), normed, LINE, [1], target_class=0)
    np.testing.assert_allclose(found, 0, atol=1e-6)
    found, _ = explain_line(hirescam(layer="layer"), normed, LINE, [1], target_class=0)
    assert found.max() > 0.1


def test_where_alpha_is_ill_defined_is_reported():
    """ΣA = -1.9999 and -3.9998: of the four activations with g > 0, the two of the first feature have |2 + ΣA| < 1e-3."""
    found, info = explain_line(gradcam_pp(layer="layer"), one_layer, [0.5, 0.5, -2.9999], [0, 1])
    assert info.extra == {"alpha_near_zero": 0.5, "alpha_undefined": 0.0}
    assert np.isfinite(found).all()


@pytest.mark.parametrize("form", ["paper", "pooled", "authors"])
def test_where_alpha_is_undefined_there_is_no_weight(form):
    """ΣA = -2 and -4, so `2 + g·ΣA` is 0 for the first feature and -2 for the second, whose weight is negative."""
    found, info = explain_line(gradcam_pp(layer="layer", form=form), one_layer, [1.0, -1.0, -2.0], [0, 1])
    assert info.extra == {"alpha_near_zero": 0.5, "alpha_undefined": 0.5}
    # the second: α = -1/2 at both voxels; authors' is each half of their sum
    expected = {"paper": [0, 1, 0], "pooled": [0, 2, 4], "authors": [2, 0, 0]}[form]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_monais_zero_denominator_becomes_one():
    """Ω = voxel 0, g = 1 there, A = -2 and -4: `2 + Σ A g³` is 0 and -2, α = 1 and -1/2."""
    found, info = explain_line(gradcam_pp(layer="layer", form="monai"), one_layer, [-2.0, 3.0], [0])
    np.testing.assert_allclose(found, [0, 0], atol=1e-6)  # w = (1, -1/2) and A_2 = 2 A_1
    assert info.extra == {"alpha_near_zero": 0.5, "alpha_undefined": 0.0}
    # where `2 - 2 + 1e-7` would make 1e7 of it
    found, _ = explain_line(gradcam_pp(layer="layer", form="monai"), difference, [-2.0, 3.0], [0])
    np.testing.assert_allclose(found, [0, 3], rtol=1e-5)


def softplus(s):
    return jax.nn.softplus(s / 10)


@pytest.mark.parametrize(
    ("transform", "outer"),
    [
        # h', h'', h''' at S = 8, the cube of 2
        ("exp", (1, 1, 1)),
        (lambda s: jnp.exp(s / 4), tuple(np.exp(2) / 4**n for n in (1, 2, 3))),
        (lambda s: s, (1, 0, 0)),
        (lambda s: s**2, (16, 2, 0)),
        (softplus, "sigmoid"),
    ],
)
@pytest.mark.parametrize("derivatives", ["exact", "closed_form"])
def test_cubes_by_hand(transform, outer, derivatives):
    """`S = a³` at a = 2: g, S'', S''' are 12, 12 and 6, of which the closed form knows the first. ΣA = 6."""
    if outer == "sigmoid":
        p = 1 / (1 + np.exp(-0.8))
        outer = (p / 10, p * (1 - p) / 100, p * (1 - p) * (1 - 2 * p) / 1000)
    h1, h2, h3 = outer
    s2, s3 = (12, 6) if derivatives == "exact" else (0, 0)
    second = h2 * 12**2 + h1 * s2
    third = h3 * 12**3 + 3 * h2 * 12 * s2 + h1 * s3
    denominator = 2 * second + 6 * third
    expected = np.array([0, max(12 * second / denominator * 2, 0) if denominator else 0, 0])
    explain = gradcam_pp(layer="layer", transform=transform, derivatives=derivatives)
    found, info = explain_line(explain, cubes, [1.0, 2.0, 3.0], [1], target_class=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # a transform without curvature leaves the closed form with 0/0
    assert info.extra["alpha_undefined"] == (1.0 if denominator == 0 else 0.0)


def test_large_scores_do_not_overflow():
    """`exp(1e6)` is not finite in any precision."""
    for derivatives in ("closed_form", "exact"):
        explain = gradcam_pp(layer="layer", derivatives=derivatives)
        found, _ = explain_line(explain, cubes, [1.0, 100.0], [1], target_class=0)
        np.testing.assert_allclose(found, [0, 3e4 / (2 + 3e4 * 101) * 100], rtol=1e-3)


# The stored transcription of the paper's equations


@pytest.fixture(scope="module")
def trained():
    return StitchedPredictor.of(convert(FIXTURES / "unet_batch.pth", window=(16, 16, 16)))


@pytest.mark.parametrize(("lesion", "windows"), [("one", 1), ("border", 4)])
def test_maps_are_the_papers_equations(trained, lesion, windows):
    """At the published layer, `model.1.submodule.2.conv` of MONAI's network."""
    stored = np.load(FIXTURES / "gradcam_pp.npz")
    image, voxels = jnp.asarray(stored["x"], jnp.float32), stored[f"{lesion}_voxels"]
    (found,), (info,) = gradcam_pp(layer="decoder1.conv")(KEY, trained, image, [Instance(1, voxels)])
    expected = np.zeros((*image.shape[:3], 1), np.float32)
    expected[tuple(slice(s, s + n) for s, n in zip(found.start, found.values.shape, strict=False))] = found.values
    # the project's bound is 1e-4 of the largest value; α = 1/(2 + gΣA) loses a digit or two where its denominator is small
    np.testing.assert_allclose(expected[..., 0], stored[lesion], atol=1e-5 * stored[lesion].max())
    assert (info.rows, info.windows) == (windows, windows)


@pytest.mark.parametrize("layer", ["encoder0", "bottleneck.conv", "decoder0.conv"])
def test_other_layers_come_out_on_the_input_grid(trained, layer):
    image = jax.random.normal(KEY, (18, 20, 17, 2))
    (found,), _ = gradcam_pp(layer=layer)(KEY, trained, image, [Instance(1, np.array([[0, 1, 0]], np.int32))])
    assert found.values.shape == (16, 16, 16, 1)
    assert np.isfinite(found.values).all()
    assert (found.values >= 0).all()


# The whole stitched score, in float64

SHAPE, WINDOW = (5, 4, 6), (4, 4, 4)
LESION = Instance(4, np.array([[0, 1, 1], [1, 1, 2], [2, 1, 2], [2, 2, 3], [4, 3, 5]], np.int32))
TAPS = ("fine", "coarse", "logits")


def two_levels(smooth, weights, x, offsets):
    """A U-Net in small: one level down and up again, instance norm and GELU in between, or LeakyReLU and nothing."""

    def convolution(name, y):
        return jax.lax.conv_general_dilated(
            y, weights[name], (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    def act(y):
        if not smooth:
            return jax.nn.leaky_relu(y)
        normalised = (y - y.mean((1, 2, 3), keepdims=True)) / (y.std((1, 2, 3), keepdims=True) + 0.1)
        # not the norm alone: gradients before it add up to zero over the grid, and so Grad-CAM's would be
        return jax.nn.gelu(normalised + y / 3, approximate=False)

    taps = {}

    def tap(name, y):
        taps[name] = y + offsets[name] if name in offsets else y
        return taps[name]

    fine = act(tap("fine", convolution("down", x)))
    coarse = act(tap("coarse", convolution("bottom", fine[:, ::2, ::2, ::2])))
    raised = coarse.repeat(2, 1).repeat(2, 2).repeat(2, 3)[:, : x.shape[1], : x.shape[2], : x.shape[3]]
    return tap("logits", convolution("top", jnp.concatenate([fine, raised], -1))), taps


@dataclass(frozen=True)
class Logits:
    """Of a network with taps."""

    tapped: Any

    def __call__(self, weights, x):
        return self.tapped(weights, x, {})[0]


def small(smooth=True, dtype=jnp.float64, window=WINDOW):
    """Three classes, random weights."""
    rng = np.random.default_rng(1)
    shapes = {"down": (3, 3, 3, 2, 3), "bottom": (3, 3, 3, 3, 4), "top": (1, 1, 1, 7, 3)}
    weights = {name: jnp.asarray(rng.normal(size=s) * 0.4, dtype) for name, s in shapes.items()}
    tapped = partial(two_levels, smooth)
    return StitchedPredictor(
        Partial(Logits(tapped), weights), window, overlap=0.25, tapped_fn=Partial(tapped, weights), stride=(2, 2, 2)
    )


IMAGE = np.random.default_rng(2).normal(size=(*SHAPE, 2))


class Stitched:
    """The score of a lesion as one function of the offsets at a tap in each window."""

    def __init__(self, predictor, layer, target, voxels=LESION.voxels):
        self.plan, self.layer = predictor.plan(SHAPE), layer
        image = jnp.asarray(IMAGE)
        head = head_of(predictor, target, image)
        self.windows = [image[self.plan.slices(s)] for s in self.plan.starts]
        weight, total_weight = jnp.asarray(self.plan.weight, image.dtype), self.plan.total_weight

        def of(offsets):
            total = jnp.zeros((*SHAPE, 3), image.dtype)
            for start, window, offset in zip(self.plan.starts, self.windows, offsets, strict=True):
                logits = predictor.tapped_fn(window[None], {layer: offset})[0][0]
                total = total.at[self.plan.slices(start)].add(weight[..., None] * logits)
            blended = total / jnp.asarray(total_weight, image.dtype)[..., None]
            return head(head.choose(blended[tuple(voxels.T)])).sum()

        self.activations = [predictor.tapped_fn(w[None], {})[1][layer][0] for w in self.windows]
        self.zero = [jnp.zeros_like(a)[None] for a in self.activations]
        self.score = jax.jit(of)
        derivatives = [self.differences(n) for n in range(len(self.windows))]
        # α's denominator is zero where the gradient is, and differences of equal scores are a rounding
        self.gradients = [np.where(np.abs(first) > 1e-10, first, 0) for first, _, _ in derivatives]
        self.curvatures = [(second, third) for _, second, third in derivatives]

    def differences(self, number, step=0.03):
        """First to third derivatives of each activation of a window, by central differences of orders eight, eight and six."""
        half = np.array([1 / 280, -4 / 105, 1 / 5, -4 / 5])
        first = np.array([*half, 0, *-half[::-1]]) / step
        half = np.array([-1 / 560, 8 / 315, -1 / 5, 8 / 5])
        second = np.array([*half, -205 / 72, *half[::-1]]) / step**2
        half = np.array([-7 / 240, 3 / 10, -169 / 120, 61 / 30])
        third = np.array([*half, 0, *-half[::-1]]) / step**3
        zero = self.zero[number]

        def moved(i, t):
            offset = zero.reshape(-1).at[i].add(t).reshape(zero.shape)
            return self.score([*self.zero[:number], offset, *self.zero[number + 1 :]])

        grid = jax.vmap(jax.vmap(moved, (None, 0)), (0, None))
        values = np.asarray(jax.jit(grid)(jnp.arange(zero.size), step * jnp.arange(-4.0, 5.0)))
        return tuple((values @ weights).reshape(zero.shape[1:]) for weights in (first, second, third))

    def map(self, weigh):
        """`weigh(number, g, a)` of all windows, upsampled and added up."""
        total = np.zeros((*SHAPE, 1))
        for n, (start, g, a) in enumerate(zip(self.plan.starts, self.gradients, self.activations, strict=True)):
            cam = np.maximum(weigh(n, np.asarray(g), np.asarray(a)), 0)
            total[self.plan.slices(start)] += np.asarray(jax.image.resize(jnp.asarray(cam), WINDOW, "linear"))[
                ..., None
            ]
        return total


def plus_plus(form, g, a, second, third):
    """The definitions, feature by feature."""
    cam = np.zeros(g.shape[:-1])
    for k in range(g.shape[-1]):
        gk, ak, s, t = (x[..., k] for x in (g, a, second, third))
        held = gk > 0
        alpha = np.zeros_like(gk)
        sums = (ak * t).sum() + 1e-7 if form == "monai" else ak.sum() * t[held]
        alpha[held] = s[held] / (2 * s[held] + sums)
        if form == "authors":
            alpha = alpha / (alpha.sum() or 1)
        omega = alpha * gk
        cam += (omega if form == "paper" else omega.sum()) * ak
    return cam


def explained(explain, predictor, instance=LESION):
    (found,), (info,) = explain(KEY, predictor, jnp.asarray(IMAGE), [instance])
    assert info.rows == info.windows == 4
    assert found.start == (0, 0, 0)
    assert found.values.dtype == np.float64
    return np.asarray(found.values), info


def close(found, expected, rtol=1e-5):
    """Blend shares are float32: 1e-7; α multiplies that where its denominator is small."""
    assert expected.max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=rtol * np.abs(expected).max(), rtol=0)


@pytest.fixture
def float64():
    # `window_scores` multiplies shares in float32 with logits
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def soft(logits):
    """A target of one's own."""
    return jnp.sin(logits[..., 1]) * logits[..., 2] + 2 * logits[..., 1]


ALWAYS = {("coarse", "logit"), ("fine", "probability"), ("logits", "logit")}  # one program each to compile
OTHERS = [(layer, target) for layer in TAPS for target in ("logit", "probability", "log_odds", Target(function=soft))]


@pytest.mark.parametrize(
    ("layer", "target"),
    [pytest.param(*c, marks=[] if c in ALWAYS else pytest.mark.slow) for c in OTHERS],
    ids=lambda t: getattr(t, "name", t),
)
def test_maps_of_several_windows_are_those_of_the_whole_score(layer, target, float64):
    predictor = small()
    whole = Stitched(predictor, layer, target)
    options = {"layer": layer, "target": target}
    expected = whole.map(lambda n, g, a: (g.mean((0, 1, 2)) * a).sum(-1))
    close(explained(gradcam(**options), predictor)[0], expected)
    close(explained(hirescam(**options), predictor)[0], whole.map(lambda n, g, a: (g * a).sum(-1)))
    close(explained(layercam(**options), predictor)[0], whole.map(lambda n, g, a: (np.maximum(g, 0) * a).sum(-1)))
    for form in FORMS:
        expected = whole.map(lambda n, g, a, form=form: plus_plus(form, g, a, g**2, g**3))
        close(explained(gradcam_pp(form=form, **options), predictor)[0], expected, 1e-4)


def exact_by_differences(whole, form, h, exact=None):
    """exact: where derivatives are exact, by window's gradients; everywhere by default."""
    s = whole.score(whole.zero)
    h1, h2, h3 = (float(d) for d in (jax.grad(h)(s), jax.grad(jax.grad(h))(s), jax.grad(jax.grad(jax.grad(h)))(s)))

    def weigh(n, g, a):
        s2, s3 = whole.curvatures[n]
        if exact is not None:
            s2, s3 = np.where(exact(g), s2, 0), np.where(exact(g), s3, 0)
        second, third = h2 * g**2 + h1 * s2, h3 * g**3 + 3 * h2 * g * s2 + h1 * s3
        if h is jnp.exp:
            second, third = second / h1, third / h1  # MONAI's 1e-7 is of derivatives without the factor
        return plus_plus(form, g, a, second, third)

    return whole.map(weigh)


@pytest.mark.parametrize(
    ("layer", "target", "transform", "form"),
    [
        ("coarse", "logit", "exp", "paper"),
        pytest.param("coarse", "probability", "exp", "monai", marks=pytest.mark.slow),
        pytest.param("fine", "logit", softplus, "pooled", marks=pytest.mark.slow),
        pytest.param("coarse", "probability", jax.nn.softplus, "paper", marks=pytest.mark.slow),
        pytest.param("coarse", "logit", lambda s: s, "authors", marks=pytest.mark.slow),
    ],
)
def test_exact_derivatives_are_those_of_the_whole_score(layer, target, transform, form, float64):
    """Through instance norm and GELU, by finite differences of the volume's score."""
    predictor = small()
    whole = Stitched(predictor, layer, target)
    expected = exact_by_differences(whole, form, jnp.exp if transform == "exp" else transform)
    options = {"layer": layer, "target": target, "form": form, "transform": transform}
    explain = gradcam_pp(derivatives="exact", chunk=16, **options)
    found, info = explained(explain, predictor)
    close(found, expected, 1e-4)
    closed, _ = explained(gradcam_pp(**options), predictor)
    difference = np.abs(found - closed).max() / found.max()
    assert difference > 0.01  # the closed form is another thing here
    assert info.extra["closed_form_difference"] == pytest.approx(difference)


def test_small_gradients_keep_their_closed_form(float64):
    predictor = small()
    whole = Stitched(predictor, "coarse", "logit")
    options = {"layer": "coarse", "derivatives": "exact", "chunk": 16}
    expected = exact_by_differences(whole, "paper", jnp.exp, lambda g: g > 0.5 * np.abs(g).max())
    close(explained(gradcam_pp(minimum_gradient=0.5, **options), predictor)[0], expected, 1e-4)
    assert np.abs(expected - exact_by_differences(whole, "paper", jnp.exp)).max() > 1e-3 * expected.max()


@pytest.mark.parametrize("form", FORMS)
def test_a_piecewise_linear_network_has_its_closed_form(form):
    """LeakyReLU between the tap and the logit; float32."""
    predictor = small(smooth=False, dtype=jnp.float32)
    explain = gradcam_pp(layer=["coarse", "fine"], derivatives="exact", form=form, chunk=50)
    (found,), (info,) = explain(KEY, predictor, jnp.asarray(IMAGE, jnp.float32), [LESION])
    assert found.values.max((0, 1, 2)).min() > 0
    assert found.values.dtype == np.float32
    assert info.extra["closed_form_difference"] < 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_the_chunk_does_not_matter(chunk, float64):
    predictor = small()
    options = {"layer": "coarse", "derivatives": "exact"}
    expected, _ = explained(gradcam_pp(chunk=11, **options), predictor)
    found, _ = explained(gradcam_pp(chunk=chunk, **options), predictor)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


# Taps and regions


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_several_taps_are_each_at_a_time(method, float64):
    predictor = small()
    layers = ["logits", "fine", "coarse"]
    found, _ = explained(method(layer=layers), predictor)
    assert found.shape == (*SHAPE, 3)
    for channel, layer in enumerate(layers):
        one, _ = explained(method(layer=layer), predictor)
        assert one.max() > 0
        np.testing.assert_allclose(found[..., channel : channel + 1], one, atol=1e-10 * one.max())


METHODS_OF_REGIONS = {name: method for name, method in METHODS.items() if method is not seg_gradcam}


@pytest.mark.parametrize("method", METHODS_OF_REGIONS.values(), ids=METHODS_OF_REGIONS)
def test_the_region_of_a_class(method, float64):
    predictor = small()
    region = Instance(0, np.argwhere(np.asarray(predictor(jnp.asarray(IMAGE))).argmax(-1) == 1).astype(np.int32))
    assert 0 < len(region.voxels) < np.prod(SHAPE)
    expected, own = explained(method(layer="fine"), predictor, region)
    seen = []
    explain = method(layer="fine", region="class")
    lesions = [LESION, Instance(2, LESION.voxels[:1])]
    maps, infos = explain(KEY, predictor, jnp.asarray(IMAGE), lesions, progress=seen.append)
    assert len(maps) == len(infos) == 2
    for found, info in zip(maps, infos, strict=True):
        np.testing.assert_array_equal(found.values, expected)
        assert info == own
    assert sum(seen) == sum(i.rows for i in infos) == 8


@pytest.mark.parametrize("method", METHODS_OF_REGIONS.values(), ids=METHODS_OF_REGIONS)
def test_a_class_that_is_nowhere(method):
    def never(x, offsets):
        logits, taps = one_layer(x, offsets)
        return logits - jnp.array([0.0, 1e3]).reshape(1, 1, 1, 1, 2), taps

    image = jnp.ones((5, 4, 6, 1))
    predictor = StitchedPredictor(lambda x: never(x, {})[0], (4, 4, 4), tapped_fn=never)
    explain = method(layer="layer", region="class", target="probability")
    (found,), (info,) = explain(KEY, predictor, image, [LESION])
    np.testing.assert_array_equal(found.values, np.zeros((5, 4, 6, 1)))
    assert (info.rows, info.windows) == (0, 0)


def test_regions_of_noisy_images_have_maps_of_one_place():
    predictor = StitchedPredictor(lambda x: one_layer(x, {})[0], (4, 4, 4), tapped_fn=one_layer)
    image = jnp.zeros((9, 4, 4, 1)).at[0, 0, 0].set(1.0)
    explain = noisy(gradcam(layer="layer", region="class"), samples=3, noise=1.0)
    (found,), (info,) = explain(KEY, predictor, image, [LESION])
    assert found.values.shape == (9, 4, 4, 1)
    assert info.samples == 3


def test_a_logit_of_its_own_is_a_class_where_it_is_positive():
    found, info = explain_line(hirescam(layer="layer", region="class"), cubes, [1.0, 2.0, -3.0], [2], target_class=0)
    np.testing.assert_allclose(found, [3, 24, 0])
    assert info.windows == 1


# What every explainer keeps

LESIONS = [
    Instance(3, np.array([[0, 0, 0], [0, 0, 1]], np.int32)),
    LESION,
    Instance(9, np.array([[4, 3, 5]], np.int32)),
]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_protocol(method, float64):
    predictor, image = small(), jnp.asarray(IMAGE)
    explain = method(layer="coarse", target="probability")
    wanted = list(inspect.signature(Explainer.__call__).parameters.values())[1:]
    found = list(inspect.signature(explain).parameters.values())
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted]
    assert explain(KEY, predictor, image, []) == ([], [])
    seen = []
    maps, infos = explain(KEY, predictor, image, LESIONS, progress=seen.append)
    assert sum(seen) == sum(i.rows * i.samples for i in infos)
    assert [i.windows for i in infos] == [1, 4, 1]
    for number in (2, 0, 1):
        (alone,), (info,) = explain(KEY, predictor, image, [LESIONS[number]])
        np.testing.assert_array_equal(alone.values, maps[number].values)
        assert isinstance(alone.values, jax.Array)
        assert (alone.start, info) == (maps[number].start, infos[number])
    assert max(m.values.max() for m in maps) > 0


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_network_is_traced_once(method):
    """By the first explanation; not again for other images, lesions, windows, or weights."""
    traces = []

    def counted(weight, x, offsets):
        traces.append(1)
        hidden = jnp.tanh(x * weight + offsets.get("layer", 0.0))
        return jnp.concatenate([hidden, 2 * hidden], -1), {"layer": hidden}

    def logits(weight, x):
        return jnp.concatenate([jnp.tanh(x * weight)] * 2, -1)

    explain, image = method(layer="layer", target="probability"), jnp.ones((5, 4, 6, 1))
    counts = []
    for number in range(3):
        weight = jnp.float32(number + 1)
        predictor = StitchedPredictor(Partial(logits, weight), (4, 4, 4), tapped_fn=Partial(counted, weight))
        explain(KEY, predictor, image * weight, LESIONS[: number + 1])
        counts.append(len(traces))
    assert counts[0] > 0
    assert counts == counts[:1] * 3


def test_methods_share_the_program_of_a_network():
    traces = []

    def counted(x, offsets):
        traces.append(1)
        return one_layer(x, offsets)

    predictor = StitchedPredictor(lambda x: one_layer(x, {})[0], (1, 1, 4), tapped_fn=counted)
    for explain in (gradcam(layer="layer"), hirescam(layer="layer"), gradcam_pp(layer="layer", form="monai")):
        explain(KEY, predictor, jnp.ones((1, 1, 4, 1)), [Instance(1, np.array([[0, 0, 1]], np.int32))])
    # its shapes, and its gradient
    assert len(traces) == 2


def test_the_whole_volume_in_one_piece():
    """Padded to a multiple of the stride; as one window of that size."""
    image, lesion = jnp.asarray(IMAGE, jnp.float32)[:, :, :5], Instance(1, LESION.voxels[:4])
    whole, window = (small(dtype=jnp.float32, window=sides) for sides in (None, (6, 4, 6)))
    for explain in (gradcam_pp(layer="fine"), hirescam(layer="fine", target="probability", region="class")):
        (found,), (info,) = explain(KEY, whole, image, [lesion])
        (expected,), _ = explain(KEY, window, image, [lesion])
        assert found.values.shape == (5, 4, 5, 1)
        assert info.windows == 1
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_maps_are_on_the_devices_of_the_predictor(method):
    device = jax.devices()[1]
    predictor = StitchedPredictor(lambda x: one_layer(x, {})[0], (4, 4, 4), tapped_fn=one_layer)
    image = jax.random.normal(KEY, (5, 4, 6, 1))
    for target in ("logit", "probability"):
        explain = method(layer="layer", target=target)
        (expected,), _ = explain(KEY, predictor, image, [LESION])
        (found,), _ = explain(KEY, replace(predictor, mesh=device_mesh(1, 1, [device])), image, [LESION])
        assert found.values.devices() == {device}
        np.testing.assert_array_equal(found.values, expected.values)


def test_half_precision_is_summed_in_single():
    """ΣA of 4096 ones is 256 in bfloat16, where 256 + 1 is 256."""

    def half(x, offsets):
        hidden = x.astype(jnp.bfloat16) + offsets.get("layer", jnp.bfloat16(0))
        return hidden, {"layer": hidden}

    predictor = StitchedPredictor(lambda x: half(x, {})[0], (16, 16, 16), target_class=0, tapped_fn=half)
    lesion = Instance(1, np.array([[3, 4, 5]], np.int32))
    for transform in ("exp", jnp.exp):
        explain = gradcam_pp(layer="layer", transform=transform)
        (found,), _ = explain(KEY, predictor, jnp.ones((16, 16, 16, 1)), [lesion])
        assert found.values.dtype == np.float32
        np.testing.assert_allclose(found.values[3, 4, 5, 0], 1 / 4098, rtol=1e-6)


def test_an_unknown_layer_is_named_with_those_there_are(trained):
    image, lesion = jnp.ones((16, 16, 16, 2)), Instance(1, np.array([[3, 3, 3]], np.int32))
    for layer in ("decoder9", ["encoder0", "decoder9"]):
        with pytest.raises(ValueError, match=r"no tap 'decoder9' in this network; it has .*decoder1\.conv, encoder0"):
            gradcam_pp(layer=layer)(KEY, trained, image, [lesion])


@pytest.mark.parametrize(
    ("method", "name"), [(gradcam_pp, r"Grad-CAM\+\+"), (hirescam, "HiResCAM"), (gradcam, "Grad-CAM")]
)
def test_a_network_without_taps_is_refused(method, name):
    predictor = StitchedPredictor(lambda x: x, (4, 4, 4))
    with pytest.raises(ValueError, match=f"{name} needs a network with taps: give the predictor a tapped_fn"):
        method(layer="layer")(KEY, predictor, jnp.ones((4, 4, 4, 2)), [])


@pytest.mark.parametrize(
    ("tapped", "message"),
    [
        (
            lambda x, o: (x, {"layer": x.mean((1, 2, 3))}),
            r"tap 'layer' has shape \(1, 2\), expected \(1, x, y, z, features",
        ),
        (
            lambda x, o: (x[:, :2], {"layer": x + o.get("layer", 0.0)}),
            r"logits have shape \(1, 2, 4, 4, 2\) for a window",
        ),
    ],
)
def test_a_network_of_other_shapes_is_refused(tapped, message):
    predictor = StitchedPredictor(lambda x: x, (4, 4, 4), tapped_fn=tapped)
    with pytest.raises(ValueError, match=message):
        gradcam(layer="layer")(KEY, predictor, jnp.ones((4, 4, 4, 2)), [LESIONS[0]])


def test_a_class_that_does_not_exist_is_refused():
    predictor = StitchedPredictor(lambda x: x, (4, 4, 4), tapped_fn=one_layer, target_class=2)
    with pytest.raises(ValueError, match="target_class is 2, but the network has 1 classes"):
        gradcam(layer="layer")(KEY, predictor, jnp.ones((4, 4, 4, 1)), [LESIONS[0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "classic"}, "form is 'classic', known are paper, pooled, monai, authors"),
        ({"derivatives": "none"}, "derivatives is 'none', known are closed_form, exact"),
        ({"transform": "log"}, "transform is 'log', expected exp or a function"),
        ({"region": "case"}, "region is 'case', known are instance, class"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"minimum_gradient": 1.0}, r"minimum_gradient in \[0, 1\)"),
        ({"layer": ()}, r"layer is \(\), expected the name of a tap"),
        ({"layer": ["a", "a"]}, "several different ones"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        gradcam_pp(**{"layer": "layer"} | options)


@pytest.mark.parametrize("module", ["cam", "alpha", "cam_windows"])
def test_the_examples(module):
    result = doctest.testmod(sys.modules[f"xaiseg.saliency.{module}"])
    assert result.failed == 0
