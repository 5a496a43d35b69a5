"""The cascade against fresh networks drawn by hand, its measures against scipy and loops, and explainers that must pass or fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy import ndimage, stats
from tiny import BLOBS, blob, tiny_model, volumes

from xaiseg import Instance, SaliencyMap, StitchedPredictor, input_gradient, noisy
from xaiseg._types import Info
from xaiseg.metrics.instance_score import in_volume
from xaiseg.metrics.randomisation import (
    cascade,
    complexity_rise,
    network_layers,
    parameter_randomisation,
    smooth_parameter_randomisation,
)
from xaiseg.metrics.similarity import ssim
from xaiseg.models import Model, ModelSpec, build_network, expected_variables

KEY = jax.random.key(0)
BATCH = ModelSpec(
    "unet", {"channels": [4, 6, 8], "strides": [2, 2], "norm": "batch"}, ("FLAIR", "T1w"), (8, 8, 8), members=("a", "b")
)
SPECS = {
    "unet": ModelSpec(
        "unet", {"channels": [4, 8], "strides": [2], "norm": "batch", "residual_units": 2}, ("a",), (8, 8, 8)
    ),
    "dynunet": ModelSpec("dynunet", {"filters": [4, 8, 8]}, ("a",), (8, 8, 8)),
    "swin": ModelSpec(
        "swin_unetr", {"patch_merging": "merging", "feature_size": 12, "remat": True}, ("a",), (32, 32, 32)
    ),
    "flat": ModelSpec("unet", {"channels": [4, 8], "strides": [2], "ndim": 2}, ("a",), (8, 8, 1)),
}
ENDS = {
    "unet": ("encoder0/unit0_conv", "decoder0/unit0_conv"),
    "dynunet": ("encoder0/conv1", "output"),
    "swin": ("patch_embed", "out"),
    "flat": ("encoder0_conv", "decoder0_conv"),
}


def standardised():
    found = [volumes()[name] for name in ("FLAIR", "T1w")]
    return jnp.stack([jnp.asarray(np.where(v != 0, (v - v[v != 0].mean()) / v[v != 0].std(), 0)) for v in found], -1)


IMAGE = standardised()
LESIONS = [Instance(i + 1, np.argwhere(blob(c, r - 1)).astype(np.int32)) for i, (c, r) in enumerate(BLOBS)]


def edges(key, predictor, image, instances, *, progress=None):
    """What no network is asked for: the gradient of the image itself."""
    found = sum(jnp.abs(jnp.roll(image, 1, axis) - image) for axis in range(3))
    return [SaliencyMap(found, (0, 0, 0)) for _ in instances], [Info(1, 1) for _ in instances]


@pytest.mark.parametrize("name", ["unet", "dynunet", "flat", pytest.param("swin", marks=pytest.mark.slow)])
def test_every_variable_belongs_to_one_layer(name):
    spec = SPECS[name]
    layers = network_layers(spec)
    paths = [path for layer in layers for path in layer.paths]
    assert len(paths) == len(set(paths))
    assert set(paths) == set(flatten_dict(expected_variables(spec)))
    assert (layers[0].name, layers[-1].name) == ENDS[name]
    kernels = [[p for p in layer.paths if p[-1] == "kernel"] for layer in layers]
    assert all(len(k) == 1 for k in kernels)


def test_layers_are_in_the_order_of_computation_with_their_norms():
    layers = {layer.name: layer.paths for layer in network_layers(BATCH)}
    assert list(layers) == ["encoder0_conv", "encoder1_conv", "bottleneck_conv", "decoder1_conv", "decoder0_conv"]
    assert {(p[0], *p[1:]) for p in layers["encoder1_conv"]} == {
        ("params", "encoder1_conv", "kernel"),
        ("params", "encoder1_conv", "bias"),
        ("params", "encoder1_norm", "scale"),
        ("params", "encoder1_norm", "bias"),
        ("batch_stats", "encoder1_norm", "mean"),
        ("batch_stats", "encoder1_norm", "var"),
        ("params", "encoder1_act", "slope"),
    }


@pytest.fixture(scope="module")
def ensemble():
    """Trained networks are made of ninety-nines, which no initialiser draws."""
    trained = jax.tree.map(lambda a: np.full(a.shape, 99, np.float32), expected_variables(BATCH))
    return Model(BATCH, trained)


def test_the_cascade_draws_layer_after_layer_from_fresh_networks(ensemble):
    """By hand: the network's own `init` with the key of the layer and member, of which one layer is taken."""
    layers, network = network_layers(BATCH), build_network(BATCH)
    init = jax.jit(lambda key: network.init(key, jnp.zeros((1, 8, 8, 8, 2))))
    steps = list(cascade(KEY, ensemble))
    assert [name for name, _ in steps] == [layer.name for layer in layers][::-1]
    for step, (_, model) in enumerate(steps):
        for number, member in enumerate(BATCH.members):
            found = flatten_dict(model.variables[member])
            for place, layer in enumerate(layers):
                fresh = flatten_dict(init(jax.random.fold_in(jax.random.fold_in(KEY, place), number)))
                for path in layer.paths:
                    expected = fresh[path] if place >= len(layers) - 1 - step else np.full(found[path].shape, 99)
                    np.testing.assert_allclose(found[path], expected, rtol=1e-6)
    assert all((leaf == 99).all() for leaf in jax.tree.leaves(ensemble.variables))
    last = {m: flatten_dict(steps[-1][1].variables[m]) for m in BATCH.members}
    for path, leaf in last["a"].items():
        if path[-1] == "kernel":
            assert not np.isclose(leaf, last["b"][path]).any()
        if path[0] == "batch_stats":
            assert (leaf == (path[-1] == "var")).all()


def test_layers_of_one_shape_are_not_alike():
    spec = ModelSpec("unet", {"channels": [4] * 4, "strides": [1, 1, 1], "out_channels": 4}, ("a",) * 4, (8, 8, 8))
    model = Model(spec, jax.tree.map(lambda a: np.zeros(a.shape, np.float32), expected_variables(spec)))
    *_, (_, random) = cascade(KEY, model)
    kernels = [p["kernel"].ravel() for name, p in random.variables["params"].items() if name in
               ("encoder0_conv", "encoder1_conv", "encoder2_conv")]  # fmt: skip
    correlation = np.corrcoef(kernels)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < 5 / np.sqrt(27 * 16)
    # He's: variance 2 / (27 · 4)
    assert np.var(kernels) == pytest.approx(2 / 108, rel=0.2)


def test_steps_join_layers_and_end_with_all_of_them(ensemble):
    every = list(cascade(KEY, ensemble))
    two = list(cascade(KEY, ensemble, steps=2))
    assert [name for name, _ in two] == ["bottleneck_conv", "encoder0_conv"]
    for (_, a), (_, b) in ((two[0], every[2]), (two[1], every[-1])):
        jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    assert [name for name, _ in cascade(KEY, ensemble, steps=99)] == [name for name, _ in every]
    with pytest.raises(ValueError, match="steps must be at least 1"):
        next(cascade(KEY, ensemble, steps=0))


def window(lesion, margin):
    """The bounding box of a lesion and so many voxels around it, within the volume."""
    box = ndimage.binary_dilation(blob_of(lesion), np.ones((3, 3, 3)), iterations=margin) if margin else blob_of(lesion)
    return tuple(slice(v.min(), v.max() + 1) for v in np.nonzero(box))


def blob_of(lesion):
    mask = np.zeros(IMAGE.shape[:3], bool)
    mask[tuple(lesion.voxels.T)] = True
    return mask


def by_hand(a, b):
    """Of two maps of one place: pairs that are not both zero, one by one; scipy's ρ, and its entropy of a histogram."""
    pairs = np.array([(p, q) for p, q in zip(a.ravel(), b.ravel(), strict=True) if p or q])
    sizes = np.abs(pairs)
    structure = []
    for c in range(2):
        x, y = np.abs(a[..., c]) / np.abs(a).max(), np.abs(b[..., c]) / np.abs(b).max()
        structure.append(ssim(x, y, data_range=1, mask=(x > 0) | (y > 0)))
    before, after = (stats.entropy(np.histogram(v, 100)[0]) for v in sizes.T)
    return (
        stats.spearmanr(*sizes.T).statistic,
        stats.spearmanr(*pairs.T).statistic,
        np.mean(structure),
        after / before - 1,
    )


@pytest.mark.parametrize("margin", [None, 3])
def test_what_is_left_is_a_loop_over_models(margin):
    model, explain = tiny_model(), input_gradient()
    found = parameter_randomisation(KEY, explain, model, IMAGE, LESIONS, margin=margin)
    assert found.layers == ("decoder0_conv", "bottleneck_conv", "encoder0_conv")
    weights_key, key = jax.random.split(KEY)

    def explained(model):
        maps, _ = explain(key, StitchedPredictor.of(model), IMAGE, LESIONS)
        whole = [in_volume(m, IMAGE.shape) for m in maps]
        # beyond its crop a map is zero, so the whole volume compares as the crop does, but for SSIM's border
        crops = [tuple(slice(s, s + n) for s, n in zip(m.start, m.values.shape, strict=False)) for m in maps]
        where = crops if margin is None else [window(lesion, margin) for lesion in LESIONS]
        return [volume[place].astype(np.float64) for volume, place in zip(whole, where, strict=True)]

    clean = explained(model)
    for step, (_, changed) in enumerate(cascade(weights_key, model)):
        for i, (a, b) in enumerate(zip(clean, explained(changed), strict=True)):
            expected = by_hand(a, b)
            np.testing.assert_allclose([part[step, i] for part in found[1:4]], expected[:3], atol=1e-6)
            if step == 2:
                # a value at the edge of a bin may fall on either side
                assert found.complexity[i] == pytest.approx(expected[3], abs=1e-3)


def test_an_edge_detector_fails_and_a_gradient_passes():
    """Fully random networks: signs of a gradient are new, ρ within five standard errors of 0 for the 500 or more voxels that count,
    neighbours being alike; its sizes keep what the distance from the lesion makes of them."""
    bad = parameter_randomisation(KEY, edges, tiny_model(), IMAGE, LESIONS, margin=4)
    for part in (bad.spearman, bad.signed, bad.ssim):
        np.testing.assert_allclose(part, 1)
    np.testing.assert_array_equal(bad.complexity, 0)
    good = parameter_randomisation(KEY, input_gradient(), tiny_model(), IMAGE, LESIONS, margin=4)
    assert np.abs(good.signed[-1]).max() < 0.2
    assert good.spearman[-1].max() < 0.7
    assert good.ssim[-1].max() < 0.6
    assert (np.abs(good.complexity) > 0.01).all()


def test_the_noise_averaged_test_is_the_test_of_noise_averages():
    options = {"steps": 1, "margin": 4}
    found = smooth_parameter_randomisation(
        KEY, input_gradient(), tiny_model(), IMAGE, LESIONS, samples=3, noise=0.1, **options
    )
    averaged = noisy(input_gradient(), samples=3, noise=0.1)
    expected = parameter_randomisation(KEY, averaged, tiny_model(), IMAGE, LESIONS, **options)
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    plain = parameter_randomisation(KEY, input_gradient(), tiny_model(), IMAGE, LESIONS, **options)
    assert not np.allclose(found.spearman, plain.spearman)


def test_maps_without_anything_have_no_similarity():
    def nothing(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(image * 0, (0, 0, 0)) for _ in instances], [Info(1, 1) for _ in instances]

    found = parameter_randomisation(KEY, nothing, tiny_model(), IMAGE, LESIONS, steps=1)
    assert all(np.isnan(part).all() for part in found[1:])


def test_the_rise_of_entropy():
    """From two equal halves to four equal quarters: log 2 to log 4."""
    assert complexity_rise(np.repeat([0.0, 1], 8), np.repeat([0.0, 1, 2, 3], 4)) == pytest.approx(1)
