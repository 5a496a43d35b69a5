"""Gradients of learnt kernels beside a loop over positions in float64, and beside what JAX derives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg.models.convolution import conv, conv_transpose, learnt_kernels
from xaiseg.models.precision import precision_of

CASES = [  # window, strides, padding
    ((3, 3, 3), (1, 1, 1), 1),
    ((3, 3, 3), (2, 2, 2), 1),
    ((3, 3, 3), (1, 2, 2), 1),
    ((3, 3, 3), (2, 1, 1), 1),
    ((1, 3, 3), (1, 1, 1), 0),
    ((1, 1, 1), (2, 2, 2), 0),
    ((2, 2, 2), (2, 2, 2), 0),
    ((5, 3, 2), (2, 1, 3), 1),
]
GRID = (6, 7, 8)
IN, OUT = 3, 4


def looped(x, cotangent, window, strides):
    """Sum over the outputs of what their window sees, `x` being padded."""
    kernel = np.zeros((*window, x.shape[-1], cotangent.shape[-1]))
    for n, *place in itertools.product(*map(range, cotangent.shape[:-1])):
        seen = tuple(slice(p * s, p * s + k) for p, s, k in zip(place, strides, window, strict=True))
        kernel += np.einsum("abci,o->abcio", x[(n, *seen)], cotangent[(n, *place)])
    return kernel


def learnt(layer, kernel):
    """The gradient of a learnt kernel for a random cotangent, and that."""
    cotangent = random(2, *jax.eval_shape(layer, kernel).shape)

    @jax.jit
    def gradient(kernel):
        with learnt_kernels():
            return jax.vjp(layer, kernel)[1](cotangent)[0]

    return gradient(kernel), cotangent


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize(("window", "strides", "padding"), CASES)
def test_a_loop_over_positions(window, strides, padding):
    x, kernel = random(0, 2, *GRID, IN), random(1, *window, IN, OUT)
    sides = [(padding, padding)] * 3
    got, cotangent = learnt(lambda k: conv(x, k, strides, sides, "folded"), kernel)
    padded = np.pad(np.float64(x), ((0, 0), *sides, (0, 0)))
    expected = looped(padded, np.float64(cotangent), window, strides)
    # float32 sums of at most 672 products of size one, beside sums of size 20
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("window", "strides", "padding"), CASES)
def test_a_loop_over_positions_of_the_transposed(window, strides, padding):
    x, kernel = random(0, 2, *GRID, OUT), random(1, *window, IN, OUT)
    sides = [(padding, padding)] * 3
    extra = [s - 1 for s in strides]
    got, cotangent = learnt(lambda k: conv_transpose(x, k, strides, sides, extra, "folded"), kernel)
    padded = np.pad(np.float64(cotangent), ((0, 0), *sides, (0, 0)))
    expected = looped(padded, np.float64(x), window, strides)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())  # as above


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "tf32"])
def test_both_gradients_are_those_that_jax_derives(precision, transposed):
    x, kernel = random(0, 2, *GRID, IN), random(1, 3, 3, 3, *((OUT, IN) if transposed else (IN, OUT)))

    def loss(x, kernel, precision=precision):
        layer = conv_transpose if transposed else conv
        extra = {"output_padding": (1, 1, 1)} if transposed else {}
        with precision_of(precision):
            return jnp.square(layer(x, kernel, (2, 2, 2), [(1, 1)] * 3, lowering="folded", **extra)).sum()

    expected = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
    with learnt_kernels():
        got = jax.jit(jax.grad(lambda *a: loss(*a), (0, 1)))(x, kernel)
    # the same rounded factors, summed in another order; a sum next to a rounding boundary may then round to its neighbour
    tolerance = {"float32": 1e-6, "tf32": 1e-3, "bfloat16": 8e-3}[precision]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
    exact = jax.jit(jax.grad(lambda *a: loss(*a, precision="float32"), (0, 1)))(x, kernel)
    for a, b in zip(got, exact, strict=True):
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        # of factors rounded to 8 and 11 bits: the backward pass rounds, too
        low, high = {"float32": (0, 1e-6), "tf32": (5e-5, 2e-3), "bfloat16": (5e-4, 2e-2)}[precision]
        assert low <= error <= high


def test_the_kernel_gradient_is_products_where_kernels_are_learnt():
    """Not the convolution with a window as large as the grid."""
    x, kernel = random(0, 2, 16, 16, 16, IN), random(1, 3, 3, 3, IN, OUT)

    def gradient(kernel):
        return jax.grad(lambda k: jnp.square(conv(x, k, (1, 1, 1), [(1, 1)] * 3, "folded")).sum())(kernel)

    assert "dot_general" not in str(jax.make_jaxpr(gradient)(kernel))
    with learnt_kernels():
        assert str(jax.make_jaxpr(lambda k: gradient(k))(kernel)).count("dot_general") == 3
