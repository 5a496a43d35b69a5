"""Keys of MONAI's DynUNet: each maps to one variable and back, under either of its names, and what does not fit is listed."""

from pathlib import Path

import jax
import numpy as np
import pytest

from xaiseg.checkpoints import monai_dynunet, monai_unet, read_state_dict
from xaiseg.checkpoints.mapping import Given
from xaiseg.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures"
GROUP = Given(norm="group:2")


def stored(name):
    state = read_state_dict(FIXTURES / f"dynunet_{name}.pth")
    return {k: v for k, v in state.items() if "num_batches" not in k}


def canonical(name):
    return {k: v for k, v in stored(name).items() if not k.startswith("skip_layers.")}


@pytest.fixture
def plain():
    """Two heads, biases of the transposed convolutions, four levels; canonical names only."""
    return canonical("plain")


def read(state, given=None):
    return monai_dynunet.read(state, "a.pth", given or Given())


def refusal(state, given=None) -> str:
    with pytest.raises(InputError) as caught:
        read(state, given)
    text = str(caught.value)
    assert text.startswith("a.pth: ")
    assert "\n" not in text
    return text


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


@pytest.mark.parametrize("name", ["residual", "plain", "batch", "group", "2d"])
def test_every_tensor_becomes_one_variable(name):
    """Each tensor is filled with its own number: a bijection leaves each number in exactly one variable, of the same size."""
    state = canonical(name)
    numbered = {k: np.full_like(v, i) for i, (k, v) in enumerate(state.items())}
    leaves = jax.tree.leaves(read(numbered).variables)
    found = {int(leaf.flat[0]): leaf.size for leaf in leaves if (leaf == leaf.flat[0]).all()}
    assert len(leaves) == len(state)
    assert found == {i: v.size for i, v in enumerate(state.values())}


BASE = {"filters": [3, 4, 5], "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "ndim": 3}
BASE |= {"out_channels": 2, "norm": "instance", "activation": "leakyrelu", "residual": True, "heads": 0}
ANISOTROPIC = [[1, 2, 2], 2, [2, 2, 1]]


@pytest.mark.parametrize(
    ("name", "given", "c_in", "changed"),
    [
        ("residual", Given(), 2, {}),
        (
            "plain",
            Given(),
            2,
            {
                "filters": [3, 4, 5, 6],
                "kernel_size": [[1, 3, 3], 3, 3, [3, 1, 3]],
                "strides": [1, *ANISOTROPIC],
                "upsample_kernel_size": ANISOTROPIC,
                "norm": "instance_affine",
                "residual": False,
                "trans_bias": True,
                "heads": 2,
            },
        ),
        (
            "batch",
            Given(),
            3,
            {
                "filters": [3, 3, 4],
                "strides": [1, 1, 2],
                "upsample_kernel_size": [1, 2],
                "out_channels": 3,
                "norm": "batch",
            },
        ),
        ("group", GROUP, 2, {"filters": [4, 4, 6], "norm": "group:2"}),
        ("2d", Given(), 2, {"norm": "instance_affine", "activation": "prelu", "heads": 1, "ndim": 2}),
    ],
)
def test_the_architecture_is_read_off_the_tensors(name, given, c_in, changed):
    reading = read(stored(name), given)
    assert reading.options == {**BASE, "trans_bias": False, **changed}
    assert (reading.architecture, reading.default_layer) == ("dynunet", "decoder1.up")
    assert (reading.c_in, reading.c_out) == (c_in, reading.options["out_channels"])


@pytest.mark.parametrize("name", ["residual", "plain", "batch", "2d"])
def test_either_name_of_a_tensor_is_enough(name):
    state = stored(name)
    # the output is registered once; the heads, those of levels 1 and below, twice
    aliases = {k: v for k, v in state.items() if k.startswith(("skip_layers.", "output_block."))}
    assert len(state) == len(canonical(name)) + len(aliases) - 2
    expected = read(state)
    for part in (aliases, canonical(name)):
        found = read(part)
        assert found._replace(variables={}) == expected._replace(variables={})
        assert same(found.variables, expected.variables)


def test_counters_of_batches_are_ignored():
    state = read_state_dict(FIXTURES / "dynunet_batch.pth")
    assert len(stored("batch")) < len(state)
    assert same(read(state).variables, read(stored("batch")).variables)


@pytest.mark.parametrize(
    ("key", "alias"),
    [
        ("downsamples.1.conv2.conv.weight", "skip_layers.next_layer.next_layer.downsample.conv2.conv.weight"),
        ("upsamples.2.transp_conv.conv.bias", "skip_layers.upsample.transp_conv.conv.bias"),
        ("bottleneck.norm2.bias", "skip_layers.next_layer.next_layer.next_layer.norm2.bias"),
        ("deep_supervision_heads.1.conv.conv.bias", "skip_layers.next_layer.next_layer.super_head.conv.conv.bias"),
    ],
)
def test_unequal_aliases_are_refused(key, alias):
    state = stored("plain")
    state[alias] = state[alias] + 1
    assert f"{key} and {alias} are one tensor of the network but differ" in refusal(state)


@pytest.mark.parametrize(
    "key",
    [
        "input_block.conv1.conv.weight",
        "downsamples.0.conv1.conv.weight",
        "downsamples.1.conv2.conv.weight",
        "bottleneck.norm1.bias",
        "upsamples.0.transp_conv.conv.weight",
        "upsamples.1.transp_conv.conv.bias",
        "upsamples.2.conv_block.norm2.weight",
        "deep_supervision_heads.0.conv.conv.weight",
        "output_block.conv.conv.weight",
        "output_block.conv.conv.bias",
    ],
)
def test_a_missing_key_is_named(plain, key):
    del plain[key]
    text = refusal(plain)
    assert f"missing {key}" in text
    # nothing else is blamed
    assert text.count("missing") == 1
    assert "unknown" not in text


def test_a_missing_shortcut_is_named():
    state = canonical("residual")
    del state["downsamples.0.conv3.conv.weight"]
    assert refusal(state).count(": missing downsamples.0.conv3.conv.weight; expected exactly") == 1


def test_a_missing_level_is_named(plain):
    text = refusal({k: v for k, v in plain.items() if not k.startswith("downsamples.1.")})
    assert text.endswith("not a complete MONAI DynUNet: missing downsamples.1.conv1.conv.weight")


def test_several_problems_are_all_listed(plain):
    del plain["output_block.conv.conv.bias"]
    plain["encoder1.layer.conv1.conv.weight"] = np.zeros(2, np.float32)  # of a Swin UNETR
    plain["input_block.norm1.weight"] = np.zeros(5, np.float32)
    text = refusal(plain)
    assert "missing output_block.conv.conv.bias" in text
    assert "unknown encoder1.layer.conv1.conv.weight" in text
    assert "input_block.norm1.weight has shape (5,), expected (3,)" in text


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("deep_supervision_heads.7.conv.conv.weight", "unknown deep_supervision_heads.7.conv.conv.weight"),
        ("deep_supervision_heads.2.conv.conv.weight", "4 levels can have 0 to 2 heads, not 3"),
        ("skip_layers.super_head.conv.conv.weight", "unknown skip_layers.super_head.conv.conv.weight"),
        ("skip_layers.next_layer.conv1.conv.weight", "unknown skip_layers.next_layer.conv1.conv.weight"),
        ("skip_layers." + 4 * "next_layer." + "downsample.a", "unknown skip_layers." + 4 * "next_layer."),
        ("input_block.conv3.conv.weight", "missing downsamples.0.conv3.conv.weight"),
        ("downsamples.7.conv1.conv.weight", "unknown downsamples.7.conv1.conv.weight"),
    ],
)
def test_an_extra_key_is_refused(plain, key, message):
    plain[key] = np.zeros((2, 5, 1, 1, 1), np.float32)
    assert message in refusal(plain)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("input_block.conv1.conv.weight", (3, 2, 3), r"has shape (3, 2, 3), expected 4 or 5 axes"),
        ("downsamples.0.conv1.conv.weight", (4, 3, 3, 3), "has shape (4, 3, 3, 3), expected 5 axes"),
        ("bottleneck.conv1.conv.weight", (), "has shape (), expected 5 axes"),
        ("output_block.conv.conv.weight", (2,), "has shape (2,), expected 5 axes"),
        ("upsamples.0.transp_conv.conv.weight", (6, 5, 0, 2, 2), "expected 5 axes like input_block"),
        ("downsamples.0.conv1.conv.weight", (4, 7, 3, 3, 3), "expected (4, 3, 3, 3, 3)"),
        ("downsamples.0.conv1.conv.weight", (4, 3, 2, 3, 3), "kernel_size (2, 3, 3) must be odd"),
        ("input_block.conv2.conv.weight", (3, 3, 3, 3, 3), "expected (3, 3, 1, 3, 3)"),
    ],
)
def test_a_misshapen_tensor_is_refused(plain, key, shape, message):
    plain[key] = np.zeros(shape, np.float32)
    text = refusal(plain)
    assert message in text
    assert "must be odd" in text or key in text


def test_a_slope_per_channel_is_refused():
    state = canonical("2d")
    state["input_block.lrelu.weight"] = np.zeros(3, np.float32)
    assert "input_block.lrelu.weight has shape (3,), expected (1,)" in refusal(state)


def test_what_keys_do_not_tell_is_said():
    first = "the first stride is 1"
    slope = "activation is leakyrelu with slope 0.01 (keys tell none)"
    bare = "norm is instance, without parameters (keys tell none; norm none leaves none either)"
    affine = "norm is instance_affine (norm group:N has the same keys)"
    assert read(canonical("residual")).assumed == (first, bare, slope)
    assert read(canonical("group")).assumed == (first, affine, slope)
    assert read(canonical("batch")).assumed == (first, slope)
    assert read(canonical("2d")).assumed == (first, affine)
    everything = Given(strides=(1, 2, 2), norm="none", activation="relu")
    reading = read(canonical("residual"), everything)
    assert reading.assumed == ()
    assert reading.options["norm"] == "none"
    assert reading.options["activation"] == "relu"
    assert reading.options["strides"] == [1, 2, 2]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("residual", Given(strides=(2, 2)), "the network has 3 levels, 2 strides are given; give one per level"),
        ("residual", Given(strides=(2, 2, 2)), "the first stride is (2, 2, 2); it must be 1"),
        ("residual", Given(strides=(1, 2, 3)), "must equal the strides below the top, [(2, 2, 2), (3, 3, 3)]"),
        ("residual", Given(norm="batch"), "with norm batch and activation leakyrelu: missing input_block.norm1.weight"),
        ("residual", Given(norm="layer"), "norm is 'layer'; known are"),
        ("residual", Given(activation="prelu"), "missing input_block.lrelu.weight"),
        ("residual", Given(activation="sine"), "activation is 'sine'; known are"),
        ("2d", Given(activation="relu"), "unknown input_block.lrelu.weight"),
        ("group", Given(norm="instance"), "unknown input_block.norm1.weight"),
        ("group", Given(norm="group:4"), "6 features cannot be split into 4 groups"),
        ("batch", Given(norm="group:1"), "unknown input_block.norm1.running_mean"),
    ],
)
def test_what_is_given_must_fit_the_keys(name, given, message):
    assert message in refusal(canonical(name), given)


def test_only_dynunets_are_recognised(plain):
    aliases = [k for k in stored("plain") if k.startswith("skip_layers.")]
    for keys in (plain, aliases, ["downsamples.0.conv1.conv.weight"], ["upsamples.0.conv_block.norm1.bias"]):
        state = dict.fromkeys(keys, np.zeros(1))
        assert monai_dynunet.recognise(state)
        assert not monai_unet.recognise(state)
    unet = read_state_dict(FIXTURES / "unet_batch.pth")
    swin = ["swinViT.patch_embed.proj.weight", "encoder1.layer.conv1.conv.weight", "decoder1.transp_conv.conv.weight"]
    nnunet = ["encoder.stages.0.0.convs.0.conv.weight", "decoder.transpconvs.0.weight"]
    for keys in (unet, swin, nnunet):
        assert not monai_dynunet.recognise(dict.fromkeys(keys, np.zeros(1)))
