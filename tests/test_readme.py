"""The README's ten lines run as they stand, on a small phantom and the built-in model."""

import re
from pathlib import Path

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xaiseg
from xaiseg import demo
from xaiseg.imaging import phantom

ROOT = Path(__file__).resolve().parent.parent


def examples():
    """The README's Python: bring your own network, and the API in ten lines."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def apply(params, x):
    kernel, bias = params
    return jnp.tanh(jnp.einsum("n...c,cd->n...d", x, kernel) + bias.reshape((1,) * (x.ndim - 1) + bias.shape))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        return jnp.tanh(linen.Conv(2, (3,) * (x.ndim - 2))(x))


class Nnx(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(2, 2, (3, 3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jnp.tanh(self.conv(x))


def own_network(name):
    """Arguments of `explain_NAME` after image and lesions, and the same network as a function of a volume `(X, Y, Z, 2)`."""
    if name == "function":
        params = jnp.array([[0.5, -1.0], [2.0, 0.3]]), jnp.array([0.1, -0.2])
        return (apply, params), lambda x: apply(params, x[None])[0]
    if name in ("linen", "slices"):
        sides = (1, 8, 8) if name == "slices" else (1, 8, 8, 8)
        variables = Linen().init(jax.random.key(0), jnp.zeros((*sides, 2)))
        if name == "linen":
            return (Linen(), variables), lambda x: Linen().apply(variables, x[None])[0]
        return (Linen(), variables), lambda x: jnp.moveaxis(Linen().apply(variables, jnp.moveaxis(x, 2, 0)), 0, 2)
    if name == "nnx":
        net = Nnx()
        return (net,), lambda x: net(x[None])[0]
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.Conv3d(2, 2, 3, padding=1, key=jax.random.key(0))
    return (net,), lambda x: jnp.moveaxis(net(jnp.moveaxis(x, -1, 0)), 0, -1)


@pytest.mark.parametrize("name", ["function", "linen", "nnx", "equinox", "slices"])
def test_bring_your_own_network(name):
    """Each example as it stands, but for a smaller window and no noise, against the whole Jacobian of the user's own network."""
    own, _ = examples()
    names: dict = {}
    exec(
        own.replace("(96, 96, ", "(8, 8, ")
        .replace("96)", "8)")
        .replace("samples=50, noise=0.05", "samples=1, noise=0"),
        names,
    )
    arguments, network = own_network(name)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 2)), jnp.float32)
    voxels = np.array([[3, 3, 3], [3, 4, 3], [4, 4, 5]], np.int32)
    (found,), _ = names[f"explain_{name}"](image, [xaiseg.Instance(1, voxels)], *arguments)
    rows = np.asarray(jax.jacrev(lambda x: network(x)[tuple(voxels.T)][:, 1])(image))
    expected = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
    whole = np.zeros_like(expected)
    whole[tuple(slice(s, s + n) for s, n in zip(found.start, found.values.shape[:3], strict=True))] = found.values
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(whole, expected, atol=1e-5)


def test_the_api_in_ten_lines(tmp_path, monkeypatch):
    small = phantom.phantom(seed=3, shape=(80, 96, 80), spacing=2.0)
    monkeypatch.setattr(demo, "phantom", lambda seed: small)
    (tmp_path / "my_model").symlink_to(ROOT / "xaiseg" / "shipped" / "example")
    demo.write_phantoms(tmp_path, 1).rename(tmp_path / "scans.tsv")
    monkeypatch.chdir(tmp_path)

    (_, code) = examples()
    quick = code.replace("samples=50", "samples=2").replace("image, lesions)", "image, lesions[:1])")
    assert quick.count("samples=2") == quick.count("lesions[:1]") == 1
    names: dict = {}
    exec(quick, names)
    saliency, lesion = names["maps"][0], names["lesions"][0]
    assert saliency.values.shape[-1] == len(names["model"].spec.channels)
    inside = saliency.values[tuple((lesion.voxels - np.array(saliency.start)).T)]
    # the model looks for what is bright on FLAIR, so a brighter voxel inside a lesion raises its logit
    assert inside[:, 0].mean() > 0
    assert saliency.standard_error is not None
    assert names["infos"][0].samples == 2


@pytest.mark.parametrize("command", ["xaiseg demo", "pip install -e '.[test]'"])
def test_ci_runs_the_commands_of_the_readme(command):
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci" / "run").read_text()
