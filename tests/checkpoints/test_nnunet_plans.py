"""What is read off nnU-Net's plans, new and old, and what is refused; files as nnunetv2's planners write them."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from xaiseg.checkpoints.nnunet_plans import difference, read_plan
from xaiseg.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures"


def load(name):
    return json.loads((FIXTURES / f"nnunet_{name}" / "plans.json").read_text())


@pytest.fixture
def plans():
    return load("plain")


def kwargs_of(plans):
    return plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]


def read(plans, configuration="3d_fullres", **dataset):
    return read_plan(plans, configuration, dataset, "plans.json")


def refusal(plans, configuration="3d_fullres"):
    with pytest.raises(InputError) as caught:
        read(plans, configuration)
    text = str(caught.value)
    assert text.startswith("plans.json: ")
    assert "\n" not in text
    return text


def test_the_network_as_planned_today(plans):
    plan = read(plans)
    assert plan.architecture == "plain_conv_unet"
    assert plan.patch_size == [4, 8, 12]
    assert plan.options == {
        "features": [3, 4, 5],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "decoder_convs": [1, 2],  # planned from the bottom up: 2, 1
        "convs": [2, 2, 1],
        "conv_bias": True,
        "norm": "instance_affine",
        "activation": "leakyrelu",
        "ndim": 3,
    }


def test_ints_stand_for_all_stages_and_axes(plans):
    plans["configurations"]["3d_fullres"]["patch_size"] = [8, 8, 8]
    kwargs_of(plans).update(
        kernel_sizes=3, strides=[1, 2, [2, 2, 1]], n_conv_per_stage=2, n_conv_per_stage_decoder=1, features_per_stage=7
    )
    options = read(plans).options
    assert options["kernel_sizes"] == [[3, 3, 3]] * 3
    assert options["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 1]]
    assert (options["convs"], options["decoder_convs"], options["features"]) == ([2, 2, 2], [1, 1], [7, 7, 7])


def test_old_plans_are_rebuilt():
    """Features double up to the maximum; norm, bias and activation were fixed then."""
    old = load("old_2d")
    plan = read(old, "2d")
    assert plan.architecture == "plain_conv_unet"
    assert plan.options == {
        "features": [3, 5, 5],
        "kernel_sizes": [[3, 3], [3, 3], [1, 3]],
        "strides": [[1, 1], [2, 2], [1, 2]],
        "decoder_convs": [2, 1],
        "convs": [2, 1, 2],
        "conv_bias": True,
        "norm": "instance_affine",
        "activation": "leakyrelu",
        "ndim": 2,
    }
    old["configurations"]["2d"]["UNet_class_name"] = "ResidualEncoderUNet"
    residual = read(old, "2d")
    assert residual.architecture == "residual_encoder_unet"
    assert residual.options["blocks"] == [2, 1, 2]
    assert "convs" not in residual.options
    old["configurations"]["2d"]["UNet_class_name"] = "VNet"
    assert "the network is 'dynamic_network_architectures.architectures.unet.VNet'; only" in refusal(old, "2d")


@pytest.mark.parametrize(
    "name",
    [
        "UNet_class_name",
        "UNet_base_num_features",
        "unet_max_num_features",
        "n_conv_per_stage_encoder",
        "n_conv_per_stage_decoder",
        "pool_op_kernel_sizes",
        "conv_kernel_sizes",
        "patch_size",
        "spacing",
        "normalization_schemes",
        "use_mask_for_norm",
        "resampling_fn_data",
        "resampling_fn_probabilities_kwargs",
    ],
)
def test_a_missing_field_is_named(name):
    old = load("old_2d")
    del old["configurations"]["2d"][name]
    assert f"{name} is missing in configuration '2d'" in refusal(old, "2d")


def test_inheritance():
    plans = load("residual")
    assert difference(read(plans, "bs4"), read(plans)) is None
    plans["configurations"]["wide"] = {"inherits_from": "bs4", "spacing": [2.0, 2.0, 2.0], "patch_size": [4, 8, 16]}
    wide = read(plans, "wide")
    assert (wide.patch_size, wide.preprocessing["spacing"]) == ([4, 8, 16], [2.0, 2.0, 2.0])
    assert wide.options == read(plans).options

    plans["configurations"]["3d_fullres"]["inherits_from"] = "wide"
    assert "inherits from itself" in refusal(plans, "wide")
    plans["configurations"]["3d_fullres"]["inherits_from"] = "absent"
    assert "no configuration 'absent' (there: '3d_fullres', 'bs4', 'wide')" in refusal(plans, "wide")
    assert "no configuration '2d' (there: " in refusal(plans, "2d")


def test_preprocessing(plans):
    own = read(plans).preprocessing
    stored = plans["foreground_intensity_properties_per_channel"]
    names = ("mean", "std", "percentile_00_5", "percentile_99_5")
    assert own == {
        "orientation": "RAS",
        "transpose_forward": [0, 1, 2],
        "spacing": [3.0, 1.0, 1.0],
        "normalisation": ["ZScoreNormalization"] * 2,
        "use_mask_for_norm": [True, True],
        "intensities": [{name: stored[c][name] for name in names} for c in ("0", "1")],
        "data_resampling": {
            "resampling_fn": "resample_data_or_seg_to_shape",
            "order": 3,
            "order_z": 0,
            "force_separate_z": None,
        },
        "probability_resampling": {
            "resampling_fn": "resample_data_or_seg_to_shape",
            "order": 1,
            "order_z": 0,
            "force_separate_z": None,
        },
    }
    assert json.loads(json.dumps(own)) == own
    # the name of the first releases
    plans["foreground_intensity_properties_by_modality"] = plans.pop("foreground_intensity_properties_per_channel")
    assert read(plans).preprocessing == own


@pytest.mark.parametrize(
    ("reader", "orientation"),
    [
        ("NibabelIOWithReorient", "RAS"),
        ("SimpleITKIOWithReorient", "RAS"),
        ("SimpleITKIO", "native"),
        ("NibabelIO", "native"),
    ],
)
def test_orientation_follows_the_reader(plans, reader, orientation):
    plans["image_reader_writer"] = reader
    assert read(plans, overwrite_image_reader_writer="Tiff3DIO").preprocessing["orientation"] == orientation
    del plans["image_reader_writer"]
    assert read(plans, overwrite_image_reader_writer=reader).preprocessing["orientation"] == orientation
    assert "images were read with None" in refusal(plans)


@pytest.mark.parametrize(
    ("norm", "kwargs", "expected"),
    [
        ("InstanceNorm3d", {"eps": 1e-05, "affine": True}, "instance_affine"),
        ("InstanceNorm3d", {"affine": False}, "instance"),
        ("InstanceNorm3d", None, "instance"),
        ("BatchNorm3d", {"eps": 1e-05, "affine": True, "momentum": 0.2}, "batch"),
        ("BatchNorm3d", None, "batch"),
        (None, None, "none"),
    ],
)
def test_norms(plans, norm, kwargs, expected):
    kwargs_of(plans).update(norm_op=norm and f"torch.nn.modules.somewhere.{norm}", norm_op_kwargs=kwargs)
    assert read(plans).options["norm"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_op_kwargs": {"eps": 1e-3, "affine": True}}, "only an eps of 1e-05"),
        ({"norm_op_kwargs": {"affine": True, "track_running_stats": True}}, "only an eps of 1e-05"),
        ({"norm_op": "torch.nn.BatchNorm3d", "norm_op_kwargs": {"affine": False}}, "only an eps of 1e-05"),
        ({"norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d"}, "norm_op is 'InstanceNorm2d'; only"),
        ({"norm_op": "torch.nn.GroupNorm"}, "norm_op is 'GroupNorm'; only"),
        ({"nonlin": "torch.nn.PReLU"}, "nonlin is 'torch.nn.PReLU'"),
        ({"nonlin": None}, "nonlin is None"),
        ({"nonlin_kwargs": {"negative_slope": 0.2}}, "{'negative_slope': 0.2}; only LeakyReLU, ReLU, GELU, SiLU"),
        ({"nonlin_first": True}, "nonlin_first True; only False"),
        ({"block": "dynamic_network_architectures.building_blocks.residual.BottleneckD"}, "only BasicBlockD"),
        ({"bottleneck_channels": [2, 2, 2]}, "bottleneck_channels [2, 2, 2]; only None"),
        ({"squeeze_excitation": True}, "squeeze_excitation True, which PlainConvUNet is not known to have"),
        ({"stem_channels": 4}, "stem_channels 4, which PlainConvUNet is not known to have"),
        (
            {"conv_op": "torch.nn.modules.conv.Conv2d"},
            "conv_op is 'torch.nn.modules.conv.Conv2d' for a patch_size of 3",
        ),
        ({"n_stages": "3"}, "n_stages is '3'"),
        ({"n_stages": 4}, "features_per_stage is [3, 4, 5], expected 4 whole numbers"),
        ({"strides": [[1, 1], [2, 2], [2, 2]]}, "strides is [[1, 1], [2, 2], [2, 2]], expected 3 times 3"),
        (
            {"strides": [[1, 1, 1], [2, 2, 2], [4, 2, 2]]},
            "a grid of (4, 8, 12) does not fit: sides must be multiples of",
        ),
        ({"kernel_sizes": [[2, 3, 3], 3, 3]}, "each must be odd"),
    ],
)
def test_networks_that_are_not_known(plans, changes, message):
    kwargs_of(plans).update(changes)
    assert message in refusal(plans)


@pytest.mark.parametrize(
    ("nonlin", "kwargs", "expected"),
    [
        ("LeakyReLU", {"inplace": True, "negative_slope": 0.01}, "leakyrelu"),
        ("ReLU", {"inplace": True}, "relu"),
        ("GELU", None, "gelu"),
        ("SiLU", {}, "swish"),
    ],
)
def test_activations(plans, nonlin, kwargs, expected):
    kwargs_of(plans).update(nonlin=f"torch.nn.{nonlin}", nonlin_kwargs=kwargs)
    assert read(plans).options["activation"] == expected


def test_dropout_does_nothing_in_inference(plans):
    before = read(plans)
    kwargs_of(plans).update(dropout_op="torch.nn.Dropout3d", dropout_op_kwargs={"p": 0.5}, deep_supervision=True)
    assert difference(before, read(plans)) is None


def test_convolutions_have_a_bias_only_where_planned(plans):
    kwargs_of(plans)["conv_bias"] = False
    assert read(plans).options["conv_bias"] is False
    del kwargs_of(plans)["conv_bias"]
    assert read(plans).options["conv_bias"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous_stage": "3d_lowres"}, "second stage of a cascade, after '3d_lowres'"),
        ({"preprocessor_name": "MyPreprocessor"}, "preprocessor_name is 'MyPreprocessor'"),
        ({"patch_size": [4, 8, "12"]}, "patch_size is [4, 8, '12']"),
        ({"patch_size": 96}, "patch_size is 96"),
        ({"normalization_schemes": ["ZScoreNormalization", "MyNorm"]}, "MyNorm"),
        ({"resampling_fn_data": "resample_torch_fornnunet"}, "resample_torch_fornnunet"),
        ({"resampling_fn_data_kwargs": 3}, "resampling_fn_data_kwargs is 3, expected an object"),
        ({"architecture": None}, "architecture is None"),
        (
            {"architecture": {"network_class_name": "dynamic_network_architectures.Primus", "arch_kwargs": {}}},
            "Primus'; only",
        ),
        (
            {"architecture": {"network_class_name": "mine.PlainConvUNet", "arch_kwargs": {}}},
            "'mine.PlainConvUNet'; only",
        ),
    ],
)
def test_configurations_that_cannot_be_run_here(plans, change, message):
    plans["configurations"]["3d_fullres"].update(change)
    assert message in refusal(plans)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_manager": "MyLabels"}, "label_manager is 'MyLabels'"),
        ({"image_reader_writer": "Tiff3DIO"}, "images were read with 'Tiff3DIO'; only with"),
        ({"image_reader_writer": ["NibabelIO"]}, "images were read with ['NibabelIO']; only with"),
        ({"transpose_forward": [0, 1, 1]}, "transpose_forward"),
        ({"foreground_intensity_properties_per_channel": None}, "foreground_intensity_properties_per_channel is None"),
        ({"configurations": None}, "no configuration '3d_fullres' (there: none)"),
    ],
)
def test_plans_that_cannot_be_run_here(plans, change, message):
    plans.update(change)
    assert message in refusal(plans)


def test_the_first_difference_is_named(plans):
    plan, other = read(plans), deepcopy(plans)
    assert difference(plan, plan) is None
    other["configurations"]["3d_fullres"]["patch_size"] = [4, 8, 8]
    assert difference(plan, read(other)) == "patch_size is [4, 8, 12] against [4, 8, 8]"
    other = deepcopy(plans)
    other["transpose_forward"] = [1, 0, 2]
    assert difference(read(other), plan) == "transpose_forward is [1, 0, 2] against [0, 1, 2]"
    other = deepcopy(plans)
    kwargs_of(other)["n_conv_per_stage"] = [2, 2, 2]
    assert difference(plan, read(other)) == "convs is [2, 2, 1] against [2, 2, 2]"
