"""nnU-Net's result folders: every tensor becomes one variable, and what is missing, mixed up or unknown is said in one line."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_torch_file import Call, Stored, write

from xaiseg.checkpoints import nnunet
from xaiseg.checkpoints.nnunet_training import read_dataset
from xaiseg.checkpoints.torch_file import read_checkpoint
from xaiseg.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures"
PLAIN = FIXTURES / "nnunet_plain"


@pytest.fixture
def folder(tmp_path):
    """A copy of a result folder with two folds."""
    return Path(shutil.copytree(PLAIN, tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"))


@pytest.fixture(scope="module")
def content():
    return read_checkpoint(PLAIN / "fold_0" / "checkpoint_final.pth")


def save(path, content, **changes):
    """As `torch.save`, the entries in `changes` replaced, or removed where they are None."""

    def stored(value):
        if isinstance(value, np.ndarray):
            storage = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float64): "DoubleStorage"}[value.dtype]
            return Stored(value, storage)
        if isinstance(value, dict):
            return {k: stored(v) for k, v in value.items()}
        return [stored(v) for v in value] if isinstance(value, list) else value

    path.parent.mkdir(exist_ok=True)
    return write(path, stored({k: v for k, v in {**content, **changes}.items() if v is not None}))


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def refusal(path, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        nnunet.read(path, *args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_is_read_of_a_folder():
    reading = nnunet.read(PLAIN)
    assert reading.architecture == "plain_conv_unet"
    assert reading.options["out_channels"] == 2
    assert reading.channels == ("FLAIR", "T1w")
    assert (reading.window, reading.mirror_axes) == ((4, 8, 12), (0, 1, 2))
    assert (reading.classes, reading.regions, reading.target_class) == (("background", "lesion"), False, 1)
    assert list(reading.members) == ["fold_0", "fold_1"]
    assert reading.default_layer == "decoder1.up"
    assert reading.notes == {
        "trainer": "nnUNetTrainer",
        "configuration": "3d_fullres",
        "plans": "nnUNetPlans",
        "dataset": "Dataset501_Lesions",
        "checkpoint": "checkpoint_final.pth",
        "epochs": {"fold_0": 1, "fold_1": 1},
    }
    names = ["plans.json", "dataset.json", *(f"fold_{k}/checkpoint_final.pth" for k in (0, 1))]
    assert reading.source_files == tuple(PLAIN / name for name in names)
    json.dumps([reading.options, reading.preprocessing, reading.notes])
    leaves = jax.tree.leaves(reading.members)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, reading.members.values()), strict=True))


def test_a_residual_encoder_with_regions():
    reading = nnunet.read(FIXTURES / "nnunet_residual")
    assert reading.architecture == "residual_encoder_unet"
    assert (reading.options["stem_features"], reading.options["blocks"]) == (2, [1, 2, 2])
    assert (reading.classes, reading.regions, reading.target_class) == (("whole", "core"), True, None)
    assert list(reading.members) == ["fold_all"]
    assert reading.preprocessing["transpose_forward"] == [2, 0, 1]


def test_a_two_dimensional_network_with_old_plans_and_batch_norm():
    """Slices lie along the window's first axis, so that the mirror axes 0 and 1 become 1 and 2. Classes are ordered by label."""
    reading = nnunet.read(FIXTURES / "nnunet_old_2d")
    assert (reading.window, reading.mirror_axes) == ((1, 8, 12), (1, 2))
    assert (reading.options["norm"], reading.options["ndim"]) == ("batch", 2)
    assert reading.classes == ("background", "lesion", "edema")
    assert reading.target_class is None
    assert set(reading.members["fold_3"]) == {"params", "batch_stats"}


@pytest.mark.parametrize("name", ["plain", "residual", "old_2d"])
def test_every_tensor_becomes_one_variable(tmp_path, name):
    """Each tensor is filled with its own number: a bijection leaves each number in exactly one variable, of the same size."""
    folder = Path(shutil.copytree(FIXTURES / f"nnunet_{name}", tmp_path / "copy"))
    file = min(folder.glob("fold_*/checkpoint_final.pth"))
    stored = read_checkpoint(file)
    weights = {
        k: v
        for k, v in stored["network_weights"].items()
        if "all_modules" not in k and "decoder.encoder" not in k and "num_batches" not in k
    }
    save(file, stored, network_weights={k: np.full_like(v, i) for i, (k, v) in enumerate(weights.items())})
    leaves = jax.tree.leaves(nnunet.read(file).members)
    found = {int(leaf.flat[0]): leaf.size for leaf in leaves if (leaf == leaf.flat[0]).all()}
    assert len(leaves) == len(weights)
    assert found == {i: v.size for i, v in enumerate(weights.values())}


@pytest.mark.parametrize(
    ("place", "recognised"),
    [
        ("", True),
        ("fold_0", True),
        ("fold_1/checkpoint_final.pth", True),
        ("fold_1/checkpoint_latest.pth", True),
        ("plans.json", False),
        ("absent", False),
    ],
)
def test_recognise(folder, place, recognised):
    assert nnunet.recognise(folder / place) is recognised


@pytest.mark.parametrize("kept", ["plans.json", "dataset.json", "fold_0"])
def test_incomplete_folders_are_recognised(folder, kept):
    for path in folder.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert nnunet.recognise(folder)


def test_other_folders_are_not_recognised(tmp_path):
    assert not nnunet.recognise(tmp_path)
    (tmp_path / "checkpoint_final.pth").touch()
    assert not nnunet.recognise(tmp_path / "checkpoint_final.pth")
    assert not nnunet.recognise(FIXTURES / "unet_2d.pth")


def test_one_fold_of_several(folder, monkeypatch):
    whole = nnunet.read(folder)
    for reading in (
        nnunet.read(folder, ["1"]),
        nnunet.read(folder, ["fold_1"]),
        nnunet.read(folder / "fold_1"),
        nnunet.read(folder / "fold_1" / "checkpoint_final.pth"),
        nnunet.read(folder / "fold_1", ["1"]),
    ):
        assert list(reading.members) == ["fold_1"]
        same(reading.members["fold_1"], whole.members["fold_1"])
        assert len(reading.source_files) == 3
    assert list(nnunet.read(folder, ["1", "0"]).members) == ["fold_0", "fold_1"]
    monkeypatch.chdir(folder / "fold_1")
    assert list(nnunet.read(Path("checkpoint_final.pth")).members) == ["fold_1"]
    monkeypatch.chdir(folder)
    assert list(nnunet.read("fold_1").members) == ["fold_1"]


def test_folds_are_ordered_by_number_and_fold_all_counts_only_alone(folder):
    for name in ("fold_10", "fold_all"):
        shutil.copytree(folder / "fold_0", folder / name)
    assert list(nnunet.read(folder).members) == ["fold_0", "fold_1", "fold_10"]
    assert list(nnunet.read(folder, ["all"]).members) == ["fold_all"]


def test_best_beside_final(folder):
    (folder / "fold_1" / "checkpoint_final.pth").rename(folder / "fold_1" / "checkpoint_best.pth")
    assert list(nnunet.read(folder).members) == ["fold_0"]
    best = nnunet.read(folder, checkpoint="best")
    assert list(best.members) == ["fold_1"]
    assert best.notes["checkpoint"] == "checkpoint_best.pth"
    assert list(nnunet.read(folder / "fold_1" / "checkpoint_best.pth").members) == ["fold_1"]
    text = refusal(folder, ["0", "1"])
    assert "lacks fold_1 with checkpoint_final.pth; there is " in text
    assert "checkpoint_final.pth in fold_0; checkpoint_best.pth in fold_1; choose from those" in text


def test_folds_and_checkpoints_that_are_not_there(folder):
    assert (
        "lacks fold_3, fold_4 with checkpoint_final.pth; there is checkpoint_final.pth in fold_0, fold_1;"
        in refusal(folder, ["0", "3", "4"])
    )
    assert "is fold_1, but folds 0 are asked for" in refusal(folder / "fold_1", ["0"])
    assert "checkpoint 'latest'; only final and best" in refusal(folder / "fold_1" / "checkpoint_latest.pth")
    assert "checkpoint 'latest'; only final and best" in refusal(folder, checkpoint="latest")
    assert "lacks any checkpoint_best.pth; there is checkpoint_final.pth in fold_0, fold_1" in refusal(
        folder, checkpoint="best"
    )
    for fold in ("fold_0", "fold_1"):
        shutil.rmtree(folder / fold)
    assert "lacks any checkpoint_final.pth; there is none" in refusal(folder)
    assert "no such folder" in refusal(folder / "absent")


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_json_files_that_cannot_be_read(folder, name):
    (folder / name).write_text("[1]")
    assert f"{folder / name}: holds no JSON object" in refusal(folder)
    (folder / name).write_text('{"a": ')
    assert f"{folder / name}: not JSON" in refusal(folder)
    (folder / name).write_bytes(b"\xff")
    assert f"{folder / name}: not JSON" in refusal(folder)
    (folder / name).unlink()
    assert f"{folder / name}: no such file" in refusal(folder)


def test_a_truncated_checkpoint(folder):
    file = folder / "fold_1" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:20000])
    text = refusal(folder)
    assert text.startswith(str(file))
    assert "cut off" in text


@pytest.mark.parametrize("place", ["network_weights", "logging", "trainer_name"])
def test_a_pickle_that_asks_for_code_is_refused_unrun(folder, content, place):
    touched = folder / "touched"
    file = folder / "fold_0" / "checkpoint_final.pth"
    save(file, content, **{place: Call("posix", "system", f"touch {touched}")})
    assert "asks for posix.system" in refusal(folder)
    assert not touched.exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes(folder, content, prefix):
    weights = {prefix + k: v for k, v in content["network_weights"].items()}
    save(folder / "fold_0" / "checkpoint_final.pth", content, network_weights=weights)
    same(nnunet.read(folder).members, nnunet.read(PLAIN).members)
    weights["encoder.stages.0.0.convs.0.conv.bias"] = weights.pop(f"{prefix}encoder.stages.0.0.convs.0.conv.bias")
    save(folder / "fold_0" / "checkpoint_final.pth", content, network_weights=weights)
    assert "mixed prefixes" in refusal(folder)


@pytest.mark.parametrize(
    "alias",
    [
        "encoder.stages.1.0.convs.1.all_modules.0.weight",
        "encoder.stages.1.0.convs.1.all_modules.1.weight",
        "decoder.encoder.stages.1.0.convs.1.norm.bias",
        "decoder.encoder.stages.1.0.convs.1.all_modules.1.bias",
        "decoder.stages.1.convs.0.all_modules.0.bias",
    ],
)
def test_copies_of_a_tensor_must_be_equal(folder, content, alias):
    weights = content["network_weights"]
    save(folder / "fold_0" / "checkpoint_final.pth", content, network_weights={**weights, alias: weights[alias] + 1})
    text = refusal(folder)
    assert alias in text
    assert "are one tensor of the network but differ" in text


@pytest.mark.parametrize(
    "key",
    [
        "encoder.stages.0.0.convs.0.conv.weight",
        "encoder.stages.1.0.convs.1.norm.bias",
        "decoder.stages.0.convs.1.conv.weight",
        "decoder.transpconvs.1.bias",
        "decoder.seg_layers.0.weight",
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_named(folder, content, key):
    file = folder / "fold_1" / "checkpoint_final.pth"
    weights = {k: v for k, v in content["network_weights"].items() if "modules" not in k and ".encoder" not in k}
    save(file, content, network_weights={k: v for k, v in weights.items() if k != key})
    text = refusal(folder)
    assert text.startswith(f"{file}: does not fit the planned plain_conv_unet: missing {key}")
    assert "unknown" not in text
    save(file, content, network_weights={**weights, "encoder.more": weights[key], key: weights[key][..., None]})
    assert f"unknown encoder.more; {key} has shape" in refusal(folder)


def test_values_that_are_not_finite(folder, content):
    weights = {k: v for k, v in content["network_weights"].items() if "modules" not in k and ".encoder" not in k}
    weights["decoder.transpconvs.1.bias"] = np.full(3, np.nan, np.float32)
    save(folder / "fold_0" / "checkpoint_final.pth", content, network_weights=weights)
    assert "decoder.transpconvs.1.bias holds NaN or infinite values" in refusal(folder)


def test_files_of_other_programs(folder, content):
    file = folder / "fold_0" / "checkpoint_final.pth"
    save(file, {"state_dict": content["network_weights"]})
    assert "not an nnU-Net v2 checkpoint, it holds no network_weights" in refusal(folder)


def test_trainers(folder, content):
    for fold in ("fold_0", "fold_1"):
        save(folder / fold / "checkpoint_final.pth", content, trainer_name="nnUNetTrainer_MyLoss")
    text = refusal(folder)
    assert "trained by 'nnUNetTrainer_MyLoss', which is not one of nnU-Net's own" in text
    assert "--any-trainer" in text
    assert nnunet.read(folder, any_trainer=True).notes["trainer"] == "nnUNetTrainer_MyLoss"
    save(folder / "fold_0" / "checkpoint_final.pth", content, trainer_name="nnUNet_Primus_M_Trainer")
    assert "trained by 'nnUNet_Primus_M_Trainer'" in refusal(folder, ["0"])


def test_batch_norm_of_a_trainer_that_does_not_say_so(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "nnunet_old_2d", tmp_path / "copy"))
    file = folder / "fold_3" / "checkpoint_final.pth"
    stored = read_checkpoint(file)
    weights = {k: v for k, v in stored["network_weights"].items() if "num_batches" not in k}
    save(file, stored, network_weights=weights, trainer_name="Mine")
    same(nnunet.read(folder, any_trainer=True).members, nnunet.read(FIXTURES / "nnunet_old_2d").members)
    save(file, stored, network_weights=weights, trainer_name="nnUNetTrainer")
    assert "unknown encoder.stages.0.0.convs.0.norm.running_mean" in refusal(folder)


def test_names_come_from_the_folder_where_the_checkpoint_has_none(folder, content):
    for fold in ("fold_0", "fold_1"):
        save(folder / fold / "checkpoint_final.pth", content, trainer_name=None, init_args=None)
    notes = nnunet.read(folder).notes
    assert (notes["trainer"], notes["configuration"]) == ("nnUNetTrainer", "3d_fullres")
    other = folder.rename(folder.with_name("results"))
    assert "names no trainer and configuration" in refusal(other)


def test_mirroring(folder, content):
    for axes, expected in (((2, 0), (0, 2)), ((), ()), (None, ())):
        for fold in ("fold_0", "fold_1"):
            save(folder / fold / "checkpoint_final.pth", content, inference_allowed_mirroring_axes=axes)
        assert nnunet.read(folder).mirror_axes == expected
    save(folder / "fold_1" / "checkpoint_final.pth", content)
    assert "mirroring is (0, 1, 2), but () in fold_0; the folds are not of one training" in refusal(folder)
    save(folder / "fold_0" / "checkpoint_final.pth", content, inference_allowed_mirroring_axes=(0, 3))
    assert "mirrors along axes (0, 3) of a 3-D patch" in refusal(folder)
    save(folder / "fold_0" / "checkpoint_final.pth", content, inference_allowed_mirroring_axes="all")
    assert "inference_allowed_mirroring_axes is 'all'" in refusal(folder)


def test_folds_of_different_trainings(folder, content):
    file = folder / "fold_1" / "checkpoint_final.pth"
    save(file, content, trainer_name="nnUNetTrainerDA5")
    assert f"{file}: trainer is 'nnUNetTrainerDA5', but 'nnUNetTrainer' in fold_0" in refusal(folder)
    save(file, content, init_args=content["init_args"] | {"configuration": "2d"})
    assert "configuration is '2d', but '3d_fullres' in fold_0" in refusal(folder)


def test_plans_and_dataset_of_another_training(folder):
    configurations = json.loads((folder / "plans.json").read_text())["configurations"]
    configurations["3d_fullres"]["spacing"] = [1.0, 1.0, 1.0]
    edit(folder / "plans.json", configurations=configurations)
    assert "fold_0/checkpoint_final.pth: spacing is [3.0, 1.0, 1.0] against [1.0, 1.0, 1.0] in plans.json" in refusal(
        folder
    )
    shutil.copy(PLAIN / "plans.json", folder)
    edit(folder / "dataset.json", channel_names={"0": "T1w", "1": "FLAIR"})
    assert "channels is ('FLAIR', 'T1w'), but ('T1w', 'FLAIR') in dataset.json" in refusal(folder)
    shutil.copy(PLAIN / "dataset.json", folder)
    edit(folder / "dataset.json", labels={"background": 0, "lesion": 1, "edema": 2})
    assert "classes is ('background', 'lesion'), but ('background', 'lesion', 'edema')" in refusal(folder)


def test_batch_sizes_and_fold_names_may_differ(folder):
    configurations = json.loads((folder / "plans.json").read_text())["configurations"]
    configurations["3d_fullres"]["batch_size"] = 7
    edit(folder / "plans.json", configurations=configurations, plans_name="renamed")
    same(nnunet.read(folder).members, nnunet.read(PLAIN).members)


def test_channels_that_disagree(folder, content):
    edit(folder / "dataset.json", channel_names={"0": "FLAIR"})
    assert "names 1 channels, plans.json normalises 2" in refusal(folder)
    edit(folder / "dataset.json", channel_names=None, modality={"1": "T1w", "0": "FLAIR"})
    assert nnunet.read(folder).channels == ("FLAIR", "T1w")
    edit(folder / "dataset.json", modality={"1": "T1w", "2": "FLAIR"})
    assert "channel_names is {'1': 'T1w', '2': 'FLAIR'}, expected names for 0, 1" in refusal(folder)

    shutil.copy(PLAIN / "dataset.json", folder)
    weights = {k: v for k, v in content["network_weights"].items() if "modules" not in k and ".encoder" not in k}
    first, head = "encoder.stages.0.0.convs.0.conv.weight", "decoder.seg_layers.1.weight"
    file = folder / "fold_0" / "checkpoint_final.pth"
    save(file, content, network_weights={**weights, first: weights[first][:, :1]})
    assert "the network has 1 input channels, dataset.json 2" in refusal(folder)
    save(file, content, network_weights={**weights, head: np.repeat(weights[head], 2, 0)})
    text = refusal(folder)
    assert "decoder.seg_layers.1.weight has shape (4, 3, 1, 1, 1), expected (2, 3, 1, 1, 1)" in text


@pytest.mark.parametrize(
    ("labels", "order", "classes", "regions", "target"),
    [
        ({"background": 0, "lesion": 1, "ignore": 2}, None, ("background", "lesion"), False, 1),
        ({"b": 2, "background": [0], "a": [1]}, None, ("background", "a", "b"), False, None),
        ({"background": 0, "lesion": [1, 2]}, [1], ("lesion",), True, 0),
        ({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2], ("whole", "core"), True, None),
    ],
)
def test_labels_and_regions(labels, order, classes, regions, target):
    content = {"channel_names": {"0": "FLAIR"}, "labels": labels, "regions_class_order": order}
    dataset = read_dataset(content, "dataset.json")
    assert dataset == (("FLAIR",), classes, regions)
    assert dataset.target_class == target


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        (None, None, "labels is None"),
        ({"lesion": 1}, None, "expected whole numbers with background 0"),
        ({"background": 1, "lesion": 0}, None, "expected whole numbers with background 0"),
        ({"background": 0, "lesion": "1"}, None, "expected whole numbers with background 0"),
        ({"background": 0, "lesion": [1, 2]}, None, "regions_class_order is None for 1 regions"),
        ({"background": 0, "lesion": [1, 2]}, [1, 2], "regions_class_order is [1, 2] for 1 regions"),
    ],
)
def test_labels_that_cannot_be_nnunets(labels, order, message):
    content = {"channel_names": {"0": "FLAIR"}, "labels": labels, "regions_class_order": order}
    with pytest.raises(InputError, match=r"^dataset\.json: ") as caught:
        read_dataset(content, "dataset.json")
    assert message in str(caught.value)


def test_a_cascade_is_refused(folder):
    configurations = json.loads((folder / "plans.json").read_text())["configurations"]
    configurations["3d_fullres"]["previous_stage"] = "3d_lowres"
    edit(folder / "plans.json", configurations=configurations)
    assert f"{folder / 'plans.json'}: configuration '3d_fullres' is the second stage of a cascade" in refusal(folder)
