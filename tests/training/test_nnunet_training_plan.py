"""What training takes from a plans.json, of today and of older nnU-Nets, and what is refused; recipe beside closed forms."""

import doctest
import json
import sys
from copy import deepcopy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from training.losses import supervision_weights
from training.nnunet_plan import Recipe, read_plan, training_plan
from xaiseg.errors import InputError
from xaiseg.models.nnunet import PlainConvUNet

FIXTURES = Path(__file__).parents[1] / "fixtures"
STORED = {given["name"]: given["plans"] for given in json.loads((FIXTURES / "nnunet_plans.json").read_text())}


@pytest.fixture
def plans() -> dict:
    return deepcopy(STORED["large"])


def test_what_nnunet_planned_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(STORED["thick slices ResEncM"]))
    plan = read_plan(path)
    assert plan == training_plan(STORED["thick slices ResEncM"])
    assert (plan.configuration, plan.patch_size, plan.batch_size) == ("3d_fullres", (32, 224, 192), 2)
    assert plan.spacing == pytest.approx((2.4, 0.5, 0.5))
    assert (plan.architecture, plan.network_class_name) == ("residual_encoder_unet", "ResidualEncoderUNet")
    assert plan.options["blocks"] == [1, 3, 4, 6, 6, 6]
    assert plan.options["kernel_sizes"][:3] == [[1, 3, 3], [1, 3, 3], [3, 3, 3]]
    assert plan.normalisation == ("ZScoreNormalization",) * 2
    assert plan.preprocessing.use_mask_for_norm == (True, True)
    assert plan.preprocessing.orientation == "native"
    assert (plan.batch_dice, plan.lowres) == (False, False)
    assert plan.recipe == Recipe()


def test_low_resolution_is_told(plans: dict) -> None:
    plan = training_plan(plans)
    assert (plan.lowres, plan.batch_dice) == (True, True)
    lowres = training_plan(plans, "3d_lowres")
    assert (lowres.batch_dice, lowres.spacing[0] > plan.spacing[0]) == (False, True)


def test_what_is_inherited_counts(plans: dict) -> None:
    plans["configurations"]["3d_more"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    plan = training_plan(plans, "3d_more")
    assert (plan.batch_size, plan.batch_dice) == (7, True)
    assert plan.patch_size == training_plan(plans).patch_size


def test_plans_of_older_nnunets(plans: dict) -> None:
    """Those up to 2.3 describe the network in the configuration itself."""
    content = plans["configurations"]["3d_fullres"]
    kwargs = content.pop("architecture")["arch_kwargs"]
    content |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 32,
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
        "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
        "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }
    assert training_plan(plans) == training_plan(STORED["large"])


def test_the_network_takes_the_patch_and_has_a_head_for_each_weight() -> None:
    plan = training_plan(STORED["tiny"])
    net = PlainConvUNet(**plan.options, out_channels=2)
    patch = jnp.zeros((1, *plan.patch_size, plan.preprocessing.channels))
    variables = jax.eval_shape(lambda x: net.init(jax.random.key(0), x), patch)
    logits, taps = jax.eval_shape(net.apply, variables, patch)
    assert logits.shape == (1, *plan.patch_size, 2)
    heads = ["logits", *sorted(name for name in taps if name.startswith("head"))]
    sizes = [taps[name].size for name in heads]
    assert sizes == sorted(sizes, reverse=True)
    assert len(heads) == len(plan.deep_supervision_weights)


def test_deep_supervision_weights() -> None:
    assert supervision_weights(4) == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15, 0))
    assert (supervision_weights(1), supervision_weights(0)) == ((1, 0), (1,))


def test_recipe() -> None:
    """The rate is that of one epoch; a third of a batch looks at lesions, of 2 patches one."""
    recipe = Recipe()
    rates = [recipe.learning_rate_at(epoch) for epoch in (0, 500, 1000)]
    assert rates == pytest.approx([0.01, 0.01 * 2**-0.9, 0])
    assert [recipe.foreground_patches(n) for n in (1, 2, 3, 4, 6, 9, 100)] == [0, 1, 1, 1, 2, 3, 33]


def set_in(plans: dict, name: str, value: object) -> None:
    *path, last = name.split("/")
    place = plans["configurations"]["3d_fullres"]
    for key in path:
        place = place[key]
    place[last] = value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 0, "batch_size is 0 in configuration '3d_fullres', expected"),
        ("batch_dice", None, "batch_dice is None in configuration '3d_fullres', expected true or false"),
        ("architecture/network_class_name", "a.SwinUNETR", "the network is 'a.SwinUNETR'; only PlainConvUNet and"),
        ("patch_size", [128, 130, 112], "configuration '3d_fullres': a grid of"),
        ("normalization_schemes", ["Other", "Other"], "normalisation: .*Other"),
        ("preprocessor_name", "Mine", "preprocessor_name is 'Mine'"),
    ],
)
def test_a_plan_that_cannot_be_trained_is_refused(plans: dict, name: str, value: object, message: str) -> None:
    set_in(plans, name, value)
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        training_plan(plans, source="here")


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ("3d", r"no configuration '3d' \(there: '2d', '3d_lowres', '3d_fullres', '3d_cascade_fullres'\)"),
        ("2d", r"configuration '2d' is 2-D, its patches \[384, 320\]; .*take 3d_fullres"),
        ("3d_cascade_fullres", "is the second stage of a cascade, after '3d_lowres'"),
    ],
)
def test_configurations_that_are_not_trained_here(plans: dict, configuration: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        training_plan(plans, configuration)


@pytest.mark.parametrize("text", ["{'a': 1}", "[1]", None, "{}"])
def test_what_is_no_plan_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"plans\.json: .*(give nnU-Net's|take the) plans\.json"):
        read_plan(path)


def test_the_example() -> None:
    result = doctest.testmod(sys.modules["training.losses"])
    assert result.attempted > 0
    assert result.failed == 0
