"""Keys of MONAI's UNet: each maps to one variable and back, what does not fit is listed, what they do not tell is asked for."""

from pathlib import Path

import jax
import numpy as np
import pytest

from xaiseg.checkpoints import monai_unet, read_state_dict
from xaiseg.checkpoints.mapping import Given
from xaiseg.errors import InputError
from xaiseg.models import UNet

FIXTURES = Path(__file__).parent.parent / "fixtures"
DEFAULTS = {
    "out_channels": 2,
    "kernel_size": 3,
    "up_kernel_size": 3,
    "ndim": 3,
    "residual_units": 0,
    "activation": "prelu",
    "use_bias": True,
}
# name: (what is given, input channels, options but for the defaults)
VARIANTS = {
    "unet_batch": (Given(), 2, {"channels": [4, 8, 16], "strides": [2, 2], "norm": "batch"}),
    "unet_instance_affine": (Given(), 2, {"channels": [4, 8], "strides": [2], "norm": "instance_affine"}),
    "unet_instance": (Given(), 1, {"channels": [4, 8], "strides": [2], "norm": "instance"}),
    "unet_2d": (Given(), 2, {"channels": [4, 8], "strides": [2], "norm": "batch", "out_channels": 3, "ndim": 2}),
    "unet_residual1_batch": (
        Given(),
        2,
        {"channels": [2, 4, 4, 6], "strides": [1, 2, 1], "norm": "batch", "residual_units": 1},
    ),
    "unet_residual2_batch": (
        Given(),
        2,
        {"channels": [2, 4, 4], "strides": [2, 2], "norm": "batch", "residual_units": 2},
    ),
    "unet_residual2_instance": (
        Given(),
        2,
        {"channels": [3, 5], "strides": [1], "norm": "instance", "residual_units": 2},
    ),
    "unet_residual1_group_relu_nobias": (
        Given(norm="group:2", activation="relu"),
        2,
        {
            "channels": [4, 6],
            "strides": [2],
            "norm": "group:2",
            "activation": "relu",
            "use_bias": False,
            "out_channels": 4,
            "residual_units": 1,
        },
    ),
    "unet_residual2_2d": (
        Given(strides=((1, 2),)),
        2,
        {
            "channels": [4, 6],
            "strides": [[1, 2]],
            "norm": "instance_affine",
            "kernel_size": [3, 5],
            "out_channels": 3,
            "ndim": 2,
            "residual_units": 2,
        },
    ),
    "unet_group_swish": (
        Given(norm="group:2", activation="swish"),
        2,
        {"channels": [4, 6], "strides": [2], "norm": "group:2", "activation": "swish"},
    ),
    "unet_none_gelu_nobias": (
        Given(strides=(1, 2), norm="none", activation="gelu"),
        2,
        {"channels": [2, 3, 4], "strides": [1, 2], "norm": "none", "activation": "gelu", "use_bias": False},
    ),
    "unet_batch_leakyrelu": (
        Given(activation="leakyrelu"),
        2,
        {"channels": [2, 3], "strides": [2], "norm": "batch", "activation": "leakyrelu"},
    ),
}


@pytest.fixture
def state():
    return read_state_dict(FIXTURES / "unet_batch.pth")


def stored(name):
    return read_state_dict(FIXTURES / f"{name}.pth")


def refusal(state, **given) -> str:
    with pytest.raises(InputError) as caught:
        monai_unet.read(state, "a.pth", Given(**given))
    assert str(caught.value).startswith("a.pth: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_becomes_one_variable(name):
    """Each tensor is filled with its own number: a bijection leaves each number in exactly one variable, of the same size."""
    state = {k: v for k, v in stored(name).items() if "num_batches" not in k}
    numbered = {k: np.full_like(v, i) for i, (k, v) in enumerate(state.items())}
    leaves = jax.tree.leaves(monai_unet.read(numbered, name, VARIANTS[name][0]).variables)
    found = {int(leaf.flat[0]): leaf.size for leaf in leaves if (leaf == leaf.flat[0]).all()}
    assert len(leaves) == len(state)
    assert found == {i: v.size for i, v in enumerate(state.values())}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_architecture_is_read_off_the_tensors(name):
    given, c_in, options = VARIANTS[name]
    reading = monai_unet.read(stored(name), name, given)
    assert (reading.architecture, reading.c_in) == ("unet", c_in)
    assert reading.options == DEFAULTS | options
    assert reading.c_out == reading.options["out_channels"]


@pytest.mark.parametrize(
    "key",
    [
        "model.0.conv.weight",
        "model.0.conv.bias",
        "model.0.adn.N.running_mean",
        "model.0.adn.N.weight",
        "model.1.submodule.0.conv.weight",
        "model.1.submodule.1.submodule.conv.weight",
        "model.1.submodule.1.submodule.adn.A.weight",
        "model.1.submodule.2.adn.N.running_var",
        "model.2.conv.weight",
        "model.2.conv.bias",
    ],
)
def test_a_missing_key_is_named(state, key):
    del state[key]
    text = refusal(state)
    assert f"missing {key}" in text
    # nothing else is blamed
    assert text.count("missing") == 1
    assert "unknown" not in text


def test_several_problems_are_all_listed(state):
    del state["model.0.conv.bias"]
    state["model.3.extra"] = np.zeros(2, np.float32)
    state["model.1.submodule.2.conv.bias"] = np.zeros(5, np.float32)
    text = refusal(state)
    assert "missing model.0.conv.bias" in text
    assert "unknown model.3.extra" in text
    assert "model.1.submodule.2.conv.bias has shape (5,), expected (4,)" in text


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("model.0.conv.weight", (4, 2, 3)),
        ("model.1.submodule.0.conv.weight", ()),
        ("model.1.submodule.1.submodule.conv.weight", (16,)),
        ("model.2.conv.weight", (8,)),
        ("model.2.conv.weight", (8, 2, 3, 3)),
        ("model.0.conv.weight", (4, 2, 3, 3)),
    ],
)
def test_a_tensor_of_another_rank_is_refused(state, key, shape):
    state[key] = np.zeros(shape, np.float32)
    assert "model." in refusal(state)


def test_counters_of_batches_are_ignored(state):
    without = {k: v for k, v in state.items() if "num_batches" not in k}
    assert len(without) < len(state)
    a, b = (monai_unet.read(s, "a.pth", Given()).variables for s in (state, without))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.mark.parametrize(
    "key",
    [
        "model.0.conv.unit1.conv.weight",
        "model.0.residual.weight",
        "model.0.residual.bias",
        "model.1.submodule.1.submodule.conv.unit1.adn.N.running_mean",
        "model.1.submodule.2.1.conv.unit0.adn.A.weight",
        "model.1.submodule.2.0.adn.N.weight",
        "model.2.0.adn.N.bias",
        "model.2.1.conv.unit0.conv.weight",
    ],
)
def test_a_missing_key_of_a_residual_unit_is_named(key):
    state = stored("unet_residual2_batch")
    del state[key]
    text = refusal(state)
    assert f"missing {key}" in text
    assert text.count("missing") == 1
    assert "unknown" not in text


def test_keys_beyond_those_of_residual_units_are_unknown():
    # both shortcuts keep grid and features, and the top's last convolution has no norm
    state = stored("unet_residual1_batch")
    state |= {
        "model.2.1.conv.unit0.adn.A.weight": np.ones(1, np.float32),
        "model.2.1.residual.bias": np.ones(2, np.float32),
    }
    text = refusal(state)
    assert all(f"unknown {key}" in text for key in list(state)[-2:])
    assert text.count("unknown") == 2


def test_only_this_architecture_is_recognised():
    dynunet = [
        "input_block.conv1.conv.weight",
        "skip_layers.downsample.conv1.conv.weight",
        "output_block.conv.conv.weight",
    ]
    swin = ["swinViT.patch_embed.proj.weight", "encoder1.layer.conv1.conv.weight"]
    for keys in (dynunet, swin):
        assert not monai_unet.recognise(dict.fromkeys(keys, np.zeros(1)))
    assert all(monai_unet.recognise(stored(name)) for name in VARIANTS)


def test_strides_are_taken_from_the_caller_who_knows_them(state):
    assert monai_unet.read(state, "x", Given(strides=(1, 2))).options["strides"] == [1, 2]
    assert monai_unet.read(state, "x", Given(strides=((1, 2, 2), 2))).options["strides"] == [[1, 2, 2], 2]
    assert "2 levels, 3 strides" in refusal(state, strides=(1, 2, 2))
    assert "stride (1, 2) is given for level 1, but the network has 3 spatial axes" in refusal(
        state, strides=(2, (1, 2))
    )


def test_a_stride_that_a_shortcut_contradicts_is_refused():
    state = stored("unet_residual1_batch")
    assert monai_unet.read(state, "x", Given(strides=(1, 3, 1))).options["strides"] == [1, 3, 1]
    assert (
        "stride (1, 2, 1) is given for level 0, but the shortcut of its residual unit is that of stride 1"
        in refusal(state, strides=((1, 2, 1), 2, 1))
    )
    assert "stride 1 is given for level 1, but the shortcut of its residual unit is that of a stride above 1" in (
        refusal(state, strides=(1, 1, 1))
    )


def test_strides_where_all_kernels_are_1():
    """A strided and a projecting shortcut look alike then (level 1); one that keeps the features must be strided (level 0)."""
    state = {k: v[..., :1, :1, :1] if v.ndim == 5 else v for k, v in stored("unet_residual2_batch").items()}
    assert monai_unet.read(state, "x", Given()).options["strides"] == [2, 2]
    assert monai_unet.read(state, "x", Given(strides=(2, 1))).options["strides"] == [2, 1]
    assert "stride 1 is given for level 0" in refusal(state, strides=(1, 2))


@pytest.mark.parametrize(
    ("name", "given", "assumed"),
    [
        ("unet_batch", {}, ["strides 2 at every level (keys do not tell; --strides)"]),
        ("unet_batch", {"strides": (2, 2), "norm": "batch", "activation": "prelu"}, []),
        (
            "unet_instance",
            {"strides": (2,)},
            ["instance norm without parameters (keys cannot tell it from none; --norm)"],
        ),
        ("unet_instance", {"strides": (2,), "norm": "instance"}, []),
        (
            "unet_instance_affine",
            {"strides": (2,)},
            ["instance norm with parameters (keys cannot tell it from group norm; --norm)"],
        ),
        ("unet_instance_affine", {"strides": (2,), "norm": "group:4"}, []),
        ("unet_residual1_batch", {}, ["strides 1,2,1 (the shortcuts tell only a 1; --strides)"]),
        ("unet_residual2_instance", {"norm": "none"}, []),
    ],
)
def test_what_the_keys_do_not_tell_is_said(name, given, assumed):
    assert list(monai_unet.read(stored(name), name, Given(**given)).assumed) == assumed


@pytest.mark.parametrize(
    ("name", "norm", "message"),
    [
        ("unet_batch", "instance", "norm instance is given, but the keys are those of batch"),
        ("unet_batch", "group:2", "norm group:2 is given, but the keys are those of batch"),
        (
            "unet_instance_affine",
            "instance",
            "norm instance is given, but the keys are those of instance_affine or group:N",
        ),
        ("unet_instance", "batch", "norm batch is given, but the keys are those of instance or none"),
        ("unet_instance", "group:2", "the keys are those of instance or none"),
        ("unet_instance", "layer", "norm is 'layer'; known are batch"),
    ],
)
def test_a_norm_that_the_keys_contradict_is_refused(name, norm, message):
    assert message in refusal(stored(name), norm=norm)


def test_an_activation_without_parameters_must_be_given():
    state = stored("unet_batch_leakyrelu")
    text = refusal(state)
    assert "no adn.A.weight" in text
    assert "it is not given; give leakyrelu, relu, gelu, swish with --activation" in text
    assert "it is given as prelu; give leakyrelu" in refusal(state, activation="prelu")
    assert "it is given as tanh; give leakyrelu" in refusal(state, activation="tanh")
    assert "activation relu is given, but the keys are those of prelu" in refusal(
        stored("unet_batch"), activation="relu"
    )


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("unet_batch", "decoder1.conv"),
        ("unet_instance", "bottleneck.conv"),
        ("unet_residual2_batch", "decoder1.conv"),
        ("unet_residual2_instance", "bottleneck"),
    ],
)
def test_the_default_layer_is_a_tap(name, layer):
    reading = monai_unet.read(stored(name), name, Given())
    assert reading.default_layer == layer
    x = np.zeros((1, *(4,) * reading.options["ndim"], reading.c_in), np.float32)
    _, taps = jax.eval_shape(UNet(**reading.options).apply, reading.variables, x)
    assert layer in taps
