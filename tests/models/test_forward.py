"""Ensembles, mirrored passes and 2-D networks: against loops over passes written with NumPy."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Instance
from xaiseg.inference import StitchedPredictor
from xaiseg.models import Model, ModelSpec, build_network, expected_variables
from xaiseg.models.forward import LogitsOf, TappedOf
from xaiseg.saliency import gradcam_pp, jacobian_rows, signed_max

WINDOW = (8, 8, 8)
UNET = {"channels": [3, 4], "strides": [2], "out_channels": 2, "norm": "instance"}
# float32 sums of a few terms in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def variables(spec, seed):
    leaves, tree = jax.tree.flatten(expected_variables(spec))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32) for a in leaves])


def ensemble(members=(), mirror_axes=(), window=WINDOW, **options):
    spec = ModelSpec("unet", {**UNET, **options}, ("FLAIR", "T1w"), window)
    own = {name: variables(spec, i) for i, name in enumerate(members)} if members else variables(spec, 0)
    return Model(spec, own).with_spec(members=tuple(members), mirror_axes=tuple(mirror_axes))


def by_hand(model, x):
    """Each member on each mirrored copy, one after the other."""
    network = build_network(model.spec)
    sets = [model.variables[m] for m in model.spec.members] or [model.variables]
    outputs = []
    for own in sets:
        for on in itertools.product([False, True], repeat=len(model.spec.mirror_axes)):
            axes = tuple(1 + a for a, flip in zip(model.spec.mirror_axes, on, strict=True) if flip)
            mirrored = jnp.asarray(np.flip(np.asarray(x), axes)) if axes else x
            y = np.asarray(network.apply(own, mirrored)[0])
            outputs.append(np.flip(y, axes) if axes else y)
    return np.mean(np.array(outputs, np.float64), axis=0)


def image(shape=(1, *WINDOW, 2), seed=5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("members", "mirror_axes"),
    [
        ((), (0, 2)),
        (("fold_0", "fold_3"), ()),
        pytest.param(("fold_0", "fold_1", "fold_2"), (0, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_logits_are_the_mean_of_all_passes(members, mirror_axes):
    model, x = ensemble(members, mirror_axes), image()
    assert model._forward.passes == max(len(members), 1) * 2 ** len(mirror_axes)
    expected = by_hand(model, x)
    assert expected.std() > 0.01
    np.testing.assert_allclose(jax.jit(lambda f, x: f(x))(model.logits_fn, x), expected, **CLOSE)
    np.testing.assert_allclose(model.tapped_fn(x, {})[0], expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("members", "mirror_axes"), [((), (1,)), (("a", "b"), (0, 2))])
def test_a_loop_over_the_passes_gives_the_same(members, mirror_axes):
    """As accelerators run them; logits, taps, and the gradient with respect to offsets and image."""
    model, x = ensemble(members, mirror_axes), image()
    unrolled, looped = (replace(model._forward, loop=loop) for loop in (False, True))
    offset = image((1, 4, 4, 4, 3 * unrolled.passes), 4)

    weight = image((1, 4, 4, 4, 4 * unrolled.passes), 6)

    def score(forward, x, offset):
        logits, taps = TappedOf(forward)(model.variables, x, {"encoder0": offset})
        return (logits**2).sum() + (taps["bottleneck"] * weight).sum()

    for forward in (unrolled, looped):
        np.testing.assert_allclose(LogitsOf(forward)(model.variables, x), by_hand(model, x), **CLOSE)
    found, expected = (
        jax.jit(jax.value_and_grad(score, (1, 2)), static_argnums=0)(f, x, offset) for f in (looped, unrolled)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
def test_gradients_flow_through_members_and_mirrors():
    """Against central differences of the mean written by hand, along a random direction, in float32: 1e-2 of the slope."""
    model, x = ensemble(("a", "b"), (1,)), image()
    weight = image((1, *WINDOW, 2), 8)
    direction = image(seed=9)
    gradient = jax.grad(lambda x: (model.logits_fn(x) * weight).sum())(x)
    h = 1e-2
    ahead, behind = (float((by_hand(model, x + s * h * direction) * np.asarray(weight)).sum()) for s in (1, -1))
    slope = (ahead - behind) / (2 * h)
    assert abs(slope) > 1
    assert abs(float((gradient * direction).sum()) - slope) < 1e-2 * abs(slope)


@pytest.mark.slow
def test_rows_of_an_ensemble_are_those_of_its_mean_logits():
    model = ensemble(("a", "b"), (0, 2))
    predictor = StitchedPredictor.of(model)
    volume = image((10, 8, 9, 2))
    voxels = np.array([[1, 3, 3], [4, 3, 3], [4, 4, 4]], np.int32)
    (found,), _ = jacobian_rows(signed_max())(jax.random.key(0), predictor, volume, [Instance(1, voxels)])
    rows = np.asarray(jax.jacrev(lambda x: predictor(x)[tuple(voxels.T)][:, 1])(volume))
    expected = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
    whole = np.zeros_like(expected)
    whole[tuple(slice(s, s + n) for s, n in zip(found.start, found.values.shape[:3], strict=True))] = found.values
    np.testing.assert_allclose(whole, expected, atol=1e-5 * np.abs(expected).max())


def test_a_tap_holds_the_features_of_all_passes_mirrored_back():
    model, x = ensemble(("a", "b"), (0,)), image()
    logits, taps = model.tapped_fn(x, {})
    single = [Model(model.spec, model.variables[m]).with_spec(members=(), mirror_axes=()) for m in ("a", "b")]
    flipped = jnp.flip(x, 1)
    expected = [
        jnp.flip(m.tapped_fn(jnp.flip(flipped if f else x, ()), {})[1]["encoder0"], 1 if f else ())
        for m in single
        for f in (False, True)
    ]
    np.testing.assert_allclose(taps["encoder0"], jnp.concatenate(expected, -1), **CLOSE)
    assert model.taps()["encoder0"] == (4, 4, 4, 3 * 4)
    assert list(model.taps())[:2] == ["encoder0.conv", "encoder0"]
    # an offset moves the features of its own pass only: twice the offset is the same as doing it to each pass by hand
    offset = image(taps["encoder0"].shape, 11)
    moved, _ = model.tapped_fn(x, {"encoder0": offset})
    parts = jnp.split(offset, 4, axis=-1)
    by_pass = []
    for number, (m, f) in enumerate((m, f) for m in single for f in (False, True)):
        axes = 1 if f else ()
        y, _ = m.tapped_fn(jnp.flip(x, axes), {"encoder0": jnp.flip(parts[number], axes)})
        by_pass.append(jnp.flip(y, axes))
    np.testing.assert_allclose(moved, sum(by_pass) / 4, **CLOSE)
    assert np.abs(np.asarray(moved - logits)).max() > 1e-2


@pytest.mark.slow
def test_class_activation_maps_of_an_ensemble_use_all_features():
    model = ensemble(("a", "b"), (1,))
    predictor = StitchedPredictor.of(model)
    voxels = np.array([[3, 3, 3], [3, 4, 3]], np.int32)
    volume = image((*WINDOW, 2))
    (found,), _ = gradcam_pp(layer="encoder0")(jax.random.key(0), predictor, volume, [Instance(1, voxels)])
    zero = jnp.zeros((1, 4, 4, 4, 12))
    target = lambda o: model.tapped_fn(volume[None], {"encoder0": o})[0][0][tuple(voxels.T)][:, 1].sum()  # noqa: E731
    g = np.asarray(jax.grad(target)(zero))[0]
    a = np.asarray(model.tapped_fn(volume[None], {})[1]["encoder0"])[0]
    cam = np.maximum((np.where(g > 0, g / (2 + g * a.sum((0, 1, 2))), 0) * a).sum(-1), 0)
    expected = jax.image.resize(jnp.asarray(cam), WINDOW, "linear")
    np.testing.assert_allclose(found.values[..., 0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_two_dimensional_network_takes_a_volume_slice_by_slice():
    model = ensemble((), (2,), window=(8, 1, 8), ndim=2)
    volume = image((8, 3, 8, 2))
    found = StitchedPredictor.of(model)(volume)
    network = build_network(model.spec)
    for k in range(3):
        x = volume[None, :, k]
        y = (network.apply(model.variables, x)[0] + network.apply(model.variables, x[:, :, ::-1])[0][:, :, ::-1]) / 2
        np.testing.assert_allclose(found[:, k], y[0], **CLOSE)
    assert model.taps()["encoder0"] == (4, 1, 4, 6)


def test_a_two_dimensional_network_needs_a_flat_window():
    with pytest.raises(ValueError, match="needs a window with one side of 1"):
        ensemble(ndim=2)


def test_the_passes_of_models_of_one_architecture_share_a_program():
    traced = []

    @jax.jit
    def apply(f, x):
        traced.append(1)
        return f(x)

    first, second = ensemble(("a", "b"), (0,)), ensemble(("a", "b"), (0,))
    for model in (first, second):
        apply(model.logits_fn, image())
    assert len(traced) == 1
