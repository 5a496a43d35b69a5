"""The convolution blocks against their formulas in numpy, float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg.models.blocks import PlainBlock, ResidualBlock
from xaiseg.models.taps import Taps

EPSILON = 1e-5


def convolution(x, kernel, strides):
    """PyTorch's, without bias, of `x` `(N, *grid, C)`, padded by MONAI's `int((k - s + 1) / 2)`."""
    window = kernel.shape[:-2]
    padding = [int((k - s + 1) / 2) for k, s in zip(window, strides, strict=True)]
    x = np.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)])
    grid = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], window, strides, strict=True)]
    y = np.zeros((x.shape[0], *grid, kernel.shape[-1]))
    for at in itertools.product(*map(range, window)):
        view = tuple(slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(at, strides, grid, strict=True))
        y += x[(slice(None), *view)] @ kernel[at]
    return y


def norm(x, kind, params, stats):
    if kind == "none":
        return x
    if kind == "batch":
        mean, var = stats["mean"], stats["var"]
    else:
        groups = int(kind.removeprefix("group:")) if kind.startswith("group:") else x.shape[-1]
        mean, var = np.empty_like(x), np.empty_like(x)
        for n, members in itertools.product(range(len(x)), np.split(np.arange(x.shape[-1]), groups)):
            mean[n][..., members], var[n][..., members] = x[n][..., members].mean(), x[n][..., members].var()
    y = (x - mean) / np.sqrt(var + EPSILON)
    return y if kind == "instance" else y * params["scale"] + params["bias"]


def activation(x, kind, params):
    match kind:
        case "prelu":
            return np.where(x >= 0, x, params["act"]["slope"] * x)
        case "leakyrelu":
            return np.where(x >= 0, x, 0.01 * x)
        case "swish":
            return x / (1 + np.exp(-x))
    raise AssertionError(kind)


def block(x, variables, strides, kind, act, residual):
    """Output and the outputs of the two convolutions."""
    params, stats = variables.get("params", {}), variables.get("batch_stats", {})

    def conv_norm(x, i, strides):
        y = convolution(x, params[f"conv{i}"]["kernel"], strides)
        return y, norm(y, kind, params.get(f"norm{i}"), stats.get(f"norm{i}"))

    ones = (1,) * len(strides)
    conv1, y = conv_norm(x, 1, strides)
    conv2, y = conv_norm(activation(y, act, params), 2, ones)
    if residual:
        y = y + (conv_norm(x, 3, strides)[1] if "conv3" in params else x)
    return activation(y, act, params), conv1, conv2


CASES = [
    # kernel, strides, features in and out, norm, activation
    ((3, 3, 3), (2, 1, 2), 2, 4, "group:2", "leakyrelu"),
    ((3, 3, 3), (1, 1, 1), 4, 4, "group:4", "prelu"),
    ((1, 3, 5), (1, 2, 2), 4, 4, "instance", "leakyrelu"),
    ((3, 1, 3), (2, 2, 1), 3, 2, "instance_affine", "swish"),
    ((3, 3), (2, 2), 2, 3, "batch", "prelu"),
    ((3, 3), (1, 1), 3, 3, "batch", "leakyrelu"),
    ((5, 3), (2, 1), 2, 2, "none", "leakyrelu"),
]


@pytest.mark.parametrize("kind", [PlainBlock, ResidualBlock])
@pytest.mark.parametrize(("kernel", "strides", "inputs", "features", "norm_kind", "act"), CASES)
def test_a_block_is_its_formula(kind, kernel, strides, inputs, features, norm_kind, act):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *(4, 6, 4)[: len(kernel)], inputs))
    module = kind(features, kernel, strides, norm_kind, act)

    def apply(variables, x):
        taps = Taps()
        return module.apply(variables, x, taps.within("b")), taps.values

    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, Taps()), jnp.asarray(x, jnp.float32))
    # positive, as variances must be; kernels are centred
    variables = jax.tree.map(lambda a: rng.uniform(0.2, 1.2, a.shape), shapes)
    for name, leaves in variables["params"].items():
        if name.startswith("conv"):
            leaves["kernel"] -= 0.7
    assert ("conv3" in variables["params"]) == (kind is ResidualBlock and (inputs != features or set(strides) != {1}))
    y, taps = jax.jit(apply)(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (variables, x)))
    expected = dict(
        zip(
            ("y", "b.conv1", "b.conv2"),
            block(x, variables, strides, norm_kind, act, kind is ResidualBlock),
            strict=True,
        )
    )
    assert list(taps) == ["b.conv1", "b.conv2"]
    for name, found in {"y": y, **taps}.items():
        # float32 sums of some hundred products
        tolerance = 1e-5 * np.abs(expected[name]).max()
        np.testing.assert_allclose(found, expected[name], atol=tolerance, err_msg=name)


def test_an_unknown_activation_is_refused():
    x = jnp.zeros((1, 4, 4, 2))
    with pytest.raises(ValueError, match="activation is 'sine'; known are prelu, leakyrelu"):
        PlainBlock(2, (3, 3), (1, 1), activation="sine").init(jax.random.key(0), x, Taps())
