"""Swin UNETR against MONAI's logits and input gradients, with recomputed blocks against itself, its options and taps."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeded_weights import seeded_input, seeded_state

from xaiseg.checkpoints import monai_swin_unetr, read_state_dict
from xaiseg.checkpoints.mapping import Given
from xaiseg.models import swin
from xaiseg.models.swin import MERGINGS, PatchMerging, relative_position_index
from xaiseg.models.swin_unetr import SwinUNETR

FIXTURES = Path(__file__).parent.parent / "fixtures"
# each program runs once: without optimisation it is there in a third of the time
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# fixture: patch merging, what its keys do not tell
SOLID = {
    "swin_merging": ("merging", {}),
    "swin_mergingv2": ("mergingv2", {"normalize": False}),
    "swin_legacy": ("legacy", {}),
}


def hashable(options):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def solid(name):
    merging, unknown = SOLID[name]
    stored = np.load(FIXTURES / f"{name}.npz")
    about = json.loads(str(stored["about"]))
    # keys of a window that is no cube are told apart by MONAI's index only, which a seed does not give
    state = seeded_state(about["shapes"], about["seed"])
    if name == "swin_mergingv2":
        index = relative_position_index((2, 3, 4))
        state |= {k.replace("bias_table", "index"): index for k in state if k.endswith("bias_table")}
    reading = monai_swin_unetr.read(state, name, Given(patch_merging=merging))
    x = seeded_input((*about["grid"], about["channels"]), about["seed"] + 100)
    cotangent = seeded_input((*about["grid"], about["classes"]), about["seed"] + 200)
    return SwinUNETR(**hashable(reading.options) | unknown), reading.variables, x, cotangent, stored


def logits_and_gradient(network, variables, x, cotangent, dtype):
    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(variables, x, cotangent):
        y, pull = jax.vjp(lambda x: network.apply(variables, x)[0], x)
        return y, pull(cotangent)[0]

    variables, x, cotangent = jax.tree.map(lambda a: jnp.asarray(a, dtype), (variables, x[None], cotangent[None]))
    return [np.asarray(a[0]) for a in both(variables, x, cotangent)]


@pytest.mark.parametrize(
    "name", ["swin_merging", *(pytest.param(f"swin_{m}", marks=pytest.mark.slow) for m in ("mergingv2", "legacy"))]
)
def test_logits_and_gradients_are_monais(name):
    network, variables, x, cotangent, stored = solid(name)
    # at the bottom instance norm sees two voxels, whose derivative float32 cannot give: double precision shows the formula
    with jax.enable_x64(True):
        found = logits_and_gradient(network, variables, x, cotangent, jnp.float64)
    for array, expected in zip(found, (stored["y"], stored["gradient"]), strict=True):
        # stored in float32, else equal to 1e-12
        np.testing.assert_allclose(array[1::4, 2::4, 3::4], expected, rtol=2e-7, atol=2e-7 * np.abs(expected).max())


def test_the_three_mergings_give_different_numbers():
    x = jnp.asarray(seeded_input((1, 4, 2, 2, 3), 0))
    variables = PatchMerging("merging").init(jax.random.key(0), x)
    outputs = [PatchMerging(order).apply(variables, x) for order in MERGINGS]
    for i, a in enumerate(outputs):
        for b in outputs[i + 1 :]:
            assert jnp.abs(a - b).max() > 1e-2


INSIDE_AND_OUTSIDE = ["encoder1.conv1", "stage1.block1", "decoder2.up", "stage2.residual.conv2", "hidden3", "decoder1"]


@pytest.fixture(scope="module")
def flat():
    """A two-dimensional network and what it gives in float64, without and with recomputation."""
    state = read_state_dict(FIXTURES / "swin_v2.pth")
    reading = monai_swin_unetr.read(state, "swin_v2", Given(patch_merging="mergingv2"))
    stored = np.load(FIXTURES / "swin_v2.npz")
    x, cotangent = (stored[name][None].astype(np.float64) for name in ("x", "cotangent"))
    variables = jax.tree.map(np.float64, reading.variables)

    def run(remat):
        network = SwinUNETR(**hashable(reading.options), remat=remat)
        order = []  # JAX sorts the keys of a dict that it returns

        def apply(variables, x, offsets):
            y, taps = network.apply(variables, x, offsets)
            order[:] = taps
            return y, taps

        @partial(jax.jit, compiler_options=FAST_COMPILE)
        def everything(variables, x, offsets):
            (y, taps), pull = jax.vjp(partial(apply, variables), x, offsets)
            return y, taps, *pull((cotangent, jax.tree.map(jnp.zeros_like, taps)))

        shapes = jax.eval_shape(apply, variables, x, {})[1]
        offsets = {name: jnp.zeros(shapes[name].shape) for name in INSIDE_AND_OUTSIDE}
        initial = jax.eval_shape(network.init, jax.random.key(0), x)
        numbers = jax.tree.map(np.asarray, everything(variables, x, offsets))
        return numbers, order, jax.tree.map(lambda a: a.shape, initial)

    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(swin, "_CHUNK", 640)  # the first stage's 64 windows in six chunks of ten and a remainder
        return run(False), run(True), reading.variables, stored


@pytest.mark.slow
def test_logits_and_gradients_in_two_dimensions_are_monais(flat):
    ((y, _, gradient, _), _, _), _, _, stored = flat
    for found, expected in ((y, stored["y"]), (gradient, stored["gradient"])):
        np.testing.assert_allclose(found[0], expected, rtol=2e-7, atol=2e-7 * np.abs(expected).max())


@pytest.mark.slow
def test_recomputation_changes_no_number(flat):
    (plain, _, _), (remat, _, _), *_ = flat
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        # sums in double precision, added in another order where the attention is done in chunks
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(a).max())


@pytest.mark.slow
def test_recomputation_changes_neither_taps_nor_parameters(flat):
    (plain, order, initial), (_, remat_order, remat_initial), variables, _ = flat
    assert remat_order == order
    assert remat_initial == initial
    assert initial == jax.tree.map(lambda a: a.shape, variables)
    stages = [
        tap
        for i, depth in enumerate((2, 1, 1, 1), 1)
        for tap in (
            f"stage{i}.residual.conv1",
            f"stage{i}.residual.conv2",
            f"stage{i}.residual",
            *(f"stage{i}.block{j}" for j in range(depth)),
            f"stage{i}",
            f"hidden{i}",
        )
    ]
    encoders = [f"encoder{i}{tap}" for i in (1, 2, 3, 4, 10) for tap in (".conv1", ".conv2", "")]
    decoders = [f"decoder{i}{tap}" for i in (5, 4, 3, 2, 1) for tap in (".up", ".conv1", ".conv2", "")]
    assert order == ["patch_embed", "hidden0", *stages, *encoders, *decoders, "logits"]
    y, taps, _, by_offset = plain
    np.testing.assert_array_equal(taps["logits"], y)
    assert taps["decoder2.up"].shape == (1, 16, 32, 3)
    assert all(np.abs(gradient).max() > 0 for gradient in by_offset.values())


@pytest.mark.parametrize(("features", "parameters"), [(24, 15_703_868), (48, 62_188_436)])
def test_full_size_networks_have_monais_parameter_counts(features, parameters):
    network = SwinUNETR("merging", feature_size=features)
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 32, 2)))
    assert list(variables) == ["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"patch_merging": "v2"}, (32, 32, 32), "patch_merging is 'v2'; known are legacy, merging, mergingv2"),
        ({"norm": "layer"}, (32, 32, 32), "norm is 'layer'; known are batch"),
        ({"depths": (2, 2, 2)}, (32, 32, 32), "one value for each of 4 stages"),
        ({"num_heads": (5, 6, 12, 24)}, (32, 32, 32), "cannot be split into"),
        ({"attention_window": (7, 7)}, (32, 32, 32), "must have 3 sides"),
        ({}, (32, 48, 32), "each side must be a multiple of 32"),
        ({}, (32, 32), "must have 3 sides"),
    ],
)
def test_a_network_that_cannot_be_is_refused(options, grid, message):
    with pytest.raises(ValueError, match=message):
        SwinUNETR(**{"patch_merging": "merging"} | options).init(jax.random.key(0), jnp.zeros((1, *grid, 1)))


def test_patch_merging_has_no_default():
    with pytest.raises(TypeError, match="patch_merging"):
        SwinUNETR()
