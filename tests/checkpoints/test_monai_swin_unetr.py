"""Keys of MONAI's SwinUNETR: each maps to one variable and back, what they do not tell is asked for, what does not fit is named."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from seeded_weights import seeded_state

from xaiseg.checkpoints import monai_swin_unetr, read_state_dict
from xaiseg.checkpoints.mapping import Given
from xaiseg.errors import InputError
from xaiseg.models.swin import relative_position_index

FIXTURES = Path(__file__).parent.parent / "fixtures"
GIVEN = Given(patch_merging="merging")
INDEX = "swinViT.layers2.0.blocks.0.attn.relative_position_index"
TABLE = "swinViT.layers1.0.blocks.0.attn.relative_position_bias_table"


@pytest.fixture
def state():
    return read_state_dict(FIXTURES / "swin_v2.pth")


def solid(name):
    about = json.loads(str(np.load(FIXTURES / f"{name}.npz")["about"]))
    return seeded_state(about["shapes"], about["seed"])


def read(state, given=GIVEN):
    return monai_swin_unetr.read(state, "a.pth", given)


def refusal(state, given=GIVEN) -> str:
    with pytest.raises(InputError) as caught:
        read(state, given)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("a.pth: ")
    return str(caught.value)


@pytest.mark.parametrize("name", ["swin_v1", "swin_v2", "swin_merging", "swin_legacy"])
def test_every_tensor_becomes_one_variable(name):
    """Each tensor is filled with its own number: a bijection leaves each number in exactly one variable, of the same size."""
    path = FIXTURES / f"{name}.pth"
    state = read_state_dict(path) if path.exists() else solid(name)
    state = {k: v for k, v in state.items() if "num_batches" not in k}
    index = {k: v for k, v in state.items() if k.endswith("relative_position_index")}
    tensors = {k: np.full(v.shape, i, np.float32) for i, (k, v) in enumerate(state.items()) if k not in index}
    leaves = jax.tree.leaves(read(tensors | index).variables)
    found = {int(leaf.flat[0]): leaf.size for leaf in leaves if (leaf == leaf.flat[0]).all()}
    assert len(leaves) == len(tensors)
    assert found == {i: v.size for i, (k, v) in enumerate(state.items()) if k not in index}


V1 = {
    "patch_merging": "merging",
    "feature_size": 3,
    "out_channels": 2,
    "depths": [2, 2, 2, 2],
    "num_heads": [1, 2, 2, 4],
    "attention_window": 3,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "norm": "instance",
    "patch_norm": False,
    "use_v2": False,
    "ndim": 2,
}
LEGACY = {"depths": [1, 3, 1, 2], "attention_window": 4, "mlp_ratio": 3.0, "qkv_bias": False, "patch_norm": True}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("swin_v1", {}),
        ("swin_v2", {"depths": [2, 1, 1, 1], "attention_window": [2, 4], "use_v2": True}),
        ("swin_merging", {"feature_size": 4, "norm": "batch", "ndim": 3}),
        ("swin_legacy", {"feature_size": 4, "norm": "instance_affine", "ndim": 3, **LEGACY}),
    ],
)
def test_the_architecture_is_read_off_the_tensors(name, changed):
    path = FIXTURES / f"{name}.pth"
    reading = read(read_state_dict(path) if path.exists() else solid(name))
    assert reading.options == V1 | changed
    assert json.loads(json.dumps(reading.options)) == reading.options
    assert (reading.architecture, reading.c_in, reading.c_out) == ("swin_unetr", 2, 2)
    assert reading.default_layer == "decoder2.up"
    assert any("normalize" in line for line in reading.assumed)


def test_patch_merging_is_asked_for(state):
    text = refusal(state, Given())
    for name, version in (
        ("legacy", "MONAI <= 1.4"),
        ("merging", "MONAI >= 1.5"),
        ("mergingv2", "downsample='mergingv2'"),
    ):
        assert name in text
        assert version in text
    assert "'v3', expected legacy, merging, mergingv2" in refusal(state, Given(patch_merging="v3"))
    for name in ("legacy", "merging", "mergingv2"):
        assert read(state, Given(patch_merging=name)).options["patch_merging"] == name


def test_a_norm_that_the_keys_leave_open_is_taken_from_the_caller():
    affine, without, batch = solid("swin_legacy"), read_state_dict(FIXTURES / "swin_v1.pth"), solid("swin_merging")
    assert read(affine, GIVEN._replace(norm="group:2")).options["norm"] == "group:2"
    assert read(without, GIVEN._replace(norm="none")).options["norm"] == "none"
    assert any("instance norm" in line for line in read(without).assumed)
    assert not any("instance norm" in line for line in read(without, GIVEN._replace(norm="instance")).assumed)
    assert "known for such keys are batch" in refusal(batch, GIVEN._replace(norm="instance_affine"))
    assert "no parameters" in refusal(without, GIVEN._replace(norm="batch"))


@pytest.mark.parametrize(
    "key",
    [
        "swinViT.patch_embed.proj.weight",
        "swinViT.patch_embed.proj.bias",
        "swinViT.layers1c.0.layer.conv2.conv.weight",
        "swinViT.layers1.0.blocks.1.norm1.weight",
        "swinViT.layers1.0.blocks.0.attn.proj.bias",
        "swinViT.layers3.0.downsample.reduction.weight",
        "swinViT.layers4.0.blocks.0.mlp.linear1.weight",
        TABLE,
        "encoder1.layer.conv3.conv.weight",
        "encoder10.layer.conv1.conv.weight",
        "decoder5.transp_conv.conv.weight",
        "decoder1.conv_block.conv1.conv.weight",
        "out.conv.conv.weight",
        "out.conv.conv.bias",
    ],
)
def test_a_missing_key_is_named(state, key):
    del state[key]
    text = refusal(state)
    assert f"missing {key}" in text
    assert text.count("missing") == 1


def test_unknown_and_misshapen_keys_are_named(state):
    state["rotation_head.weight"] = np.zeros(3, np.float32)
    state["encoder2.layer.conv1.conv.weight"] = np.zeros((3, 3, 3), np.float32)
    text = refusal(state)
    assert "unknown rotation_head.weight" in text
    assert "encoder2.layer.conv1.conv.weight has shape (3, 3, 3), expected (3, 3, 3, 3)" in text


@pytest.mark.parametrize("key", ["swinViT.patch_embed.proj.weight", TABLE, "out.conv.conv.weight"])
@pytest.mark.parametrize("shape", [(), (7,)])
def test_a_tensor_of_another_rank_is_refused(state, key, shape):
    state[key] = np.zeros(shape, np.float32)
    assert f"{key} has shape {shape}" in refusal(state)


def test_the_stored_index_must_be_ours(state):
    assert INDEX in state
    edited = state[INDEX].copy()
    edited[0, 1] += 1
    assert INDEX in refusal(state | {INDEX: edited})


def test_a_window_that_is_no_cube_needs_the_index(state):
    """3·7 positions are those of (2, 4), but (4, 2) would have as many."""
    without = {k: v for k, v in state.items() if not k.endswith("relative_position_index")}
    assert "21 relative positions fit no attention window with equal sides" in refusal(without)
    turned = {k: relative_position_index((4, 2)) for k in state if k not in without}
    assert read(without | turned).options["attention_window"] == [4, 2]


def test_self_supervised_names_of_the_mlp_are_known(state):
    renamed = {k.replace(".mlp.linear", ".mlp.fc"): v for k, v in state.items()}
    assert renamed.keys() != state.keys()
    same = jax.tree.map(np.array_equal, read(renamed).variables, read(state).variables)
    assert jax.tree.all(same)


@pytest.mark.parametrize("prefix", ["swinViT.", "", "encoder."])
def test_an_encoder_alone_is_refused(state, prefix):
    encoder = {k.replace("swinViT.", prefix): v for k, v in state.items() if k.startswith("swinViT.")}
    assert monai_swin_unetr.recognise(encoder)
    assert "self-supervised encoder" in refusal(encoder | {"rotation_head.weight": np.zeros((4, 48), np.float32)})


def test_other_architectures_are_not_recognised(state):
    unet = ["model.0.conv.weight", "model.1.submodule.0.conv.weight"]
    dynunet = ["input_block.conv1.conv.weight", "output_block.conv.conv.weight"]
    nnunet = ["encoder.stages.0.0.convs.0.conv.weight", "decoder.seg_layers.0.weight"]
    for keys in (unet, dynunet, nnunet):
        assert not monai_swin_unetr.recognise(dict.fromkeys(keys, np.zeros(1)))
    assert monai_swin_unetr.recognise(state)
