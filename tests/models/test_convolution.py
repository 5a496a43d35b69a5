"""The folded lowering against lax's own convolution, and the transposed one against PyTorch's (stored)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from xaiseg.models.convolution import conv, conv_transpose

FIXTURES = Path(__file__).parent.parent / "fixtures"
# Sums of up to 20·64 products of order one in another order: a few times sqrt(1280)·ε.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}

CASES = {
    "the paper's": ((8, 6, 10), (3, 3, 3), (2, 2, 2), (1, 1, 1), 2, 4),
    "stride 1": ((5, 6, 7), (3, 3, 3), (1, 1, 1), (1, 1, 1), 5, 3),
    "odd grid, stride 2": ((7, 5, 9), (3, 3, 3), (2, 2, 2), (1, 1, 1), 3, 2),
    "even kernel": ((6, 7, 8), (2, 4, 2), (2, 2, 2), (0, 1, 0), 3, 2),
    "anisotropic": ((9, 8, 7), (1, 3, 5), (1, 2, 3), (0, 1, 2), 2, 3),
    "depth only": ((9, 4, 4), (5, 1, 1), (3, 1, 1), (2, 0, 0), 4, 2),
    "stride beyond the kernel": ((11, 7, 7), (2, 2, 2), (3, 3, 3), (0, 0, 0), 2, 2),
    "one tap": ((6, 5, 4), (1, 1, 1), (1, 1, 1), (0, 0, 0), 6, 5),
    "one tap, strided": ((6, 5, 4), (1, 1, 1), (2, 2, 2), (0, 0, 0), 6, 5),
    "one tap, padded": ((6, 5, 4), (1, 1, 1), (1, 1, 1), (1, 1, 1), 6, 5),
    "one channel": ((6, 6, 6), (3, 3, 3), (1, 1, 1), (1, 1, 1), 1, 1),
    "last joined": ((6, 6, 6), (3, 3, 3), (2, 2, 2), (1, 1, 1), 8, 2),
    "first not joined": ((6, 6, 6), (3, 3, 3), (2, 2, 2), (1, 1, 1), 9, 2),
    "many channels": ((4, 6, 5), (4, 3, 2), (2, 1, 1), (1, 1, 0), 20, 3),
    "kernel as deep as the grid": ((3, 4, 4), (3, 3, 3), (1, 1, 1), (0, 0, 0), 12, 2),
}


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_folded_is_native_forward_and_backward(case):
    grid, window, strides, sides, c_in, c_out = case
    x, kernel = arrays(0, (2, *grid, c_in), (*window, c_in, c_out))
    padding = [(p, p) for p in sides]

    def run(lowering):
        y, pull = jax.vjp(lambda x, k: conv(x, k, strides, padding, lowering), x, kernel)
        (cotangent,) = arrays(1, y.shape)
        return y, *pull(cotangent)

    folded, native = jax.jit(run, static_argnums=0)("folded"), jax.jit(run, static_argnums=0)("native")
    for ours, theirs in zip(folded, native, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_padding_may_differ_before_and_after():
    x, kernel = arrays(2, (1, 5, 6, 7, 3), (3, 2, 3, 3, 2))
    padding = [(0, 2), (1, 0), (2, 1)]
    folded, native = (conv(x, kernel, (2, 1, 2), padding, lowering) for lowering in ("folded", "native"))
    np.testing.assert_allclose(folded, native, **TOLERANCE)


@pytest.mark.parametrize("lowering", ["folded", "native"])
def test_convolution_is_the_loop_over_its_definition(lowering):
    x, kernel = arrays(3, (1, 4, 5, 3, 2), (3, 2, 2, 2, 3))
    strides, padding = (2, 1, 2), [(1, 1), (0, 1), (1, 0)]
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), *padding, (0, 0)])
    out = [(n - k) // s + 1 for n, k, s in zip(padded.shape[1:4], kernel.shape[:3], strides, strict=True)]
    expected = np.zeros((1, *out, 3))
    for place in np.ndindex(*out):
        at = tuple(slice(i * s, i * s + k) for i, s, k in zip(place, strides, kernel.shape[:3], strict=True))
        expected[(0, *place)] = np.einsum("xyzc,xyzco->o", padded[(0, *at)], np.asarray(kernel, np.float64))
    np.testing.assert_allclose(conv(x, kernel, strides, padding, lowering), expected, **TOLERANCE)


@pytest.mark.parametrize("lowering", ["folded", "native"])
@pytest.mark.parametrize("number", range(4))
def test_transposed_convolution_is_pytorchs(number, lowering):
    stored = np.load(FIXTURES / "conv_transpose.npz")
    strides, sides, extra = stored[f"geometry{number}"].tolist()
    x = np.moveaxis(stored[f"x{number}"], 1, -1)
    kernel = stored[f"weight{number}"].transpose(2, 3, 4, 1, 0)
    y = conv_transpose(jnp.asarray(x), jnp.asarray(kernel), strides, [(p, p) for p in sides], extra, lowering)
    np.testing.assert_allclose(y, np.moveaxis(stored[f"y{number}"], 1, -1), **TOLERANCE)


@pytest.mark.parametrize("c_in", [2, 9])
def test_derivatives_are_finite_differences_in_float64(c_in):
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        x, kernel, back = (
            jnp.asarray(rng.standard_normal(shape))
            for shape in [(1, 4, 4, 2, c_in), (3, 3, 3, c_in, 2), (3, 3, 3, c_in, 2)]
        )
        padding = [(1, 1)] * 3

        def down_and_up(x, kernel, back):
            y = conv(x, kernel, (2, 2, 2), padding, "folded")
            return conv_transpose(y, back, (2, 2, 2), padding, (1, 1, 1), "folded")

        # linear in each argument: central differences are exact but for rounding, 1e-16 over a step of 1e-6 or so
        check_grads(down_and_up, (x, kernel, back), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_vmap_is_the_loop():
    x, kernel = arrays(5, (3, 2, 6, 5, 4, 2), (3, 3, 3, 2, 3))

    def run(x):
        y = conv(x, kernel, (2, 1, 2), [(1, 1)] * 3, "folded")
        return conv_transpose(y, kernel, (2, 1, 2), [(1, 1)] * 3, (1, 0, 1), "folded")

    np.testing.assert_allclose(jax.vmap(run)(x), jnp.stack([run(one) for one in x]), **TOLERANCE)


def test_two_dimensional_convolutions_are_native():
    x, kernel = arrays(6, (1, 5, 6, 2), (3, 3, 2, 3))
    padded = np.pad(np.asarray(x), [(0, 0), (1, 1), (1, 1), (0, 0)])
    expected = np.einsum("xyc,xyco->o", padded[0, 1:4, 2:5], kernel)
    np.testing.assert_allclose(conv(x, kernel, (1, 1), [(1, 1)] * 2)[0, 1, 2], expected, **TOLERANCE)
