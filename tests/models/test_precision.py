"""Rounded convolutions and products against NumPy in float64, networks of each precision against float32, and their programs."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.tree_util import Partial

from xaiseg.models import DynUNet, SwinUNETR, UNet, convolution, forward, precision
from xaiseg.models.blocks import PlainBlock
from xaiseg.models.convolution import conv, conv_transpose
from xaiseg.models.forward import Forward, LogitsOf, TappedOf
from xaiseg.models.layers import Conv, ConvTranspose, Dense
from xaiseg.models.precision import PRECISIONS, at_precision, check_precision, precision_of
from xaiseg.models.remat import rematerialised
from xaiseg.models.swin import SwinBlock, _attend, _product
from xaiseg.models.taps import Taps

ROUNDED = ["tf32", "bfloat16"]
# each program runs once: without optimisation it is there in a third of the time
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# grid, window, strides, padding, features in and out: each way in which the folded form computes them, and two dimensions.
# Beyond 64 output voxels windows are not gathered.
CASES = {
    "few voxels": ((4, 5, 4), (3, 3, 3), (2, 2, 2), 1, 2, 3),
    "joined taps": ((8, 9, 8), (3, 3, 3), (2, 2, 2), 1, 2, 3),
    "added taps": ((4, 5, 4), (3, 3, 3), (1, 1, 1), 1, 9, 2),
    "one tap": ((3, 4, 2), (1, 1, 1), (1, 1, 1), 0, 5, 4),
    "tiling": ((4, 4, 2), (2, 2, 2), (2, 2, 2), 0, 3, 2),
    "two dimensions": ((5, 6), (3, 3), (2, 1), 1, 4, 3),
}
LOWERINGS = [
    (case, lowering)
    for case, (grid, *_) in CASES.items()
    for lowering in ("folded", "native")
    if lowering == "native" or len(grid) == 3
]


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def rounded(x, name):
    """float32 values to the nearest with 10 or 7 bits of mantissa, ties to even, as float64."""
    x = np.asarray(x, np.float32)
    if name == "bfloat16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)
    bits = x.view(np.uint32)
    bits = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return bits.view(np.float32).astype(np.float64)


def products(x, kernel, cotangent, strides, pad):
    """In float64: the convolution of `x`, its transpose and its kernel's gradient for `cotangent`."""
    window, ndim = kernel.shape[:-2], kernel.ndim - 2
    widths = [(0, 0), *[(pad, pad)] * ndim, (0, 0)]
    padded = np.pad(x, widths)
    y, back, of_kernel = np.zeros(cotangent.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    flat = kernel.reshape(-1, *kernel.shape[-2:])
    for place in np.ndindex(*y.shape[1:-1]):
        at = (slice(None), *(slice(i * s, i * s + k) for i, s, k in zip(place, strides, window, strict=True)))
        here = padded[at]
        tokens = here.reshape(here.shape[0], -1, here.shape[-1])
        out = (slice(None), *place)
        y[out] = np.einsum("ntc,tco->no", tokens, flat)
        back[at] += np.einsum("no,tco->ntc", cotangent[out], flat).reshape(here.shape)
        of_kernel += np.einsum("ntc,no->tco", tokens, cotangent[out]).reshape(kernel.shape)
    inner = (slice(None), *(slice(pad, pad + n) for n in x.shape[1:-1]))
    return y, back[inner], of_kernel


def assert_product(found, expected, name):
    """Equal to the float64 sum of rounded products, to float32 rounding or to that of a bfloat16 result."""
    assert found.dtype == jnp.float32
    scale = np.abs(expected).max()
    if name == "bfloat16":
        np.testing.assert_array_equal(found, rounded(found, name))
        # half a unit, and where float32 rounding decides a tie a whole one
        np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6 * scale)
    else:
        # sums of up to 243 products in float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * scale)


def jitted(f, *args):
    return jax.jit(f, compiler_options=FAST_COMPILE)(*args)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize(("case", "lowering"), LOWERINGS)
def test_convolution_rounds_what_it_multiplies_forward_and_backward(case, lowering, name):
    grid, window, strides, pad, c_in, c_out = CASES[case]
    padding = [(pad, pad)] * len(grid)
    x, kernel, tangent = arrays(0, (2, *grid, c_in), (*window, c_in, c_out), (2, *grid, c_in))
    f = partial(conv, strides=strides, padding=padding, lowering=lowering)
    (cotangent,) = arrays(1, jax.eval_shape(f, x, kernel).shape)

    def run(x, kernel, tangent, cotangent):
        with precision_of(name):
            y, pull = jax.vjp(f, x, kernel)
            return (y, *pull(cotangent), jax.jvp(lambda x: f(x, kernel), (x,), (tangent,))[1])

    x_, kernel_, tangent_, cotangent_ = (rounded(a, name) for a in (x, kernel, tangent, cotangent))
    expected = products(x_, kernel_, cotangent_, strides, pad)
    for found, wanted in zip(
        jitted(run, x, kernel, tangent, cotangent),
        (*expected, products(tangent_, kernel_, cotangent_, strides, pad)[0]),
        strict=True,
    ):
        assert_product(found, wanted, name)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize(("case", "lowering"), LOWERINGS)
def test_transposed_convolution_rounds_what_it_multiplies(case, lowering, name):
    grid, window, strides, pad, c_in, c_out = CASES[case]
    padding = [(pad, pad)] * len(grid)
    (kernel,) = arrays(2, (*window, c_in, c_out))
    smaller = jax.eval_shape(
        lambda z, k: conv(z, k, strides, padding), jax.ShapeDtypeStruct((2, *grid, c_in), jnp.float32), kernel
    ).shape
    extra = [(n + 2 * pad - k) % s for n, k, s in zip(grid, window, strides, strict=True)]
    x, cotangent = arrays(3, smaller, (2, *grid, c_in))

    def run(x, kernel, cotangent):
        with precision_of(name):
            y, pull = jax.vjp(lambda x, k: conv_transpose(x, k, strides, padding, extra, lowering), x, kernel)
            return (y, *pull(cotangent))

    x_, kernel_, cotangent_ = (rounded(a, name) for a in (x, kernel, cotangent))
    gradient, y, of_kernel = products(cotangent_, kernel_, x_, strides, pad)
    for found, wanted in zip(jitted(run, x, kernel, cotangent), (y, gradient, of_kernel), strict=True):
        assert_product(found, wanted, name)


@pytest.mark.parametrize("name", ROUNDED)
def test_matrix_products_round_what_they_multiply(name):
    x, kernel, cotangent = arrays(4, (2, 5, 7), (7, 3), (2, 5, 3))
    q, k, scores = arrays(5, (1, 2, 3, 4, 6), (1, 2, 3, 5, 6), (1, 2, 3, 4, 5))

    def run(x, kernel, cotangent, q, k, scores):
        with precision_of(name):
            dense = Dense(3, use_bias=False)
            y, pull = jax.vjp(lambda x, kernel: dense.apply({"params": {"kernel": kernel}}, x), x, kernel)
            attention, pull_attention = jax.vjp(partial(_product, contract=4), q, k)
        return (y, *pull(cotangent), attention, *pull_attention(scores))

    given = (x, kernel, cotangent, q, k, scores)
    x_, kernel_, cotangent_, q_, k_, scores_ = (rounded(a, name) for a in given)
    expected = (
        x_ @ kernel_,
        cotangent_ @ kernel_.T,
        np.einsum("nti,nto->io", x_, cotangent_),
        np.einsum("...ti,...si->...ts", q_, k_),
        np.einsum("...ts,...si->...ti", scores_, k_),
        np.einsum("...ts,...ti->...si", scores_, q_),
    )
    for found, wanted in zip(jitted(run, *given), expected, strict=True):
        assert_product(found, wanted, name)


def test_tf32_ties_are_rounded_to_even_and_every_exponent_is_kept():
    ulp = 2.0**-10
    values = jnp.asarray([1 + ulp / 2, 1 + 1.5 * ulp, -1 - ulp / 2, 3e38, 1.2e-38, 0.0], jnp.float32)
    with precision_of("tf32"):
        found = at_precision(lambda a, b, _: a * b, values, jnp.ones_like(values))
    np.testing.assert_array_equal(found, rounded(values, "tf32"))
    np.testing.assert_array_equal(found[:3], np.float32([1, 1 + 2 * ulp, -1]))


@pytest.mark.parametrize("name", ROUNDED)
def test_batched_cotangents_are_the_loop(name):
    x, kernel, cotangents = arrays(6, (1, 4, 4, 4, 2), (3, 3, 3, 2, 3), (3, 1, 2, 2, 2, 3))
    with precision_of(name):
        _, pull = jax.vjp(lambda x: conv(x, kernel, (2, 2, 2), [(1, 1)] * 3), x)
    found = jax.vmap(pull)(cotangents)[0]
    for one, cotangent in zip(found, cotangents, strict=True):
        np.testing.assert_allclose(one, pull(cotangent)[0], rtol=2**-8 if name == "bfloat16" else 0, atol=1e-5)


@pytest.mark.parametrize(("case", "lowering"), LOWERINGS)
def test_float32_is_the_convolution_without_the_option(case, lowering):
    grid, window, strides, pad, c_in, c_out = CASES[case]
    padding = [(pad, pad)] * len(grid)
    x, kernel = arrays(7, (2, *grid, c_in), (*window, c_in, c_out))
    plain = convolution._native if lowering == "native" else convolution._folded
    plain = partial(plain, precision=lax.Precision.HIGHEST, strides=strides, padding=padding)
    ours = partial(conv, strides=strides, padding=padding, lowering=lowering)

    def gradient(f, x, kernel):
        return jax.grad(lambda x, k: (f(x, k) ** 2).sum(), (0, 1))(x, kernel)

    assert program(ours, x, kernel) == program(plain, x, kernel)
    assert program(partial(gradient, ours), x, kernel) == program(partial(gradient, plain), x, kernel)
    np.testing.assert_array_equal(jitted(ours, x, kernel), jitted(plain, x, kernel))


def program(f, *args):
    return str(jax.make_jaxpr(f)(*args))


def test_an_unknown_precision_is_refused():
    for refuse in (
        check_precision,
        lambda name: precision_of(name).__enter__(),
        lambda n: Forward(UNet(), precision=n),
    ):
        with pytest.raises(ValueError, match="precision is 'fp16'; known are float32, tf32, bfloat16"):
            refuse("fp16")
    for name in PRECISIONS:
        check_precision(name)


def test_the_innermost_precision_holds_and_ends_with_its_block():
    x = jnp.asarray([1 + 2.0**-9 + 2.0**-12], jnp.float32)

    def seen():
        return float(at_precision(lambda a, b, _: a * b, x, jnp.ones_like(x))[0])

    of = {"float32": 1 + 2.0**-9 + 2.0**-12, "tf32": 1 + 2.0**-9, "bfloat16": 1.0}
    assert seen() == of["float32"]
    with precision_of("bfloat16"):
        assert seen() == of["bfloat16"]
        with precision_of("tf32"):
            assert seen() == of["tf32"]
        with pytest.raises(ValueError, match="known are"), precision_of("tf32"):
            check_precision("fp8")
        assert seen() == of["bfloat16"]
    assert seen() == of["float32"]


# A third dimension where the lowering matters, two elsewhere: they compile faster.
NETWORKS = {
    "unet": (UNet((4, 8), (2,)), (8, 8, 12)),
    "dynunet": (DynUNet((4, 6, 8), (3, 3, 3), (1, 2, 2), ndim=2), (16, 16)),
    "swin_unetr": (
        SwinUNETR("merging", 4, 2, (1, 1, 1, 1), (1, 2, 2, 2), attention_window=4, norm="batch", ndim=2),
        (32, 32),
    ),
}
# Euclidean distances of logits and input gradients from float32's, relative. Measured below 9e-4 and 3e-2, and 1e-2 and 0.11. The
# gradients' go with the root of the rounding: where it turns the sign of what a leaky ReLU is given, the slope is another.
BOUNDS = {"tf32": (2e-3, 0.06), "bfloat16": (2e-2, 0.2)}


@cache
def network(name):
    """The network, variables for it, and an image."""
    module, grid = NETWORKS[name]
    (x,) = arrays(8, (1, *grid, 2))
    return module, variables_of(module, x), x


def variables_of(module, *given):
    """Random ones that keep a signal of order one everywhere: scales, variances and slopes are far from zero."""
    rng = np.random.default_rng(9)

    def leaf(of):
        noise = rng.standard_normal(of.shape)
        value = noise / np.sqrt(np.prod(of.shape[:-1])) if len(of.shape) > 1 else 0.5 + 0.1 * np.abs(noise)
        return jnp.asarray(value, jnp.float32)

    return jax.tree.map(leaf, jax.eval_shape(module.init, jax.random.key(0), *given))


@cache
def logits_and_gradient(name, precision):
    module, variables, x = network(name)
    logits_fn = LogitsOf(Forward(module, precision=precision))

    def both(variables, x, cotangent):
        y, pull = jax.vjp(partial(logits_fn, variables), x)
        return y, pull(cotangent)[0]

    (cotangent,) = arrays(10, (*x.shape[:-1], 2))
    return jitted(both, variables, x, cotangent)


def distance(a, b):
    return float(np.linalg.norm(np.asarray(a - b, np.float64)) / np.linalg.norm(np.asarray(b, np.float64)))


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("of", ["unet", "dynunet", pytest.param("swin_unetr", marks=pytest.mark.slow)])
def test_networks_stay_close_to_float32(of, name):
    exact, found = logits_and_gradient(of, "float32"), logits_and_gradient(of, name)
    for a, b, bound in zip(found, exact, BOUNDS[name], strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert jnp.isfinite(a).all()
        assert b.std() > 0.05
        # not float32 again, whose own rounding is 1e-6
        assert 3e-5 < distance(a, b) < bound


@pytest.mark.slow
def test_bfloat16_is_farther_from_float32_than_tf32():
    for of in NETWORKS:
        exact, tf32, bfloat16 = (logits_and_gradient(of, name) for name in PRECISIONS)
        for a, b, c in zip(exact, tf32, bfloat16, strict=True):
            assert distance(b, a) < 0.5 * distance(c, a)


def test_programs_are_shared_within_a_precision_and_not_between():
    module, variables, x = network("unet")
    run = jax.jit(lambda f, x: f(x), compiler_options=FAST_COMPILE)
    outputs = {}
    for name in (*PRECISIONS, *PRECISIONS):
        y = run(Partial(LogitsOf(Forward(module, precision=name)), variables), x)
        np.testing.assert_array_equal(y, outputs.setdefault(name, y))
    assert run._cache_size() == len(PRECISIONS)
    assert distance(outputs["tf32"], outputs["float32"]) > 1e-5
    assert distance(outputs["bfloat16"], outputs["tf32"]) > 1e-5


def test_a_forward_pass_ignores_the_precision_around_it():
    module, variables, x = network("unet")
    plain = program(LogitsOf(Forward(module)), variables, x)
    with precision_of("bfloat16"):
        assert program(LogitsOf(Forward(module)), variables, x) == plain
        assert program(LogitsOf(Forward(module, precision="tf32")), variables, x) != plain
        assert program(lambda *a: module.apply(*a)[0], variables, x) != plain


def test_taps_and_the_gradient_at_them_are_float32():
    module, variables, x = network("unet")
    tapped = TappedOf(Forward(module, precision="bfloat16"))
    y, taps = jax.eval_shape(tapped, variables, x, {})
    offset = jnp.zeros(taps["bottleneck"].shape)
    gradient = jax.eval_shape(jax.grad(lambda o: tapped(variables, x, {"bottleneck": o})[0].sum()), offset)
    assert {a.dtype for a in (y, gradient, *taps.values())} == {jnp.dtype("float32")}


def multiplications(jaxpr):
    """Of each convolution and matrix product of a program, inner ones too: the dtypes of its factors and its precision."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield (*(v.aval.dtype.name for v in equation.invars), *equation.params["precision"])
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from multiplications(inner)


class Small(nn.Module):
    """Every kind of product there is, in recomputed blocks: a strided convolution, attention, a transposed convolution."""

    remat: bool = True

    @nn.compact
    def __call__(self, x, offsets):
        taps = Taps(offsets)
        y = Conv(4, (3, 3, 3), (2, 2, 2))(x)
        block = PlainBlock(4, (3, 3, 3), (1, 1, 1), name="block")
        y = rematerialised(block, y, tap=taps) if self.remat else block(y, taps)
        y = SwinBlock(2, (2, 2, 2), shifted=True, remat=self.remat)(y)
        return ConvTranspose(2, (2, 2, 2), (2, 2, 2), padding=(0, 0, 0))(y), taps.values


def small_gradient(name, remat=True):
    """Of the logits and their input gradient, recomputed in two mirrored passes that run in a loop; and its arguments."""
    module = Small(remat)
    x, cotangent = arrays(14, (1, 8, 8, 8, 2), (1, 8, 8, 8, 2))
    logits_fn = LogitsOf(Forward(module, mirror_axes=(0,), loop=True, precision=name))

    def both(variables, x, cotangent):
        return jax.vjp(partial(logits_fn, variables), x)[1](cotangent)[0]

    return both, (variables_of(module, x, {}), x, cotangent)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float32", ("float32", "float32", lax.Precision.HIGHEST, lax.Precision.HIGHEST)),
        ("tf32", ("float32", "float32", lax.Precision.HIGH, lax.Precision.HIGH)),
        ("bfloat16", ("bfloat16", "bfloat16", lax.Precision.DEFAULT, lax.Precision.DEFAULT)),
    ],
)
def test_every_product_on_an_accelerator_is_the_hardwares_own(monkeypatch, name, expected):
    """Forward, backward and recomputed; nothing is rounded by hand."""
    gradient, arguments = small_gradient(name)
    for place in (convolution, forward, precision):
        monkeypatch.setattr(place, "platform", lambda: "gpu")
    jaxpr = jax.make_jaxpr(gradient)(*arguments)
    found = list(multiplications(jaxpr.jaxpr))
    # ten products, again for the backward pass, and their transposes
    assert len(found) > 25
    assert set(found) == {expected}
    assert "reduce_precision" not in str(jaxpr)
    assert "round_to_tf32" not in str(jaxpr)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED)
def test_recomputed_blocks_are_rounded_alike(name):
    found, expected = (
        jitted(gradient, *arguments) for gradient, arguments in (small_gradient(name, remat) for remat in (True, False))
    )
    # measured 0; from float32 it is ten times the bound, which leaves room for sums in another order
    assert distance(found, expected) < {"tf32": 5e-5, "bfloat16": 1e-3}[name]


def test_the_hardwares_bfloat16_is_the_emulated_one(monkeypatch):
    """XLA's CPU back end has bfloat16 too; outside `jit` it rounds as asked."""
    x, kernel = arrays(11, (2, 4, 5, 6, 9), (3, 3, 3, 9, 4))
    f = partial(conv, kernel=kernel, strides=(1, 2, 1), padding=[(1, 1)] * 3, lowering="native")
    (cotangent,) = arrays(12, jax.eval_shape(f, x).shape)

    def run():
        with precision_of("bfloat16"):
            y, pull = jax.vjp(f, x)
        return y, pull(cotangent)[0]

    emulated = run()
    monkeypatch.setattr(precision, "platform", lambda: "gpu")
    for ours, theirs in zip(run(), emulated, strict=True):
        assert ours.dtype == jnp.float32
        # a whole unit where float32 rounding decides a tie
        np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=1e-6)


def test_attention_weights_sum_to_one_in_bfloat16():
    q, k, v = arrays(13, *[(1, 2, 2, 8, 4)] * 3)
    bias = jnp.zeros((2, 8, 8))
    exact = _attend(q, k, jnp.ones_like(v), bias, None)
    np.testing.assert_allclose(exact, 1, atol=1e-6)
    with precision_of("bfloat16"):
        # numerator and denominator are the same sum, rounded in the same way; the quotient is in float32
        np.testing.assert_allclose(_attend(q, k, jnp.ones_like(v), bias, None), 1, atol=2e-7)
