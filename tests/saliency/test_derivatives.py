"""Derivatives along coordinates against finite differences in float64, nested reverse mode, and by hand."""

import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from xaiseg.saliency.derivatives import directional_derivatives, scalar_derivatives, through_transform

# central differences of order six, six and four at -3h … 3h
FIRST = np.array([-1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60])
SECOND = np.array([1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90])
THIRD = np.array([1 / 8, -1, 13 / 8, 0, -13 / 8, 1, -1 / 8])
DIMENSIONS = ("NDHWC", "DHWIO", "NDHWC")


def convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=DIMENSIONS)


def upper(kernels, before, offset):
    """From the tap on: instance norm, GELU, a convolution, another instance norm, and the mean of squares of a softmax."""
    y = convolution(jax.nn.gelu(before, approximate=False), kernels[0]) + offset
    y = jax.nn.gelu((y - y.mean((1, 2, 3), keepdims=True)) / (y.std((1, 2, 3), keepdims=True) + 0.1), approximate=False)
    return jnp.square(jax.nn.softmax(convolution(y, kernels[1]), -1)).mean() + jnp.sin(y).sum()


def whole(kernels, image, offset):
    return upper(kernels[1:], convolution(image, kernels[0]), offset)


@pytest.fixture
def network():
    """Weights, image and a point at the tap, float64."""
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 3, 2, 3), (3, 3, 3, 3, 4), (1, 1, 1, 4, 3)]
    with jax.enable_x64(True):
        kernels = [jnp.asarray(rng.normal(size=s) / 3) for s in shapes]
        image, x = (jnp.asarray(rng.normal(size=(1, 4, 3, 2, c))) for c in (2, 4))
        yield Partial(whole, kernels, image), x


def differences(f, x, elements, step=0.01):
    moved = jax.vmap(jax.vmap(lambda i, t: f(x.reshape(-1).at[i].add(t).reshape(x.shape)), (None, 0)), (0, None))
    values = np.asarray(jax.jit(moved)(jnp.asarray(elements), step * jnp.arange(-3.0, 4.0)))
    return values @ FIRST / step, values @ SECOND / step**2, values @ THIRD / step**3


def test_derivatives_are_finite_differences(network):
    f, x = network
    elements = np.arange(0, x.size, 7)
    found = directional_derivatives(f, x, elements)
    for order, (one, expected) in enumerate(zip(found, differences(f, x, elements), strict=True), 1):
        assert one.shape == (len(elements),)
        assert one.dtype == np.float64
        assert np.abs(expected).max() > 1e-3
        # truncation and rounding of the differences: 1e-8 of the third at most
        np.testing.assert_allclose(one, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max(), err_msg=str(order))


def test_derivatives_are_the_diagonals_of_nested_reverse_mode(network):
    f, x = network
    gradient = jax.jit(jax.grad(f))(x).reshape(-1)
    hessian = jax.jit(jax.hessian(f))(x).reshape(x.size, x.size)
    first, second, _ = directional_derivatives(f, x, range(x.size), chunk=32)
    np.testing.assert_allclose(first, gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(second, np.diag(hessian), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_any_chunk_and_order_gives_the_same(network, chunk):
    f, x = network
    elements = [5, 0, 95, 17, 5]
    expected = directional_derivatives(f, x, elements, chunk=4)
    for one, all_ in zip(directional_derivatives(f, x, elements[::-1], chunk=chunk), expected, strict=True):
        np.testing.assert_allclose(one[::-1], all_, rtol=1e-9, atol=1e-13)


def test_float32_and_no_elements():
    x = jnp.array([[2.0, 3.0]])
    found = directional_derivatives(lambda x: (x**4).sum(), x, np.array([1]))
    assert [(d.dtype, d.tolist()) for d in found] == [(np.float32, [n]) for n in (108.0, 108.0, 72.0)]
    assert [(d.dtype, d.shape) for d in directional_derivatives(jnp.sum, x, [])] == [(np.float32, (0,))] * 3


def test_a_rectifier_is_piecewise_linear():
    found = directional_derivatives(lambda x: 3 * jax.nn.relu(x).sum(), jnp.array([2.0, -1.0]), [0, 1])
    assert [d.tolist() for d in found] == [[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(getattr(inner, "jaxpr", inner))


def test_what_comes_before_the_tap_runs_once_without_tangents(network):
    """Two convolutions before it, of one image each, though there are eleven elements; the one behind has a batch of them."""
    f, x = network
    from xaiseg.saliency.derivatives import _along

    jaxpr = jax.make_jaxpr(_along)(f, x, np.arange(11, dtype=np.int32)).jaxpr
    batches = [e.invars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "conv_general_dilated"]
    before, behind = (1, 4, 3, 2), (11, 4, 3, 2)
    assert [b for b in batches if b[-1] != 4] == [(*before, 2), (*before, 3)]
    assert {b for b in batches if b[-1] == 4} == {(*behind, 4)}


def test_equal_functions_share_a_program():
    traces = []

    def counted(scale, x):
        traces.append(1)
        return scale * (x**3).sum()

    x = jnp.arange(5.0)
    for scale in (1.0, 2.0):
        first, _, _ = directional_derivatives(Partial(counted, jnp.float32(scale)), x, [1, 2, 4], chunk=2)
        np.testing.assert_allclose(first, scale * 3 * np.array([1, 4, 16]))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("f", "x", "elements", "chunk", "message"),
    [
        (jnp.sum, jnp.ones(3), [0, 3], 2, "elements from 0 to 3, but x has 3, numbered from 0"),
        (jnp.sum, jnp.ones(3), [-1], 2, "elements from -1 to -1"),
        (jnp.sum, jnp.ones(3), [0], 0, "a chunk of at least 1"),
        (jnp.sum, jnp.ones(3), [[0]], 2, "not 2 and 2 axes"),
        (jnp.sum, jnp.arange(3), [0], 2, "x is int32, expected a floating type"),
        (jnp.sin, jnp.ones(3), [0], 2, r"a result of shape \(3,\), expected a scalar"),
    ],
)
def test_what_is_wrong_is_said(f, x, elements, chunk, message):
    with pytest.raises(ValueError, match=message):
        directional_derivatives(f, x, elements, chunk=chunk)


def test_through_a_transform():
    """`h(φ(t)) = exp(sin(t))` at 0.3, by JAX as one function."""
    with jax.enable_x64(True):
        t = jnp.float64(0.3)
        inner, outer = scalar_derivatives(jnp.sin, t), scalar_derivatives(jnp.exp, jnp.sin(t))
        expected = scalar_derivatives(lambda t: jnp.exp(jnp.sin(t)), t)
        np.testing.assert_allclose(through_transform(outer, inner), expected, rtol=1e-12)


def test_the_examples():
    result = doctest.testmod(sys.modules["xaiseg.saliency.derivatives"])
    assert result.attempted > 2
    assert result.failed == 0
