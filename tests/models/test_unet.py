"""The U-Net against MONAI's (stored logits, gradients), its norms against numpy, its taps against finite differences."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg.checkpoints import monai_unet, read_state_dict
from xaiseg.checkpoints.mapping import Given
from xaiseg.models import Model, ModelSpec, UNet, build_network, expected_variables
from xaiseg.models.layers import BatchNorm, InstanceNorm

FIXTURES = Path(__file__).parent.parent / "fixtures"


# What the keys do not tell
GIVEN = {
    "unet_residual1_batch": Given(),
    "unet_residual2_batch": Given(),
    "unet_residual2_instance": Given(norm="instance"),
    "unet_residual1_group_relu_nobias": Given(norm="group:2", activation="relu"),
    "unet_residual2_2d": Given(strides=((1, 2),)),
    "unet_group_swish": Given(norm="group:2", activation="swish"),
    "unet_none_gelu_nobias": Given(strides=(1, 2), norm="none", activation="gelu"),
    "unet_batch_leakyrelu": Given(activation="leakyrelu"),
}


def load(name):
    reading = monai_unet.read(read_state_dict(FIXTURES / f"{name}.pth"), name, GIVEN.get(name, Given()))
    stored = {k: v[None].astype(np.float32) for k, v in np.load(FIXTURES / f"{name}.npz").items()}
    return UNet(**reading.options), reading.variables, jnp.asarray(stored["x"]), stored


@pytest.mark.parametrize("name", ["unet_batch", "unet_instance_affine", "unet_instance", "unet_2d"])
def test_logits_are_monais(name):
    network, variables, x, stored = load(name)
    # float32 against MONAI in float64, logits of order one: the project's bound is 1e-4, rounding stays below 1e-5
    np.testing.assert_allclose(jax.jit(network.apply)(variables, x)[0], stored["y"], atol=1e-5)


@pytest.mark.parametrize("name", GIVEN)
def test_logits_and_input_gradient_of_each_variant_are_monais(name):
    network, variables, x, stored = load(name)

    @jax.jit
    def both(x, cotangent):
        logits, pull = jax.vjp(lambda x: network.apply(variables, x)[0], x)
        return logits, pull(cotangent)[0]

    logits, gradient = both(x, stored["cotangent"])
    # float32 against MONAI in float64; both are sums of a few thousand products, each rounded to 6e-8 of itself
    np.testing.assert_allclose(logits, stored["y"], atol=1e-5 * np.abs(stored["y"]).max())
    np.testing.assert_allclose(gradient, stored["gradient"], atol=1e-5 * np.abs(stored["gradient"]).max())


def test_the_papers_network_has_its_parameter_count():
    spec = ModelSpec("unet", {}, ("FLAIR", "T1w"), (96, 96, 96))
    assert sum(leaf.size for leaf in jax.tree.leaves(expected_variables(spec)["params"])) == 7_916_170


@pytest.mark.parametrize("name", ["unet_batch", *GIVEN])
def test_initial_variables_have_the_layout_of_converted_ones(name):
    network, variables, x, _ = load(name)
    initial = jax.eval_shape(network.init, jax.random.key(0), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), initial) == jax.tree.map(lambda a: (a.shape, a.dtype), variables)


def test_taps_are_named_in_order_and_end_in_the_logits():
    network, variables, x, _ = load("unet_batch")
    logits, taps = network.apply(variables, x)
    levels = ["encoder0", "encoder1", "bottleneck", "decoder1"]
    assert list(taps) == [name for level in levels for name in (f"{level}.conv", level)] + [
        "decoder0.conv",
        "logits",
    ]
    np.testing.assert_array_equal(taps["decoder0.conv"], logits)
    np.testing.assert_array_equal(taps["logits"], logits)
    spec = ModelSpec("unet", {"channels": (4, 8, 16), "strides": (2, 2)}, ("FLAIR", "T1w"), (12, 8, 16))
    assert list(Model(spec, variables).taps().items()) == [(name, tap.shape[1:]) for name, tap in taps.items()]
    assert taps["decoder1.conv"].shape == (1, 6, 4, 8, 4)


def test_taps_of_residual_units():
    network, variables, x, _ = load("unet_residual2_batch")
    order = []

    @jax.jit
    def tapped(variables, x):
        logits, taps = network.apply(variables, x)
        order.extend(taps)
        return logits, taps

    logits, taps = tapped(variables, x)
    assert order == [
        *(f"{level}{tap}" for level in ("encoder0", "encoder1", "bottleneck") for tap in (".unit0.conv", ".unit1.conv", "")),
        *(f"{level}{tap}" for level in ("decoder1", "decoder0") for tap in (".conv", ".unit0.conv", "")),
        "logits",
    ]  # fmt: skip
    np.testing.assert_array_equal(taps["logits"], logits)
    np.testing.assert_array_equal(taps["decoder0"], logits)
    # the shortcut of the top's way up adds what the transposed convolution gave, normalised and activated
    assert not np.allclose(taps["decoder0.unit0.conv"], logits)


OFFSETS = [
    ("unet_batch", "encoder0.conv"),
    ("unet_batch", "decoder1"),
    ("unet_residual2_batch", "encoder0.unit0.conv"),
    ("unet_residual2_batch", "decoder0.conv"),
]


@pytest.mark.parametrize(("fixture", "name"), OFFSETS)
def test_derivative_by_an_offset_is_the_finite_difference(fixture, name):
    network, variables, x, _ = load(fixture)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), variables)
        x = jnp.asarray(np.asarray(x, np.float64))
        rng = np.random.default_rng(0)

        @jax.jit
        def score(offset):
            return jnp.sum(jnp.tanh(network.apply(variables, x, {name: offset})[0]))

        shape = jax.eval_shape(network.apply, variables, x)[1][name].shape
        direction = jnp.asarray(rng.standard_normal(shape))
        slope = jnp.vdot(jax.grad(score)(jnp.zeros(shape)), direction)
        step = 1e-6
        difference = (score(step * direction) - score(-step * direction)) / (2 * step)
    # rounding 1e-16·|score| / step, and the kinks of PReLU passed within one step, of second order in it
    np.testing.assert_allclose(slope, difference, rtol=1e-5)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="architecture 'vnet' is unknown; known are unet"):
        build_network(ModelSpec("vnet", {}, ("FLAIR",), (8, 8, 8)))
    with pytest.raises(ValueError, match=r"options of unet.*depth"):
        build_network(ModelSpec("unet", {"depth": 3}, ("FLAIR",), (8, 8, 8)))


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"channels": (4, 8), "strides": (2, 2)}, (8, 8, 8), "2 channels need 1 strides, not 2"),
        ({"channels": (4, 8), "strides": (2,), "norm": "group"}, (8, 8, 8), "norm is 'group'; known are batch"),
        ({"channels": (4, 8, 8), "strides": (2, 2)}, (8, 6, 8), r"each side must be a multiple of \[4, 4, 4\]"),
        ({"channels": (4, 8), "strides": ((1, 2, 2),)}, (3, 5, 8), r"a multiple of \[1, 2, 2\]"),
        ({"channels": (4,), "strides": ()}, (8, 8, 8), "at least two levels"),
        ({"channels": (4, 8), "strides": (2,), "residual_units": -1}, (8, 8, 8), "residual_units is -1, expected 0 or"),
        (
            {"channels": (4, 8), "strides": (2,), "activation": "tanh"},
            (8, 8, 8),
            "activation is 'tanh'; known are prelu",
        ),
        (
            {"channels": (4, 6), "strides": (2,), "norm": "group:4"},
            (8, 8, 8),
            "6 features cannot be split into 4 groups",
        ),
    ],
)
def test_a_network_that_cannot_be_is_refused(options, grid, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(UNet(**options).init, jax.random.key(0), jnp.zeros((1, *grid, 2)))


def test_anisotropic_strides_and_kernels_keep_the_grid():
    network = UNet((4, 8), ((1, 2, 3),), kernel_size=(1, 3, 3), up_kernel_size=(1, 3, 3), norm="none")
    (logits, taps), _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.ones((1, 3, 4, 6, 1)))
    assert logits.shape == (1, 3, 4, 6, 2)
    assert taps["encoder0"].shape == (1, 3, 2, 2, 4)


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 1.0), (1000.0, 0.01), (-3.0, 50.0)])
def test_batch_norm_in_training_is_the_two_pass_formula(mean, sd):
    rng = np.random.default_rng(1)
    x = jnp.asarray(mean + sd * rng.standard_normal((2, 6, 5, 4, 3)), jnp.float32)
    params = {"scale": jnp.array([0.5, 1.0, 2.0]), "bias": jnp.array([0.1, 0.0, -1.0])}
    stats = {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([4.0, 5.0, 6.0])}
    y, updated = BatchNorm().apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])

    exact = np.asarray(x, np.float64)
    m, v = exact.mean((0, 1, 2, 3)), exact.var((0, 1, 2, 3))
    expected = (exact - m) / np.sqrt(v + 1e-5) * np.asarray(params["scale"]) + np.asarray(params["bias"])
    # a float32 mean of 1000 may be off by several units of 6e-5, a few per cent of the sd of 0.01;
    # a one-pass variance is off tenfold
    np.testing.assert_allclose(y, expected, atol=5e-2 if mean == 1000 else 1e-5)
    kept = updated["batch_stats"]
    np.testing.assert_allclose(kept["mean"], 0.9 * np.asarray(stats["mean"]) + 0.1 * m, rtol=1e-6)
    # PyTorch keeps the unbiased variance: 240 values a channel, so n/(n-1) differs by 0.4 %
    unbiased = exact.var((0, 1, 2, 3), ddof=1)
    np.testing.assert_allclose(kept["var"], 0.9 * np.asarray(stats["var"]) + 0.1 * unbiased, rtol=1e-5)


def test_batch_norm_in_inference_keeps_its_statistics():
    network, variables, x, _ = load("unet_batch")
    _, updated = network.apply(variables, x, mutable=["batch_stats"])
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), updated["batch_stats"], variables["batch_stats"])
    )


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 1.0), (1000.0, 0.01)])
def test_instance_norm_is_the_two_pass_formula_per_image(mean, sd):
    rng = np.random.default_rng(2)
    x = jnp.asarray(mean + sd * rng.standard_normal((2, 4, 5, 6, 3)), jnp.float32)
    exact = np.asarray(x, np.float64)
    m, v = exact.mean((1, 2, 3), keepdims=True), exact.var((1, 2, 3), keepdims=True)
    y = InstanceNorm(affine=False).apply({}, x)
    np.testing.assert_allclose(y, (exact - m) / np.sqrt(v + 1e-5), atol=5e-2 if mean == 1000 else 1e-5)


TILED = {
    "the paper's strides": ({"channels": (2, 3, 4), "strides": (2, 2)}, (12, 8, 16)),
    "anisotropic": ({"channels": (2, 3, 4), "strides": ((2, 3, 2), (2, 2, 3))}, (12, 12, 18)),
    "kernel 2": ({"channels": (2, 3, 4), "strides": (2, 2), "up_kernel_size": 2}, (8, 12, 12)),
    "wide kernel, wide stride": ({"channels": (2, 3), "strides": (4,), "up_kernel_size": 5}, (12, 8, 16)),
}


@pytest.mark.parametrize(
    ("options", "grid"),
    [pytest.param(*c, marks=[] if n.startswith("the paper") else pytest.mark.slow, id=n) for n, c in TILED.items()],
)
def test_a_tile_is_that_part_of_the_logits_and_of_their_gradient(options, grid):
    """At every place, the borders of the grid included; what the field holds beyond the grid is not looked at."""
    network = UNet(**options, norm="none")
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((1, *grid, 2)), jnp.float32)
    variables = jax.jit(network.init)(jax.random.key(1), x)
    step, sides = network.tile_alignment, np.array(grid, np.int32)
    size = tuple(2 * s for s in step)
    cone = network.cone(size)
    reach = [(0, 0), *zip(cone.before, cone.after, strict=True), (0, 0)]
    field = tuple(b + n + a for b, n, a in zip(cone.before, size, cone.after, strict=True))

    @jax.jit
    def both(start, cotangent):
        corner = (0, start[0], start[1], start[2], 0)
        whole, pull = jax.vjp(lambda x: network.apply(variables, x)[0], x)

        def tile(x):
            held = jax.lax.dynamic_slice(jnp.pad(x, reach, constant_values=7.0), corner, (1, *field, 2))
            return network.apply(variables, held, tile=(size, start, sides))[0]

        part, pull_part = jax.vjp(tile, x)
        spread = jax.lax.dynamic_update_slice(jnp.zeros_like(whole), cotangent, corner)
        return jax.lax.dynamic_slice(whole, corner, part.shape), part, pull(spread)[0], pull_part(cotangent)[0]

    cotangent = jnp.asarray(rng.standard_normal((1, *size, 2)), jnp.float32)
    for start in np.ndindex(*((n - t) // s + 1 for n, t, s in zip(grid, size, step, strict=True))):
        logits, tile, gradient, tile_gradient = both(jnp.asarray(np.array(start) * step, jnp.int32), cotangent)
        # the same products in float32, perhaps added in another order
        np.testing.assert_allclose(tile, logits, atol=1e-5)
        np.testing.assert_allclose(tile_gradient, gradient, atol=1e-5)


def test_the_field_is_all_that_a_tile_depends_on():
    """The paper's network, a tile of 16: 79 voxels, as worked out by hand from kernel 3 and stride 2 at each of four steps."""
    cone = UNet().cone((16, 16, 16))
    assert (cone.before, cone.after) == ((31,) * 3, (32,) * 3)
    assert [high[0] - low[0] for low, high in cone.encoder] == [79, 39, 19, 9, 4]
    assert [side[0] for side in cone.decoder] == [16, 9, 5, 3, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "instance"},
        {"norm": "instance_affine"},
        {"norm": "group:2"},
        {"up_kernel_size": 5},
        {"strides": (2, 2, 2, 1)},
        {"residual_units": 2},
    ],
)
def test_a_network_without_local_logits_says_so(options):
    assert UNet().is_local
    network, start = UNet(**options), jnp.zeros(3, jnp.int32)
    assert not network.is_local
    with pytest.raises(ValueError, match="no logits of a tile alone"):
        network.init(jax.random.key(0), jnp.zeros((1, 16, 16, 16, 2)), tile=((16, 16, 16), start, start))
