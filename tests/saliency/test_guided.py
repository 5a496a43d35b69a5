"""Guided backpropagation against one written out in numpy, and against the networks' own code with another activation."""

import doctest
import inspect
import sys
from dataclasses import replace

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from xaiseg._types import Explainer, Instance, LocalFn
from xaiseg.inference import StitchedPredictor
from xaiseg.models import Model, ModelSpec, expected_variables, layers
from xaiseg.saliency import gradcam_pp, jacobian_rows, mean, noisy, signed_max, smoothgrad
from xaiseg.saliency.guided import guided, guided_backprop

KEY = jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# Two convolutions with activations and a linear head, written twice: in numpy with the guided derivative, and in JAX

SHAPES = {"k1": (3, 3, 2, 4), "b1": (4,), "k2": (3, 3, 4, 3), "b2": (3,), "w": (3, 2)}


def weights(positive=False):
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: np.abs(a) for name, a in drawn.items()} if positive else drawn


def image_and_cotangents():
    rng = np.random.default_rng(1)
    return rng.standard_normal((2, 7, 6, 2)), rng.standard_normal((5, 2, 3, 2, 2))


def numpy_conv(x, kernel):
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return sum(x[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))


def numpy_conv_transposed(cotangent, kernel):
    n, height, width, _ = cotangent.shape
    x = np.zeros((n, height + 2, width + 2, kernel.shape[2]))
    for i in range(3):
        for j in range(3):
            x[:, i : i + height, j : j + width] += cotangent @ kernel[i, j].T
    return x


def numpy_guided(p, x, cotangent, slope):
    """The values and the guided derivative with `φ(z) = max(z, 0) + slope · min(z, 0)`."""
    z1 = numpy_conv(x, p["k1"]) + p["b1"]
    z2 = numpy_conv(np.where(z1 > 0, z1, slope * z1), p["k2"]) + p["b2"]
    y = np.where(z2 > 0, z2, slope * z2) @ p["w"]
    at_z2 = np.maximum(cotangent @ p["w"].T, 0) * np.where(z2 > 0, 1, slope)
    at_z1 = np.maximum(numpy_conv_transposed(at_z2, p["k2"]), 0) * np.where(z1 > 0, 1, slope)
    return y, numpy_conv_transposed(at_z1, p["k1"])


def network(activation, wrap=lambda layer: layer):
    """`(p, x) -> y`; `wrap` is put around the first layer, activation included, and around the second activation."""

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def forward(p, x):
        layer = wrap(lambda x: activation(conv(x, p["k1"]) + p["b1"].reshape(1, 1, 1, -1)))
        y = wrap(activation)(conv(layer(x), p["k2"]) + p["b2"].reshape(1, 1, 1, -1))
        return y @ p["w"]

    return forward


def assert_is_guided(activation, slope, wrap=lambda layer: layer):
    p, (x, cotangents) = weights(), image_and_cotangents()
    y, rows = jax.jit(pulled)(guided(Partial(network(activation, wrap), p)), x, cotangents)
    for cotangent, row in zip(cotangents, rows, strict=True):
        values, expected = numpy_guided(p, x, cotangent, slope)
        # float64, sums of some dozen products of order one: rounding stays below 1e-13
        np.testing.assert_allclose(y, values, atol=1e-12)
        np.testing.assert_allclose(row, expected, atol=1e-12)


def pulled(function, x, cotangents):
    """Linearised once, as `jacobian_rows` does it."""
    y, pull = jax.vjp(function, x)
    return y, jax.vmap(lambda t: pull(t)[0])(cotangents)


@jax.custom_jvp
def custom_leaky(x):
    return jnp.where(x > 0, x, 0.3 * x)


custom_leaky.defjvps(lambda t, _, x: t * jnp.where(x > 0, 1.0, 0.3))


@jax.custom_vjp
def custom_relu(x):
    return jnp.maximum(x, 0)


custom_relu.defvjp(lambda x: (custom_relu(x), x > 0), lambda active, t: (t * active.astype(t.dtype),))


def zeros_of(x):
    return jnp.zeros(x.shape, x.dtype)


def mapped_prelu(x):
    """`vmap` brings the mapped axis to the front of what is multiplied, and leaves it where it is in what is compared."""
    slope = jnp.full((1, 1, x.shape[2]), 0.2)
    return jax.vmap(lambda x, slope: jnp.where(x >= 0, x, slope * x), (3, None), 3)(x, slope)


ACTIVATIONS = {
    "jax.nn.relu": (jax.nn.relu, 0),
    "maximum": (lambda x: jnp.maximum(x, 0), 0),
    "maximum, reversed": (lambda x: jnp.maximum(0.0, x), 0),
    "maximum of zeros": (lambda x: jnp.maximum(x, zeros_of(x)), 0),
    "lax.max": (lambda x: jax.lax.max(x, zeros_of(x)), 0),
    "where, 0": (lambda x: jnp.where(x > 0, x, 0), 0),
    "where, zeros": (lambda x: jnp.where(x < 0, zeros_of(x), x), 0),
    "mask": (lambda x: x * (x > 0).astype(x.dtype), 0),
    "clip": (lambda x: jnp.clip(x, 0, 1000), 0),
    "lax.clamp": (lambda x: jax.lax.clamp(0.0, x, 1000.0), 0),
    "jax.nn.leaky_relu": (jax.nn.leaky_relu, 0.01),
    "leaky_relu, slope": (lambda x: jax.nn.leaky_relu(x, 0.2), 0.2),
    "leaky maximum": (lambda x: jnp.maximum(0.2 * x, x), 0.2),
    "where >=": (lambda x: jnp.where(x >= 0, x, 0.2 * x), 0.2),
    "where >": (lambda x: jnp.where(x > 0, x, x * 0.2), 0.2),
    "where <": (lambda x: jnp.where(x < 0, 0.2 * x, x), 0.2),
    "where <=": (lambda x: jnp.where(x <= 0, x / 5, x), 0.2),
    "where, reversed": (lambda x: jnp.where(jnp.less(0, x), x, 0.2 * x), 0.2),
    "negative slope": (lambda x: jnp.where(x >= 0, x, -0.5 * x), -0.5),
    "custom_jvp": (custom_leaky, 0.3),
    "custom_vjp": (custom_relu, 0),
    "xaiseg's PReLU": (lambda x: layers.PReLU().apply({"params": {"slope": jnp.array([0.2])}}, x), 0.2),
    "linen's PReLU": (lambda x: nn.PReLU().apply({"params": {"negative_slope": jnp.array(0.2)}}, x), 0.2),
    "nnx's PReLU": (lambda x: nnx.PReLU(0.2, param_dtype=jnp.float64)(x), 0.2),
    "equinox's PReLU": (lambda x: eqx.nn.PReLU(0.2)(x), 0.2),
    "mapped PReLU": (mapped_prelu, 0.2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_is_guided(float64, name):
    assert_is_guided(*ACTIVATIONS[name])


@pytest.mark.parametrize("name", ["jax.nn.relu", "jax.nn.leaky_relu", "where >=", "custom_jvp"])
def test_each_activation_is_guided_within_jit(float64, name):
    assert_is_guided(*ACTIVATIONS[name], wrap=lambda layer: jax.jit(jax.jit(layer)))


def looped(layer):
    return lambda x: jax.lax.map(layer, x[:, None])[:, 0]


def scanned(layer):
    """The layer, then a loop that carries its result on."""
    return lambda x: jax.lax.scan(lambda y, _: (y, None), layer(x), None, length=2)[0]


def chosen(layer):
    return lambda x: jax.lax.cond(x[0, 0, 0, 0] < 100, layer, lambda x: 2 * layer(x), x)


def with_constant(layer):
    """A call that holds an array of its own."""
    doubled = np.full(7, 1.0)[None, :, None, None]
    return jax.jit(lambda x: layer(x * jnp.asarray(doubled)[:, : x.shape[1]]))


WRAPS = {
    "checkpoint": jax.checkpoint,
    "checkpoint in jit": lambda layer: jax.jit(jax.checkpoint(jax.jit(layer))),
    "map": looped,
    "map of checkpoint": lambda layer: looped(jax.checkpoint(layer)),
    "vmap": lambda layer: lambda x: jax.vmap(lambda x: layer(x[None])[0])(x),
    "beside a scan": scanned,
    "cond": chosen,
    "jit with a constant": with_constant,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_activations_are_guided_wherever_they_stand(float64, wrap):
    assert_is_guided(jax.nn.relu, 0, wrap)
    assert_is_guided(lambda x: jnp.where(x >= 0, x, 0.2 * x), 0.2, wrap)


def test_what_a_scan_carries_is_guided_at_every_step(float64):
    def repeated(w, x):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(w @ x), None), x, w)[0]

    w = np.random.default_rng(0).standard_normal((3, 4, 4))
    x = np.random.default_rng(1).standard_normal(4) + 1
    states = [x]
    for one in w:
        states.append(np.maximum(one @ states[-1], 0))
    expected = np.array([1.0, -1.0, 1.0, 1.0])
    for one, y in zip(w[::-1], states[:0:-1], strict=True):
        expected = one.T @ (np.maximum(expected, 0) * (y > 0))
    assert np.abs(expected).max() > 0
    _, pull = jax.vjp(guided(Partial(repeated, w)), x)
    np.testing.assert_allclose(pull(jnp.array([1.0, -1.0, 1.0, 1.0]))[0], expected, atol=1e-12)


def test_a_relu6_is_open_between_0_and_6(float64):
    x, cotangent = jnp.array([-1.0, 3.0, 7.0, 3.0]), jnp.array([1.0, 1.0, 1.0, -1.0])
    for relu6 in (jax.nn.relu6, lambda x: jnp.clip(x, 0, 6), lambda x: jax.lax.clamp(0.0, x, 6.0)):
        y, pull = jax.vjp(guided(relu6), x)
        np.testing.assert_array_equal(y, [0, 3, 6, 3])
        np.testing.assert_array_equal(pull(cotangent)[0], [0, 1, 0, 0])


# What is remembered of a loop or a recomputed block would be lost if it were unrolled or kept


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)


def test_a_loop_remains_a_loop_and_what_is_recomputed_is_recomputed():
    function = network(jax.nn.relu, lambda layer: looped(jax.checkpoint(layer)))
    p, x = jax.tree.map(jnp.float32, weights()), jnp.float32(image_and_cotangents()[0])
    plain, found = (list(primitives(jax.make_jaxpr(f)(p, x).jaxpr)) for f in (function, guided(function)))
    assert {"scan", "remat2"} <= set(plain) or {"scan", "checkpoint"} <= set(plain)
    for name in ("scan", "remat2", "checkpoint", "custom_jvp_call"):
        assert found.count(name) == plain.count(name)
    assert found.count("custom_vjp_call") == 2


def test_the_rewritten_program_is_well_formed(float64):
    # JAX's own checks of scopes and types, off by default
    with jax.enable_checks(True):
        assert_is_guided(jax.nn.leaky_relu, 0.01, lambda layer: jax.jit(looped(jax.checkpoint(chosen(layer)))))


def test_without_jit_and_vmap_it_is_the_same(float64):
    p, (x, cotangents) = weights(), image_and_cotangents()
    y, pull = jax.vjp(guided(Partial(network(jax.nn.relu), p)), x)
    values, expected = numpy_guided(p, x, cotangents[0], 0)
    np.testing.assert_allclose(y, values, atol=1e-12)
    np.testing.assert_allclose(pull(cotangents[0])[0], expected, atol=1e-12)


def test_without_negative_cotangents_it_is_the_gradient(float64):
    p, (x, cotangents) = weights(positive=True), image_and_cotangents()
    function = Partial(network(jax.nn.leaky_relu), p)
    plain, found = (jax.jit(pulled)(f, x, np.abs(cotangents))[1] for f in (function, guided(function)))
    # the same operations in the same order, but for a maximum with 0 that changes nothing; XLA may fuse them otherwise
    np.testing.assert_allclose(found, plain, rtol=1e-12)
    plain, found = (jax.jit(pulled)(f, x, cotangents)[1] for f in (function, guided(function)))
    assert np.abs(plain - found).max() > 0.1


# Norms keep rounding from making a variance negative by a maximum with zero, which is no activation

NORMS = {
    "linen's LayerNorm": lambda x: nn.LayerNorm().apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, x),
    "linen's GroupNorm": lambda x: nn.GroupNorm(2).apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, x),
    "nnx's LayerNorm": lambda x: nnx.LayerNorm(4, rngs=nnx.Rngs(0))(x),
    "equinox's GroupNorm": lambda x: jax.vmap(lambda x: eqx.nn.GroupNorm(2, 4)(x.T).T)(x),
    "by hand": lambda x: x / (jnp.maximum(jnp.square(x).mean(1, keepdims=True), 0) + 1e-5) ** 0.5,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_the_variance_of_a_norm_is_not_guided(norm):
    rng = np.random.default_rng(2)
    x, cotangent = (jnp.asarray(rng.standard_normal((3, 5, 4)), jnp.float32) for _ in range(2))

    @jax.jit
    def by_rule(x):
        z, pull = jax.vjp(norm, x)
        return pull(jnp.where(z > 0, jnp.maximum(cotangent, 0), 0))[0]

    found = jax.jit(lambda x: jax.vjp(guided(lambda x: jax.nn.relu(norm(x))), x)[1](cotangent)[0])(x)
    # float32, the same operations on numbers of order one
    np.testing.assert_allclose(found, by_rule(x), atol=1e-5)
    with pytest.raises(ValueError, match="no activation"):
        jax.eval_shape(guided(norm), x)


OTHERS = {
    "linear": lambda x: 2 * x,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "abs": lambda x: jnp.where(x >= 0, x, -x),
    "negative part": lambda x: jnp.minimum(x, 0),
    "floor": lambda x: jnp.maximum(x, 1),
    "other threshold": lambda x: jnp.where(x > 1, x, 0),
    "swapped": lambda x: jnp.where(x > 0, 0.2 * x, x),
    "other condition": lambda x: jnp.where(x[::-1] > 0, x, 0.2 * x),
    "index": lambda x: x[jnp.maximum(jnp.argmax(x) - 1, 0)],
    "square": lambda x: jnp.maximum(2.0, x * 2.0),
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_relu_is_refused(function):
    with pytest.raises(ValueError, match=r"found no activation.*jax\.nn\.relu"):
        jax.eval_shape(guided(function), jnp.array([1.0, -2.0, 3.0]))


def test_other_activations_keep_their_derivative(float64):
    x, cotangent = jnp.array([-1.5, 0.5, 2.0]), jnp.array([1.0, 1.0, -1.0])

    def both(x):
        return jax.nn.gelu(jax.nn.relu(x), approximate=False)

    _, pull = jax.vjp(lambda z: jax.nn.gelu(z, approximate=False), jax.nn.relu(x))
    expected = np.where(x > 0, np.maximum(pull(cotangent)[0], 0), 0)
    np.testing.assert_allclose(jax.vjp(guided(both), x)[1](cotangent)[0], expected, atol=1e-14)


# Structure: leaves, hashes, programs


def test_leaves_stay_leaves_and_arguments_may_be_any_tree():
    def tapped(params, x, offsets, *, scale):
        hidden = jax.nn.relu(x) + offsets.get("hidden", 0.0)
        return hidden @ params["w"] * scale, {"hidden": hidden}

    w = jnp.array([[1.0], [-1.0]])
    plain = Partial(tapped, {"w": w}, scale=2.0)
    function = guided(plain)
    assert jax.tree.leaves(function) == jax.tree.leaves(plain) == [w, 2.0]
    x = jnp.array([[3.0, 4.0]])
    logits, taps = function(x, {})
    np.testing.assert_array_equal(logits, [[-2.0]])
    np.testing.assert_array_equal(taps["hidden"], x)
    gradient = jax.grad(lambda offset: function(x, {"hidden": offset})[0].sum())(jnp.zeros((1, 2)))
    np.testing.assert_array_equal(gradient, [[2.0, -2.0]])  # nothing is between this tap and the logits
    gradient = jax.grad(lambda x: function(x, {})[0].sum())(x)
    np.testing.assert_array_equal(gradient, [[2.0, 0.0]])


def test_guided_versions_of_one_function_share_compiled_programs():
    traces = []

    def counted(params, x):
        traces.append(None)
        return jax.nn.relu(x) * params

    @jax.jit
    def gradient(function, x):
        return jax.grad(lambda x: function(x).sum())(x)

    x = jnp.array([1.0, -1.0])
    for params in (2.0, 3.0):
        function = guided(Partial(counted, jnp.full(2, params)))
        np.testing.assert_array_equal(gradient(function, x), [params, 0])
    assert len(traces) == 1
    text = gradient.lower(guided(Partial(counted, jnp.full(2, 12345.0))), x).as_text()
    assert "12345" not in text
    other = guided(Partial(lambda params, x: params * jax.nn.relu(-x), jnp.ones(2)))
    np.testing.assert_array_equal(gradient(other, x), [0, -1])


# The project's networks against their own code with an activation whose derivative is guided by hand


@jax.custom_vjp
def by_hand(x, slope):
    return jnp.where(x >= 0, x, slope * x)


def by_hand_backward(residuals, cotangent):
    x, slope = residuals
    kept = jnp.maximum(cotangent, 0)
    return jnp.where(x >= 0, kept, slope * kept), jnp.zeros_like(slope)


by_hand.defvjp(lambda x, slope: (by_hand(x, slope), (x, slope)), by_hand_backward)


class PReLUByHand(nn.Module):
    @nn.compact
    def __call__(self, x):
        slope = self.param("slope", nn.initializers.constant(0.25), (1,))
        return by_hand(x, jnp.broadcast_to(slope.reshape((1,) * x.ndim), x.shape))


# As few features, taps and axes as there can be: XLA takes longer to compile these gradients than to compute them
WINDOW, SLICE = (4, 8, 4), (4, 8, 1)
UNET = ("unet", {"channels": [3, 4], "strides": [2], "norm": "batch"}, WINDOW)
FLAT_UNET = ("unet", {"channels": [3, 4], "strides": [2], "residual_units": 1, "norm": "instance", "ndim": 2}, SLICE)
DYNUNET = (
    "dynunet",
    {"filters": [3, 4, 4], "kernel_size": [3, 1, 1], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
    WINDOW,
)


def model_of(architecture, options, window, **changes):
    spec = ModelSpec(architecture, options, ("FLAIR", "T1w"), window, **changes)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        drawn = 0.5 * rng.standard_normal(leaf.shape)
        return jnp.asarray(np.abs(drawn) if "var" in jax.tree_util.keystr(path) else drawn, jnp.float32)

    return Model(spec, jax.tree_util.tree_map_with_path(draw, expected_variables(spec)))


@jax.jit
def gradient_of(function, x, *more):
    """Of a sum of the first result with weights of both signs."""

    def target(x):
        results = function(x, *more)
        y = results[0] if isinstance(results, tuple) else results
        return jnp.vdot(y, jax.random.normal(jax.random.key(1), y.shape)), y

    return jax.grad(target, has_aux=True)(x)


def by_hand_gradient_of(monkeypatch, function, x, *more):
    monkeypatch.setattr(layers, "PReLU", PReLUByHand)
    monkeypatch.setitem(layers.ACTIVATIONS, "leakyrelu", lambda x: by_hand(x, jnp.full(x.shape, 0.01, x.dtype)))
    # as another function: what was compiled with the network's own activation must not be taken again
    return gradient_of(Partial(lambda *args: function(*args)), x, *more)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        # float32, the same operations on some hundred terms, which XLA may fuse in another order
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def windows(*window):
    return jax.random.normal(jax.random.key(2), (1, *window, 2))


@pytest.mark.parametrize(
    "network",
    [DYNUNET, *(pytest.param(other, marks=pytest.mark.slow) for other in (UNET, FLAT_UNET))],
    ids=["dynunet", "unet", "unet, residual, 2-D"],
)
def test_the_projects_networks_are_guided(monkeypatch, network):
    function, x = model_of(*network).logits_fn, windows(*network[-1])
    found = gradient_of(guided(function), x)
    assert_equal(found, by_hand_gradient_of(monkeypatch, function, x))


def test_it_is_not_the_gradient_of_the_projects_networks():
    function, x = model_of(*UNET).logits_fn, windows(*WINDOW)
    (found, y), (plain, plain_y) = gradient_of(guided(function), x), gradient_of(function, x)
    assert_equal([y], [plain_y])
    assert np.abs(found - plain).max() > 0.1 * np.abs(plain).max()


def test_a_gradient_at_a_tap_is_guided(monkeypatch):
    function, x = model_of(*UNET).tapped_fn, windows(*WINDOW)
    offsets = {"encoder0.conv": jnp.zeros(jax.eval_shape(function, x, {})[1]["encoder0.conv"].shape)}

    def at_tap(function):
        return Partial(lambda function, offsets: function(x, offsets)[0], function)

    found, _ = gradient_of(at_tap(guided(function)), offsets)
    expected, _ = by_hand_gradient_of(monkeypatch, at_tap(function), offsets)
    assert_equal(found.values(), expected.values())


def test_an_ensemble_with_mirrorings_is_guided(monkeypatch):
    function = model_of(*FLAT_UNET, members=("fold_0", "fold_1"), mirror_axes=(0,)).logits_fn
    # the loop of accelerators, here on CPU
    function = Partial(replace(function.func, forward=replace(function.func.forward, loop=True)), *function.args)
    x = windows(*SLICE)
    assert_equal(gradient_of(guided(function), x), by_hand_gradient_of(monkeypatch, function, x))


# The explainer

SIDES = (5, 4, 6)
LESIONS = [Instance(3, np.array([[0, 0, 0], [0, 0, 1]], np.int32)), Instance(5, np.array([[3, 2, 4]], np.int32))]


def tapped(params, x, offsets):
    """Two layers that look one voxel back along the first axis, and a head; the first is a tap."""

    def layer(x, w):
        return jax.nn.relu(jnp.concatenate([x, jnp.roll(x, 1, 1)], -1) @ w)

    hidden = layer(x, params["in"]) + offsets.get("hidden", jnp.float32(0))
    return layer(hidden, params["mid"]) @ params["out"], {"hidden": hidden}


@pytest.fixture
def predictor():
    rng = np.random.default_rng(0)
    shapes = {"in": (4, 5), "mid": (10, 5), "out": (5, 2)}
    params = {k: jnp.asarray(rng.standard_normal(shape), jnp.float32) for k, shape in shapes.items()}
    logits_fn = Partial(lambda params, x: tapped(params, x, {})[0], params)
    return StitchedPredictor(logits_fn, SIDES, tapped_fn=Partial(tapped, params))


@pytest.fixture
def image():
    return jax.random.normal(jax.random.key(1), (*SIDES, 2))


def rows_of(function, image, voxels):
    """The rows of the logit of class 1, one by one."""

    @jax.jit
    def row(voxel):
        y, pull = jax.vjp(lambda x: function(x[None])[0, ..., 1], image)
        return pull(jnp.zeros_like(y).at[voxel[0], voxel[1], voxel[2]].set(1))[0]

    return np.stack([row(voxel) for voxel in voxels])


def test_rows_of_a_lesion_are_those_of_the_guided_network(predictor, image):
    maps, infos = guided_backprop(jacobian_rows(signed_max()))(KEY, predictor, image, LESIONS)
    for found, info, lesion in zip(maps, infos, LESIONS, strict=True):
        rows = rows_of(guided(predictor.logits_fn), image, lesion.voxels)
        expected = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
        # float32, the same operations
        np.testing.assert_allclose(found.values, expected, atol=1e-6 * np.abs(expected).max())
        assert (info.rows, info.windows) == (len(lesion.voxels), 1)
    plain = rows_of(predictor.logits_fn, image, LESIONS[1].voxels)[0]
    assert np.abs(maps[1].values - plain).max() > 0.1 * np.abs(plain).max()


def test_of_a_mean_it_is_the_guided_gradient_of_the_mean_logit(predictor, image):
    def fail(*args):
        raise AssertionError("tiles would split the sum")

    predictor = replace(predictor, local_fn=LocalFn(fail, (1, 1, 1), (1, 1, 1), (2, 0, 0), (0, 0, 0)))
    (found,), _ = guided_backprop(jacobian_rows(mean()))(KEY, predictor, image, LESIONS[:1])
    places = tuple(LESIONS[0].voxels.T)

    def mean_logit(x, function):
        return function(x[None])[0, ..., 1][places].mean()

    expected = jax.jit(jax.grad(mean_logit))(image, guided(predictor.logits_fn))
    # float32, the same operations
    np.testing.assert_allclose(found.values, expected, atol=1e-6 * np.abs(expected).max())


def test_it_can_stand_on_either_side_of_the_noise(predictor, image):
    rows = jacobian_rows(mean())
    inside = noisy(guided_backprop(rows), samples=2, noise=0.05)(KEY, predictor, image, LESIONS)
    outside = guided_backprop(smoothgrad(samples=2, noise=0.05, aggregate="mean"))(KEY, predictor, image, LESIONS)
    for a, b in zip(inside[0], outside[0], strict=True):
        np.testing.assert_array_equal(a.values, b.values)
    assert inside[1] == outside[1]


def test_the_layers_above_a_tap_are_guided(predictor, image):
    found, _ = guided_backprop(gradcam_pp(layer="hidden"))(KEY, predictor, image, LESIONS)
    by_hand = replace(predictor, tapped_fn=guided(predictor.tapped_fn))
    expected, _ = gradcam_pp(layer="hidden")(KEY, by_hand, image, LESIONS)
    plain, _ = gradcam_pp(layer="hidden")(KEY, predictor, image, LESIONS)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.values, b.values)
    assert any(np.abs(np.asarray(a.values - b.values)).max() > 0 for a, b in zip(found, plain, strict=True))


def test_a_second_explanation_traces_no_more_than_one_of_the_plain_network():
    traces = []

    def counted(weights, x):
        traces.append(None)
        return jax.nn.relu(x) @ weights

    plain = jacobian_rows(signed_max(), chunk=2)
    lesion = Instance(1, np.array([[1, 2, 3], [1, 2, 2]], np.int32))
    counts = []
    for explain, negative in ((plain, -1), (guided_backprop(plain), 0)):
        for scale in (1.0, 2.0):
            predictor = StitchedPredictor(Partial(counted, jnp.array([[0.0, scale], [0.0, -scale]])), (4, 4, 4))
            (found,), _ = explain(KEY, predictor, jnp.ones((4, 4, 4, 2)), [lesion])
            np.testing.assert_array_equal(found.values[1, 2, 3], [scale, negative * scale])
            counts.append(len(traces))
            traces.clear()
    # shapes are looked up anew each time, programs are not
    assert counts[2:] == counts[:2]
    assert counts[1] < counts[0]


def test_a_network_without_relu_is_refused(image):
    predictor = StitchedPredictor(lambda x: jnp.tanh(x), (8, 8, 8))
    with pytest.raises(ValueError, match="no activation"):
        guided_backprop(jacobian_rows(mean()))(KEY, predictor, image, LESIONS)


def test_the_signature_is_the_protocols():
    wanted = list(inspect.signature(Explainer.__call__).parameters.values())[1:]
    found = list(inspect.signature(guided_backprop(jacobian_rows(mean()))).parameters.values())
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted]


def test_the_examples_of_the_docstrings_hold():
    # the package may export a function of the module's name
    result = doctest.testmod(sys.modules["xaiseg.saliency.guided"])
    assert result.attempted > 0
    assert result.failed == 0
