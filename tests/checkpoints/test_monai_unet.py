"""Keys of MONAI's UNet: each maps to one variable and back, and what does not fit is listed."""

from pathlib import Path

import jax
import numpy as np
import pytest

from xaiseg.checkpoints import convert, monai_unet, read_state_dict
from xaiseg.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture
def state():
    return read_state_dict(FIXTURES / "unet_batch.pth")


def refusal(state) -> str:
    with pytest.raises(InputError) as caught:
        monai_unet.read(state, "a.pth")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["unet_batch", "unet_instance_affine", "unet_instance", "unet_2d"])
def test_every_tensor_becomes_one_variable(name):
    """Each tensor is filled with its own number: a bijection leaves each number in exactly one variable, of the same size."""
    state = {k: v for k, v in read_state_dict(FIXTURES / f"{name}.pth").items() if "num_batches" not in k}
    numbered = {k: np.full_like(v, i) for i, (k, v) in enumerate(state.items())}
    _, _, variables = monai_unet.read(numbered, name)
    leaves = jax.tree.leaves(variables)
    found = {int(leaf.flat[0]): leaf.size for leaf in leaves if (leaf == leaf.flat[0]).all()}
    assert len(leaves) == len(state)
    assert found == {i: v.size for i, v in enumerate(state.values())}


@pytest.mark.parametrize(
    ("name", "norm", "channels", "c_in", "c_out", "ndim"),
    [
        ("unet_batch", "batch", [4, 8, 16], 2, 2, 3),
        ("unet_instance_affine", "instance_affine", [4, 8], 2, 2, 3),
        ("unet_instance", "instance", [4, 8], 1, 2, 3),
        ("unet_2d", "batch", [4, 8], 2, 3, 2),
    ],
)
def test_the_architecture_is_read_off_the_tensors(name, norm, channels, c_in, c_out, ndim):
    options, inputs, _ = monai_unet.read(read_state_dict(FIXTURES / f"{name}.pth"), name)
    assert inputs == c_in
    assert options == {
        "channels": channels,
        "strides": [2] * (len(channels) - 1),
        "out_channels": c_out,
        "norm": norm,
        "kernel_size": 3,
        "up_kernel_size": 3,
        "ndim": ndim,
    }


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
    a, b = (monai_unet.read(s, "a.pth")[2] for s in (state, without))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_residual_units_are_refused():
    with pytest.raises(InputError, match="residual units; only num_res_units=0"):
        convert(FIXTURES / "unet_residual.pth")


def test_other_architectures_are_not_recognised(state):
    dynunet = [
        "input_block.conv1.conv.weight",
        "skip_layers.downsample.conv1.conv.weight",
        "output_block.conv.conv.weight",
    ]
    swin = ["swinViT.patch_embed.proj.weight", "encoder1.layer.conv1.conv.weight"]
    for keys in (dynunet, swin):
        assert not monai_unet.recognise(dict.fromkeys(keys, np.zeros(1)))
    assert monai_unet.recognise(state)


def test_strides_are_taken_from_the_caller_who_knows_them():
    state = read_state_dict(FIXTURES / "unet_batch.pth")
    assert monai_unet.read(state, "x")[0]["strides"] == [2, 2]
    assert monai_unet.read(state, "x", (1, 2))[0]["strides"] == [1, 2]
    with pytest.raises(InputError, match="2 levels, 3 strides"):
        monai_unet.read(state, "x", (1, 2, 2))
