"""Networks from elsewhere: the README's examples, each against the Jacobian of the user's own network, and what adapters refuse."""

import itertools
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

import xaiseg
from xaiseg._types import Instance
from xaiseg.models.adapters import (
    check_logits_fn,
    from_equinox,
    from_function,
    from_linen,
    from_nnx,
    slicewise,
    slicewise_tapped,
    tapped_from_linen,
)
from xaiseg.models.taps import Taps

KEY = jax.random.key(0)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


SHAPE = (5, 4, 6)  # three different sides: no two axes can be mixed up
LESIONS = [Instance(1, np.array([[1, 1, 2], [1, 2, 2], [4, 3, 5]], np.int32))]
IMAGE = normal(*SHAPE, 2)
PARAMS = {"in": normal(2, 4), "out": normal(4, 2)}


class Linen(nn.Module):
    features: list[int]  # a list, as most people write it: the module has no hash

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features[0], (3,) * (x.ndim - 2), name="body")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Conv(self.features[1], (1,) * (x.ndim - 2), name="head")(jnp.tanh(x))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Conv(2, 4, (3, 3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Conv(4, 2, (1, 1, 1), rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(jnp.tanh(self.norm(self.body(x)))))


def equinox_net(state=True):
    """An Equinox network `(2, *window) -> (2, *window)`, or with batch norm `(x, state) -> (…, state)`, and its maker."""
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: pip install equinox")

    class Net(eqx.Module):
        body: eqx.nn.Conv3d
        norm: eqx.nn.BatchNorm | None
        dropout: eqx.nn.Dropout
        head: eqx.nn.Conv3d

        def __init__(self, key):
            self.body = eqx.nn.Conv3d(2, 4, 3, padding=1, key=key)
            self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="ema") if state else None
            self.dropout = eqx.nn.Dropout(0.5)
            self.head = eqx.nn.Conv3d(4, 2, 1, key=key)

        def __call__(self, x, state=None):
            x = self.body(x)
            if self.norm is not None:
                x, state = self.norm(x, state)
            x = self.head(self.dropout(jnp.tanh(x)))
            return x if state is None else (x, state)

    return Net


def randomised(tree, seed=7):
    """Every array redrawn: kernels of both signs, biases, scales and batch statistics that are neither 0 nor 1."""
    rng = np.random.default_rng(seed)

    def redrawn(a):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        return jnp.asarray(rng.uniform(-0.5, 0.5, a.shape) + (len(a.shape) < 2), a.dtype)

    return jax.tree.map(redrawn, tree)


def linen_variables(net, ndim=3):
    return randomised(jax.eval_shape(partial(net.init, train=False), KEY, jnp.zeros((1, *(4,) * ndim, 2))))


def nnx_net(seed=0):
    net = NNX(nnx.Rngs(seed))
    graphdef, state = nnx.split(net)
    return nnx.merge(graphdef, randomised(state, seed))


def brute_force(network, image, lesion, target=1):
    """Signed maximum of the rows of the Jacobian of `network`, `(*window, C) -> (*window, classes)`."""
    voxels = tuple(lesion.voxels[:, : image.ndim - 1].T)
    return strongest(np.asarray(jax.jit(jax.jacrev(lambda x: network(x)[(*voxels, target)]))(image)))


def strongest(rows):
    return np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]


def assert_same(found, expected, tolerance=1e-5):
    """Within 1e-5 of the largest value: both are float32 sums of a few hundred products, in another order."""
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def network(params, x):
    """Smooth, and couples neighbours along every axis; of numpy arrays or JAX's."""
    np_ = np if isinstance(x, np.ndarray) else jnp
    hidden = np_.tanh(x @ params["in"])
    for axis in range(1, x.ndim - 1):
        hidden = hidden + np_.roll(hidden, 1, axis) * np_.roll(hidden, -1, axis)
    return hidden @ params["out"]


# The README's examples, as they stand there.


def explain_function(image, lesions, params):
    logits_fn = from_function(network, params)  # network(params, x): (N, x, y, z, C) -> (N, x, y, z, classes)
    predictor = xaiseg.StitchedPredictor(logits_fn, window=image.shape[:3])
    explain = xaiseg.smoothgrad(samples=1, noise=0.0)
    return explain(jax.random.key(0), predictor, image, lesions)


def explain_linen(image, lesions, net, variables):
    logits_fn = from_linen(net, variables, train=False)
    predictor = xaiseg.StitchedPredictor(logits_fn, window=image.shape[:3])
    explain = xaiseg.jacobian_rows(xaiseg.signed_max())
    return explain(jax.random.key(0), predictor, image, lesions)


def explain_nnx(image, lesions, net):
    logits_fn = from_nnx(net)
    predictor = xaiseg.StitchedPredictor(logits_fn, window=image.shape[:3])
    explain = xaiseg.jacobian_rows(xaiseg.signed_max())
    return explain(jax.random.key(0), predictor, image, lesions)


def explain_equinox(image, lesions, net, state):
    logits_fn = from_equinox(net, state)
    predictor = xaiseg.StitchedPredictor(logits_fn, window=image.shape[:3])
    explain = xaiseg.jacobian_rows(xaiseg.signed_max())
    return explain(jax.random.key(0), predictor, image, lesions)


def explain_slices(image, lesions, net, variables, window):
    logits_fn = slicewise(from_linen(net, variables, train=False), axis=2)
    predictor = xaiseg.StitchedPredictor(logits_fn, window=window)  # (96, 96, 1)
    explain = xaiseg.jacobian_rows(xaiseg.signed_max())
    return explain(jax.random.key(0), predictor, image, lesions)


def test_function():
    """Against central differences in float64, in numpy."""
    (found,), _ = explain_function(IMAGE, LESIONS, PARAMS)
    x = np.asarray(IMAGE, np.float64)
    params = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    places, step = tuple(LESIONS[0].voxels.T), 1e-5
    rows = np.zeros((len(LESIONS[0].voxels), *x.shape))
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        rows[(slice(None), *index)] = (network(params, up[None]) - network(params, down[None]))[0][(*places, 1)] / (
            2 * step
        )
    assert_same(found.values, strongest(rows))


def test_function_without_parameters():
    predictor = xaiseg.StitchedPredictor(from_function(lambda x: network(PARAMS, x)), SHAPE)
    (found,), _ = xaiseg.jacobian_rows(xaiseg.signed_max())(KEY, predictor, IMAGE, LESIONS)
    (expected,), _ = explain_function(IMAGE, LESIONS, PARAMS)
    assert_same(found.values, expected.values)


def test_linen():
    net = Linen([4, 2])
    variables = linen_variables(net)
    (found,), _ = explain_linen(IMAGE, LESIONS, net, variables)
    assert_same(found.values, brute_force(lambda x: net.apply(variables, x[None], train=False)[0], IMAGE, LESIONS[0]))


def test_nnx():
    net = nnx_net()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.RngState))))
    count = int(net.dropout.rngs.count[...])
    (found,), _ = explain_nnx(IMAGE, LESIONS, net)

    assert (net.dropout.deterministic, net.norm.use_running_average) == (False, False)
    assert int(net.dropout.rngs.count[...]) == count
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.RngState))))
    jax.tree.map(np.testing.assert_array_equal, before, after)

    net.eval()
    assert_same(found.values, brute_force(lambda x: net(x[None])[0], IMAGE, LESIONS[0]))


def test_nnx_does_not_follow_later_training():
    """Nor does a training step that donates the buffers of the parameters take them away."""
    net = nnx_net()
    logits_fn = from_nnx(net)
    before = logits_fn(IMAGE[None])
    net.norm.mean[...] = net.norm.mean[...] * 2
    net.head.kernel[...].delete()
    np.testing.assert_array_equal(logits_fn(IMAGE[None]), before)


def test_nnx_that_draws_at_random_draws_alike():
    class Stubborn(nnx.Module):
        def __init__(self):
            self.rngs = nnx.Rngs(3)

        def __call__(self, x):
            return x * jax.random.uniform(self.rngs(), x.shape)

    net = Stubborn()
    logits_fn = from_nnx(net)
    first = logits_fn(IMAGE[None])
    np.testing.assert_array_equal(jax.jit(lambda f, x: f(x))(logits_fn, IMAGE[None]), first)
    np.testing.assert_array_equal(net(IMAGE[None]), first)  # the user's own stream was not advanced


@pytest.mark.parametrize("with_state", [True, False])
def test_equinox(with_state):
    net_type = equinox_net(with_state)
    eqx = sys.modules["equinox"]
    net, state = eqx.nn.make_with_state(net_type)(KEY)
    state = randomised(state) if with_state else None
    (found,), _ = explain_equinox(IMAGE, LESIONS, net, state)
    assert not net.dropout.inference

    quiet = eqx.nn.inference_mode(net)

    def own(x):
        x = jnp.moveaxis(x, -1, 0)
        return jnp.moveaxis(quiet(x, state)[0] if with_state else quiet(x), 0, -1)

    assert_same(found.values, brute_force(own, IMAGE, LESIONS[0]))


def test_equinox_that_sets_its_state_batched_and_channels_last():
    equinox_net()
    eqx = sys.modules["equinox"]

    class Counting(eqx.Module):
        weight: jax.Array
        calls: eqx.nn.StateIndex

        def __init__(self):
            self.weight, self.calls = PARAMS["out"].T, eqx.nn.StateIndex(jnp.array(0))

        def __call__(self, x, state, scale):
            assert x.shape == (3, *SHAPE, 2)
            return x @ self.weight * scale, state.set(self.calls, state.get(self.calls) + 1)

    net, state = eqx.nn.make_with_state(Counting)()
    logits_fn = from_equinox(net, state, batched=True, channels_first=False, scale=2.0)
    x = jnp.stack([IMAGE, -IMAGE, 3 * IMAGE])
    for _ in range(2):  # the state that was set once can be used again
        np.testing.assert_array_equal(logits_fn(x), x @ PARAMS["out"].T * 2.0)


def test_without_equinox(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ImportError, match="pip install equinox"):
        from_equinox(None)


def test_a_2d_network_explains_a_volume_slice_by_slice():
    """Two lesions' voxels in two slices: each row lies in its own slice."""
    net = Linen([3, 2])
    variables = linen_variables(net, 2)
    lesion = Instance(1, np.array([[1, 1, 2], [1, 2, 2], [4, 3, 5]], np.int32))
    (found,), (info,) = explain_slices(IMAGE, [lesion], net, variables, (5, 4, 1))
    assert (info.windows, info.rows, found.start) == (2, 3, (0, 0, 2))
    expected = np.zeros((5, 4, 4, 2), np.float32)
    for z in (2, 5):
        in_slice = Instance(1, lesion.voxels[lesion.voxels[:, 2] == z])
        own = brute_force(lambda x: net.apply(variables, x[None], train=False)[0], IMAGE[:, :, z], in_slice)
        expected[:, :, z - 2] = own
    assert_same(found.values, expected)


@pytest.fixture(scope="module")
def blended_in_2d():
    """A 2-D network over four windows, by MONAI's rules written out in two dimensions; its logits, and three rows."""
    net, image, voxels = Linen([3, 2]), normal(7, 5, 2), np.array([[0, 0], [3, 4], [6, 2]], np.int32)
    variables = linen_variables(net, 2)
    window, starts = (
        (5, 4),
        list(itertools.product((0, 2), (0, 1))),
    )  # steps of int(0.75 · 5) and int(0.75 · 4), clamped
    weight = np.outer(*(np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (n / 8) ** 2)) for n in window))
    weight = np.maximum(weight, max(weight.min(), 1e-3)).astype(np.float32)

    def blended(x):
        total, norm = jnp.zeros((7, 5, 2)), np.zeros((7, 5, 1), np.float32)
        for a, b in starts:
            at = (slice(a, a + 5), slice(b, b + 4))
            total = total.at[at].add(net.apply(variables, x[at][None], train=False)[0] * weight[..., None])
            norm[at] += weight[..., None]
        return total / norm

    rows = jax.jit(jax.jacrev(lambda x: blended(x)[(*voxels.T, 1)]))(image)
    return from_linen(net, variables, train=False), image, voxels, jax.jit(blended)(image), np.asarray(rows)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_2d_network_on_an_image_larger_than_its_window(axis, blended_in_2d):
    logits_fn, image, voxels, logits, rows = blended_in_2d
    volume = jnp.expand_dims(image, axis)
    predictor = xaiseg.StitchedPredictor(slicewise(logits_fn, axis), tuple(np.insert((5, 4), axis, 1).tolist()))
    assert_same(predictor(volume).squeeze(axis), logits)
    lesion = Instance(1, np.insert(voxels, axis, 0, axis=1))
    for aggregator, reduced in ((xaiseg.signed_max(), strongest(rows)), (xaiseg.mean(), rows.mean(0))):
        (found,), _ = xaiseg.jacobian_rows(aggregator)(KEY, predictor, volume, [lesion])
        assert (found.start, found.values.shape) == ((0, 0, 0), volume.shape)
        assert_same(found.values.squeeze(axis), reduced)


def test_windows_of_one_slice_cover_each_slice_once():
    plan = xaiseg.StitchedPredictor(lambda x: x, (5, 4, 1), overlap=0.5).plan((5, 4, 6))
    np.testing.assert_array_equal(plan.starts, [[0, 0, z] for z in range(6)])
    np.testing.assert_array_equal(plan.weight[..., 0] > 0, True)
    np.testing.assert_allclose(plan.weight.max(axis=(0, 1)), np.exp(-(0.5**2) / (2 * 0.5**2)), rtol=1e-6)


def test_slicewise_refuses_a_thicker_window():
    predictor = xaiseg.StitchedPredictor(slicewise(lambda x: x), (5, 4, 2))
    with pytest.raises(ValueError, match=r"windows \(1, 5, 4, 2, 2\); expected .* with side 1 along axis 2"):
        predictor(IMAGE)


def test_channels_first():
    def first(params, x):
        assert x.shape == (1, 2, *SHAPE)
        return {"logits": jnp.moveaxis(network(params, jnp.moveaxis(x, 1, -1)), -1, 1), "other": x}

    class First(nn.Module):
        @nn.compact
        def __call__(self, x):
            return (nn.Dense(3)(x.swapaxes(1, -1)).swapaxes(1, -1),)

    class FirstNNX(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dense(x.swapaxes(1, -1)).swapaxes(1, -1)

    x = IMAGE[None]
    found = from_function(first, PARAMS, output="logits", channels_first=True)(x)
    np.testing.assert_array_equal(found, network(PARAMS, x))
    variables = First().init(KEY, jnp.moveaxis(x, -1, 1))
    found = from_linen(First(), variables, output=0, channels_first=True)(x)
    np.testing.assert_allclose(found, x @ variables["params"]["Dense_0"]["kernel"], rtol=1e-6, atol=1e-6)
    net = FirstNNX()
    found = from_nnx(net, output=lambda y: 2 * y, channels_first=True)(x)
    np.testing.assert_allclose(found, 2 * (x @ net.dense.kernel[...]), rtol=1e-6, atol=1e-6)


def test_logits_in_half_precision_are_explained_in_single():
    logits_fn = from_function(lambda x: x.astype(jnp.bfloat16))
    assert logits_fn(IMAGE[None]).dtype == jnp.float32
    predictor = xaiseg.StitchedPredictor(logits_fn, SHAPE)
    (found,), _ = xaiseg.jacobian_rows(xaiseg.signed_max())(KEY, predictor, IMAGE, LESIONS)
    expected = np.zeros((*SHAPE, 2))
    expected[(*LESIONS[0].voxels.T, 1)] = 1
    np.testing.assert_array_equal(found.values, expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: x[:, ::2],
            r"returns \(1, 3, 4, 6, 2\) for windows \(1, 5, 4, 6, 2\); expected .*here \(1, 5, 4, 6, classes\)",
        ),
        (lambda x: x[..., 1], r"returns \(1, 5, 4, 6\) .*expected logits \(N, \*window, classes\)"),
        (lambda x: x[0], r"returns \(5, 4, 6, 2\)"),
        (lambda x: jnp.moveaxis(x, -1, 1), r"returns \(1, 2, 5, 4, 6\)"),
        (lambda x: x.sum(), r"returns \(\) for windows"),
        (lambda x: (x, x), r"returns a tuple; expected an array of logits: choose them, as in output=0"),
        (lambda x: x > 0, "returns bool; expected logits"),
    ],
)
def test_output_that_is_no_logits(function, message):
    predictor = xaiseg.StitchedPredictor(from_function(function), SHAPE)
    with pytest.raises(ValueError, match=message) as caught:
        predictor(IMAGE)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        check_logits_fn(function, SHAPE, 2)


def test_output_of_a_channels_first_network_is_named_as_it_returns_it():
    with pytest.raises(
        ValueError, match=r"\(1, 5, 4, 6, 2\) for windows \(1, 2, 5, 4, 6\); .*here \(1, classes, 5, 4, 6\)"
    ):
        from_function(lambda x: jnp.moveaxis(x, 1, -1), channels_first=True)(IMAGE[None])


def test_check_counts_classes():
    assert check_logits_fn(from_function(network, PARAMS), SHAPE, 2) == 2
    assert check_logits_fn(lambda x: x[..., :1], SHAPE, 2) == 1


def traces_of(make):
    """How often a network is traced for the rows of a first and of a second set of parameters, and the two maps."""
    counts, maps = [], []
    for seed in (0, 1):
        predictor = xaiseg.StitchedPredictor(make(seed), SHAPE)
        (found,), _ = xaiseg.jacobian_rows(xaiseg.signed_max(), chunk=4)(KEY, predictor, IMAGE, LESIONS)
        counts.append(len(TRACED))
        maps.append(found.values)
    assert np.abs(maps[0] - maps[1]).max() > 0
    first, both = counts
    return first, both - first


TRACED: list[int] = []


class CountedLinen(nn.Module):
    features: list[int]

    @nn.compact
    def __call__(self, x):
        TRACED.append(1)
        return jnp.tanh(nn.Dense(self.features[0])(x))


class CountedNNX(NNX):
    def __call__(self, x):
        TRACED.append(1)
        return super().__call__(x)


def counted(params, x):
    TRACED.append(1)
    return network(params, x)


def make_linen(seed):
    net = CountedLinen([2])
    return from_linen(net, net.init(jax.random.key(seed), IMAGE[None]))


def make_nnx(seed):
    return from_nnx(CountedNNX(nnx.Rngs(seed)))


def make_function(seed):
    return from_function(counted, {"in": PARAMS["in"] * (1.0 + seed), "out": PARAMS["out"]})


def make_partial(seed):
    return from_function(Partial(counted, {"in": PARAMS["in"] * (1.0 + seed), "out": PARAMS["out"]}))


@pytest.mark.parametrize("make", [make_linen, make_nnx, make_function, make_partial])
def test_two_parameter_sets_share_one_program(make):
    TRACED.clear()
    first, second = traces_of(make)
    assert first > 0
    # Linen's own init is the only trace that a second set may take
    assert second == (1 if make is make_linen else 0)


def test_two_equinox_models_share_one_program():
    net_type = equinox_net(state=False)
    eqx = sys.modules["equinox"]

    class Counted(net_type):
        def __call__(self, x, state=None):
            TRACED.append(1)
            return super().__call__(x, state)

    TRACED.clear()
    first, second = traces_of(lambda seed: from_equinox(Counted(jax.random.key(seed))))
    assert (first > 0, second) == (True, 0)
    assert issubclass(Counted, eqx.Module)


def test_other_arguments_of_the_call_are_another_program():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, scale):
            return x * jnp.float32(scale)

    apply = jax.jit(lambda f, x: f(x))
    for scale in (1.0, 2.0):
        np.testing.assert_array_equal(apply(from_linen(Scaled(), {}, scale=scale), IMAGE[None]), IMAGE[None] * scale)


def halved(x):
    """Every other voxel of `(N, *grid, K)`."""
    return x[(slice(None), *(slice(None, None, 2),) * (x.ndim - 2))]


class Tapped(nn.Module):
    """Two levels of taps: the second on half the grid, as in an encoder."""

    @nn.compact
    def __call__(self, x, offsets=None):
        tap, n = Taps(offsets), x.ndim - 2
        x = tap("body", nn.Conv(3, (3,) * n, name="body")(x))
        half = tap("half", halved(jnp.tanh(x)))
        up = jax.image.resize(half, (*x.shape[:-1], 3), "nearest")
        return nn.Conv(2, (1,) * n, name="head")(jnp.tanh(x + up)), tap.values


class Plain(nn.Module):
    """`Tapped` by somebody who knows nothing of taps."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3,) * (x.ndim - 2), name="body")(x)
        half = halved(jnp.tanh(x))
        up = jax.image.resize(half, (*x.shape[:-1], 3), "nearest")
        return nn.Conv(2, (1,) * (x.ndim - 2), name="head")(jnp.tanh(x + up))


EVEN = normal(6, 4, 8, 2)


def explain_grad_cam(image, lesions, net, variables):
    """A network that returns `(logits, taps)`."""
    logits_fn = from_linen(net, variables, output=0)
    tapped_fn = jax.tree_util.Partial(net.apply, variables)
    predictor = xaiseg.StitchedPredictor(logits_fn, window=image.shape[:3], tapped_fn=tapped_fn)
    explain = xaiseg.gradcam_pp(layer="body")
    return explain(jax.random.key(0), predictor, image, lesions)


def cam_by_hand(variables, image, voxels):
    """Eqs. 8 to 10 at `body`, from the two halves of the network written out."""
    params = variables["params"]
    n = image.ndim - 1
    activations = nn.Conv(3, (3,) * n).apply({"params": params["body"]}, image[None])

    def target(a):
        half = halved(jnp.tanh(a))
        up = jax.image.resize(half, a.shape, "nearest")
        logits = nn.Conv(2, (1,) * n).apply({"params": params["head"]}, jnp.tanh(a + up))
        return logits[0][(*voxels.T, 1)].sum()

    g, a = np.asarray(jax.jit(jax.grad(target))(activations)[0], np.float64), np.asarray(activations[0], np.float64)
    alpha = 1 / (2 + g * a.sum(tuple(range(n)), keepdims=True))
    return np.maximum((np.where(g > 0, alpha * g, 0) * a).sum(-1, keepdims=True), 0)


def test_grad_cam_of_a_linen_network_with_and_without_taps_of_its_own():
    variables = randomised(jax.eval_shape(Tapped().init, KEY, EVEN[None]))
    (own,), _ = explain_grad_cam(EVEN, LESIONS, Tapped(), variables)
    # α = 1 / (2 + g·ΣA) loses a digit where the denominator is small
    assert_same(own.values, cam_by_hand(variables, EVEN, LESIONS[0].voxels), 1e-4)

    def direct(x, offsets):
        return Tapped().apply(variables, x, offsets)

    plain = xaiseg.StitchedPredictor(lambda x: direct(x, {})[0], EVEN.shape[:3], tapped_fn=direct)
    intercepted = xaiseg.StitchedPredictor(
        from_linen(Plain(), variables),
        EVEN.shape[:3],
        tapped_fn=tapped_from_linen(Plain(), variables, ["head", "body"]),
    )
    for predictor in (plain, intercepted):
        (found,), _ = xaiseg.gradcam_pp(layer="body")(KEY, predictor, EVEN, LESIONS)
        assert_same(found.values, own.values)


def test_layers_of_a_channels_first_linen_network():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="dense")(x.swapaxes(1, -1)).swapaxes(1, -1)

    class First(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sin(Block(name="block")(x))

    variables = randomised(jax.eval_shape(First().init, KEY, jnp.moveaxis(IMAGE, -1, 0)[None]))
    tapped_fn = tapped_from_linen(First(), variables, ["block"], channels_first=True)
    offset = normal(1, *SHAPE, 3)
    logits, taps = tapped_fn(IMAGE[None], {"block": offset})
    dense = variables["params"]["block"]["dense"]
    expected = IMAGE[None] @ dense["kernel"] + dense["bias"].reshape(1, 1, 1, 1, 3) + offset
    np.testing.assert_allclose(taps["block"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, jnp.sin(expected), rtol=1e-5, atol=1e-6)
    inner = tapped_from_linen(First(), variables, ["block.dense"], channels_first=True)
    assert list(inner(IMAGE[None], {})[1]) == ["block.dense"]


def test_layers_that_cannot_be_tapped():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(2, name="shared")
            return shared(shared(x))

    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x, x

    class WithPair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Pair(name="pair")(x)[0]

    x = IMAGE[None]
    variables = Twice().init(KEY, x)
    with pytest.raises(ValueError, match=r"layer 'decoder' is called 0 times; expected once. Called are shared$"):
        tapped_from_linen(Twice(), variables, ["decoder"])(x, {})
    with pytest.raises(ValueError, match="layer 'shared' is called 2 times"):
        tapped_from_linen(Twice(), variables, ["shared"])(x, {})
    with pytest.raises(ValueError, match="layer 'pair' returns a tuple"):
        tapped_from_linen(WithPair(), {}, ["pair"])(x, {})


@pytest.fixture(scope="module")
def cam_in_2d():
    """Parameters, an image, two of its pixels, and the map at `body` by hand."""
    image, voxels = normal(6, 8, 2), np.array([[1, 1], [2, 5]], np.int32)
    variables = randomised(jax.eval_shape(Tapped().init, KEY, image[None]))
    return variables, image, voxels, cam_by_hand(variables, image, voxels)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_grad_cam_slice_by_slice(axis, cam_in_2d):
    """One slice of a volume is explained as the 2-D network explains that slice; there is no tap without a grid."""
    variables, image, voxels, expected = cam_in_2d

    def tapped_2d(x, offsets):
        logits, taps = Tapped().apply(variables, x, offsets)
        return logits, taps | {"pooled": x.mean((1, 2))}

    volume = jnp.stack([-image, image, 2 * image], axis)
    window = tuple(np.insert((6, 8), axis, 1).tolist())
    tapped_fn = slicewise_tapped(tapped_2d, axis)
    predictor = xaiseg.StitchedPredictor(lambda x: tapped_fn(x, {})[0], window, tapped_fn=tapped_fn)
    lesion = Instance(1, np.insert(voxels, axis, 1, axis=1))
    (found,), _ = xaiseg.gradcam_pp(layer="body")(KEY, predictor, volume, [lesion])
    assert found.start == tuple(int(i == axis) for i in range(3))
    assert found.values.shape == (*window, 1)
    assert_same(found.values.squeeze(axis), expected, 1e-4)
    # a tap of half the grid is brought to the window, and its side of 1 stays
    (found,), _ = xaiseg.gradcam_pp(layer="half")(KEY, predictor, volume, [lesion])
    assert found.values.shape == (*window, 1)
    assert found.values.max() > 0
    with pytest.raises(ValueError, match=r"no tap 'pooled' in this network; it has body, half$"):
        xaiseg.gradcam_pp(layer="pooled")(KEY, predictor, volume, [lesion])
