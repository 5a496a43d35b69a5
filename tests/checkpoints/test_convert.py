"""From a file or folder to a model that is saved, loaded and gives PyTorch's logits; what is asked of the user."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_torch_file import Stored, write

from xaiseg.checkpoints import convert, load_model, read_state_dict, save_model
from xaiseg.cli import main
from xaiseg.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures"


def flat(x, window):
    """The arrays of a 2-D fixture with the window's axis of side 1."""
    return np.expand_dims(x, 1 + window.index(1)) if 1 in window else x


@pytest.mark.parametrize(
    ("name", "options", "architecture"),
    [
        ("unet_batch", {}, "unet"),
        ("unet_residual2_batch", {}, "unet"),
        ("unet_residual1_group_relu_nobias", {"norm": "group:2", "activation": "relu", "target_class": 1}, "unet"),
        ("unet_2d", {"target_class": 1}, "unet"),
        ("dynunet_residual", {}, "dynunet"),
        ("dynunet_2d", {}, "dynunet"),
        ("swin_v1", {"patch_merging": "merging"}, "swin_unetr"),
    ],
)
def test_a_checkpoint_becomes_a_model_folder(name, options, architecture, tmp_path):
    arrays = np.load(FIXTURES / f"{name}.npz")
    x = arrays["x"] if arrays["x"].shape[0] == 1 and arrays["x"].ndim > 3 else arrays["x"][None]
    y = arrays["y"] if arrays["y"].ndim == x.ndim else arrays["y"][None]
    window = x.shape[1:-1] if x.ndim == 5 else (*x.shape[1:-1], 1)
    channels = ["FLAIR", "T1w", "T2w"][: x.shape[-1]]
    model = convert(FIXTURES / f"{name}.pth", channels, window, **options)
    assert model.spec.architecture == architecture
    loaded = load_model(save_model(tmp_path / "m", model))
    found = jax.jit(lambda f, x: f(x))(loaded.logits_fn, jnp.asarray(flat(x, window), jnp.float32))
    np.testing.assert_allclose(found, flat(y, window), atol=1e-4)
    assert loaded.spec == model.spec
    assert model.spec.default_layer in model.taps()


def state(name, prefix="", **changes):
    """A fixture's tensors under names with a prefix, as a file that holds them."""
    tensors = {f"{prefix}{k}": v for k, v in {**read_state_dict(FIXTURES / f"{name}.pth"), **changes}.items()}
    return {k: Stored(v, "FloatStorage") for k, v in tensors.items() if v.dtype == np.float32}


@pytest.mark.parametrize("prefix", ["net.", "network.", "module.model.", "_orig_mod.net."])
def test_what_a_wrapper_puts_before_every_name(prefix, tmp_path):
    path = write(tmp_path / "a.pth", {"state_dict": state("unet_batch", prefix)})
    model = convert(path, window=(16, 16, 16))
    expected = convert(FIXTURES / "unet_batch.pth", window=(16, 16, 16))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model.variables, expected.variables))


def refusal(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        convert(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_assumed_is_kept_and_what_was_given_is_not():
    source = FIXTURES / "unet_batch.pth"
    strides = "strides 2 at every level (keys do not tell; --strides)"
    others = ["channels FLAIR, T1w (--channels)", "threshold 0.3, the paper's for this architecture (--threshold)"]
    assert convert(source, window=(16, 16, 16)).spec.notes["assumed"] == [strides, *others]
    given = {"strides": (2, 2), "threshold": 0.5}
    assert convert(source, ["A", "B"], (16, 16, 16), **given).spec.notes["assumed"] == []


@pytest.mark.parametrize("nested", [{"model": {"state_dict": 1}}, {"state_dict": {"model": {"net": 1}}}])
def test_a_state_dict_deep_inside_a_file(nested, tmp_path):
    def fill(content):
        return state("unet_batch", "net.module.") if content == 1 else {k: fill(v) for k, v in content.items()}

    assert convert(write(tmp_path / "a.pth", fill(nested)), window=(16, 16, 16)).parameter_count > 0


@pytest.mark.parametrize("part", ["half", "extra"])
def test_mixed_prefixes(part, tmp_path):
    tensors = state("unet_batch", "net.")
    if part == "half":
        tensors = {k.removeprefix("net.") if i % 2 else k: v for i, (k, v) in enumerate(tensors.items())}
    else:
        tensors["criterion.weight"] = Stored(np.ones(2, np.float32), "FloatStorage")
    text = refusal(write(tmp_path / "a.pth", tensors), window=(16, 16, 16))
    assert "mixed prefixes" in text
    assert "called net.…" in text
    assert "save the state dict of the network alone" in text


def test_one_logit_has_a_sigmoid(tmp_path):
    """A network of one class, cut out of the fixture's two."""
    source = read_state_dict(FIXTURES / "unet_batch.pth")
    one = {
        "model.2.conv.weight": source["model.2.conv.weight"][:, :1],
        "model.2.conv.bias": source["model.2.conv.bias"][:1],
    }
    spec = convert(write(tmp_path / "a.pth", state("unet_batch", **one)), window=(16, 16, 16)).spec
    assert (spec.output_activation, spec.target_class) == ("sigmoid", 0)


def test_the_patch_merging_is_asked_for_with_its_choices():
    text = refusal(FIXTURES / "swin_v1.pth", window=(64, 32, 1))
    for choice in ("legacy", "merging", "mergingv2", "--patch-merging", "1.4"):
        assert choice in text
    spec = convert(FIXTURES / "swin_v1.pth", window=(64, 32, 1), patch_merging="legacy", remat=True).spec
    assert (spec.options["patch_merging"], spec.options["remat"], spec.threshold) == ("legacy", True, 0.4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet_batch", {"remat": True}, "a unet; --remat is for a SwinUNETR"),
        ("unet_batch", {"checkpoint": "best"}, "not an nnU-Net result folder"),
        ("unet_batch", {"any_trainer": True}, "not an nnU-Net result folder"),
        ("swin_v1", {"patch_merging": "merging", "window": (64, 48, 1)}, "multiple of 32"),
        ("unet_batch", {"norm": "instance"}, "norm"),
        (
            "unet_batch",
            {"patch_merging": "legacy"},
            "a MONAI UNet, whose keys leave no such choice; leave out --patch-merging",
        ),
        ("dynunet_residual", {"patch_merging": "legacy"}, "leave out --patch-merging"),
        ("swin_v1", {"patch_merging": "legacy", "strides": (2, 2)}, "leave out --strides"),
    ],
)
def test_options_that_do_not_fit(name, options, message):
    assert message in refusal(FIXTURES / f"{name}.pth", **{"window": (32, 32, 32), **options})


def test_an_nnunet_checkpoint_without_its_folder(tmp_path):
    source = FIXTURES / "nnunet_plain" / "fold_0" / "checkpoint_final.pth"
    alone = tmp_path / "checkpoint_final.pth"
    alone.write_bytes(source.read_bytes())
    assert "give its result folder, with plans.json and dataset.json" in refusal(alone, window=(16, 16, 16))


def test_an_nnunet_becomes_an_ensemble(tmp_path):
    model = convert(FIXTURES / "nnunet_plain")
    spec = model.spec
    assert (spec.members, spec.tiling, spec.overlap, spec.threshold) == (("fold_0", "fold_1"), "nnunet", 0.5, None)
    assert (spec.channels, spec.window, spec.target_class) == (("FLAIR", "T1w"), (4, 8, 12), 1)
    assert spec.notes["folds"] == ["fold_0", "fold_1"]
    loaded = load_model(save_model(tmp_path / "m", model))
    assert loaded.spec == spec
    arrays = np.load(FIXTURES / "nnunet_plain" / "expected.npz")
    single = loaded.with_spec(mirror_axes=())
    found = jax.jit(lambda f, x: f(x))(single.logits_fn, jnp.asarray(arrays["x"], jnp.float32))
    expected = (arrays["fold_0_y"] + arrays["fold_1_y"]) / 2
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_one_fold_is_a_single_network():
    spec = convert(FIXTURES / "nnunet_plain", folds=["1"], mirroring=False).spec
    assert (spec.members, spec.mirror_axes) == ((), ())


def test_among_regions_one_must_be_chosen():
    assert "2 classes (0 whole, 1 core); name the lesion's with --target-class" in refusal(FIXTURES / "nnunet_residual")
    spec = convert(FIXTURES / "nnunet_residual", target_class=0).spec
    assert (spec.output_activation, spec.target_class) == ("sigmoid", 0)


@pytest.mark.parametrize(
    "options", [{"strides": (2, 2)}, {"norm": "batch"}, {"patch_merging": "merging"}, {"remat": True}]
)
def test_an_nnunets_plans_tell_its_network(options):
    (name,) = options
    assert f"leave out --{name.replace('_', '-')}" in refusal(FIXTURES / "nnunet_plain", **options)


def test_channels_of_an_nnunet_may_be_renamed():
    assert convert(FIXTURES / "nnunet_plain", ["FLAIR", "MPRAGE"]).spec.channels == ("FLAIR", "MPRAGE")
    assert "2 input channels, --channels names 1" in refusal(FIXTURES / "nnunet_plain", ["FLAIR"])
    assert "in the order FLAIR, T1w; --channels only renames" in refusal(FIXTURES / "nnunet_plain", ["T1w", "FLAIR"])
    assert "leave out --orientation" in refusal(FIXTURES / "nnunet_plain", orientation="LAS")


def test_a_plan_that_is_edited_by_hand_is_checked(tmp_path, capsys):
    folder = save_model(tmp_path / "m", convert(FIXTURES / "nnunet_plain", folds=["0"]))
    content = json.loads((folder / "model.json").read_text())
    content["preprocessing"]["spacing"] = [1, 1]
    content["preprocessing"]["normalisation"] = ["Histogram", "NoNormalization"]
    (folder / "model.json").write_text(json.dumps(content))
    assert main(["inspect", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.json" in line
    assert "normalisation" in line
