"""nnU-Net's plans: beside stored ones of nnunetv2 (tests/parity/test_nnunet_planner_live.py makes them), and rule by rule."""

import doctest
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from training.fingerprint import STATISTICS, Fingerprint
from training.nnunet_planner import PLANNERS, make_plans, target_spacing
from training.nnunet_topology import feature_map_size, topology
from xaiseg.errors import InputError
from xaiseg.models.layers import Conv, ConvTranspose
from xaiseg.models.nnunet import PlainConvUNet, ResidualBlock, ResidualEncoderUNet

STORED = json.loads((Path(__file__).parents[1] / "fixtures" / "nnunet_plans.json").read_text())
BY_NAME = {given["name"]: given for given in STORED}
INTENSITIES = (dict.fromkeys(STATISTICS, 1.0),) * 2


def plans_of(given: dict) -> dict:
    found = Fingerprint.from_dict(given["fingerprint"], "fixture")
    return make_plans(found, given["channel_names"], classes=given["classes"], planner=given["planner"])


def fingerprint(spacings, shape=(120, 130, 140), relative=0.5, cases=0) -> Fingerprint:
    spacings = spacings * (cases or 1)
    return Fingerprint(tuple(spacings), (shape,) * len(spacings), INTENSITIES, relative)


def fullres(found: Fingerprint, **options) -> dict:
    return make_plans(found, ("FLAIR", "T1w"), **options)["configurations"]["3d_fullres"]


@pytest.mark.parametrize("name", BY_NAME)
def test_as_nnunet(name: str) -> None:
    """Every entry of plans.json, floats to their last digit, and the order of configurations."""
    found, expected = plans_of(BY_NAME[name]), BY_NAME[name]["plans"]
    assert found == expected
    assert list(found["configurations"]) == list(expected["configurations"])


def test_the_stored_plans_hold_what_there_is_to_find() -> None:
    configurations = [given["plans"]["configurations"] for given in STORED]
    assert {given["planner"] for given in STORED} == set(PLANNERS)
    assert {"3d_lowres" in c for c in configurations} == {True, False}
    assert {c["3d_fullres"]["use_mask_for_norm"][-1] for c in configurations} == {True, False}
    assert len({tuple(given["plans"]["transpose_forward"]) for given in STORED}) == 3
    assert len({c["3d_fullres"]["batch_size"] for c in configurations}) > 1
    assert [1, 3, 3] in [c["3d_fullres"]["architecture"]["arch_kwargs"]["kernel_sizes"][0] for c in configurations]


def test_target_spacing() -> None:
    """The median; on an axis coarse in millimetres and in voxels, the 10th percentile, but coarser than the others."""
    thick = [(float(z), 1.0, 1.0) for z in range(2, 13)]  # median 7, 10th percentile 3
    flat, tall = (30, 200, 200), (100, 200, 200)
    assert target_spacing(fingerprint(thick, flat)).tolist() == [3, 1, 1]
    assert target_spacing(fingerprint(thick, tall)).tolist() == [7, 1, 1]
    assert target_spacing(fingerprint([(3.0, 1.0, 1.0)] * 3 + [(2.0, 1.0, 1.0)], flat)).tolist() == [3, 1, 1]
    assert target_spacing(fingerprint([(0.5, 1.0, 1.0)] * 2 + [(6.0, 1.0, 1.0)] * 5, flat)).tolist() == [1.00001, 1, 1]


@pytest.mark.parametrize(("relative", "masked"), [(0.7499, True), (0.75, False)])
def test_normalisation(relative: float, masked: bool) -> None:
    plan = make_plans(fingerprint([(1.0,) * 3], relative=relative), ("ct", "T1w"))["configurations"]["3d_fullres"]
    assert plan["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
    assert plan["use_mask_for_norm"] == [False, masked]


def test_batches_hold_at_most_a_twentieth_of_the_voxels_and_two_patches_at_least() -> None:
    """The patch is the image: of n cases, n / 20 fit, half of one is rounded to the even number."""
    sizes = {n: fullres(fingerprint([(1.0,) * 3], (32, 32, 32), cases=n))["batch_size"] for n in (1, 40, 59, 60, 100)}
    assert sizes == {1: 2, 40: 2, 59: 3, 60: 3, 100: 5}
    without_limit = fullres(fingerprint([(1.0,) * 3], (32, 32, 32), cases=100), planner="nnUNetPlannerResEncM")
    assert without_limit["batch_size"] == 100


def test_a_patch_fills_the_budget_and_the_next_larger_one_would_not() -> None:
    """Images of 400^3 and a budget of 560 million elements: cubes of 128^3 take 516 million, one side more 587."""
    plan = fullres(fingerprint([(1.0,) * 3], (400, 400, 400)))
    assert plan["patch_size"] == [128, 128, 128]
    kwargs = plan["architecture"]["arch_kwargs"]
    rest = kwargs["strides"], kwargs["features_per_stage"], kwargs["n_conv_per_stage"], [2] * 5, 2, False
    assert feature_map_size((128, 128, 128), *rest) <= 560e6 < feature_map_size((128, 128, 160), *rest)


def test_the_coarsest_axis_comes_first() -> None:
    plans = make_plans(fingerprint([(1.0, 0.9, 4.0)], (200, 210, 50)), ("FLAIR", "T1w"))
    assert (plans["transpose_forward"], plans["transpose_backward"]) == ([2, 0, 1], [1, 2, 0])
    assert plans["configurations"]["3d_fullres"]["spacing"] == [4.0, 1.0, 0.9]
    assert plans["original_median_shape_after_transp"] == [50, 200, 210]


def test_low_resolution_is_planned_where_a_patch_holds_less_than_a_quarter() -> None:
    """Of 200^3 voxels a patch of 128^3 is 0.26; of 210^3, 0.23, but there half the voxels are already enough."""
    found = {n: make_plans(fingerprint([(1.0,) * 3], (n,) * 3), ("a", "b"))["configurations"] for n in (200, 210, 330)}
    assert [("3d_lowres" in found[n], found[n]["3d_fullres"]["batch_dice"]) for n in found] == [
        (False, False),
        (False, False),
        (True, True),
    ]
    lowres = found[330]["3d_lowres"]
    assert math.prod(lowres["patch_size"]) / math.prod(lowres["median_image_size_in_voxels"]) >= 0.25
    assert lowres["batch_dice"] is False
    assert found[330]["3d_cascade_fullres"] == {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}


@pytest.mark.parametrize(
    ("spacing", "sides", "strides", "kernels", "patch"),
    [
        # 40 -> 20 -> 10 -> 5; 8 -> 4
        ((1, 1, 1), (40, 40, 8), [(1, 1, 1), (2, 2, 2), (2, 2, 1), (2, 2, 1)], [(3, 3, 3)] * 4, (40, 40, 8)),
        # one axis alone is halved at 12 voxels, not at 11
        ((1, 1, 1), (7, 7, 11), [(1, 1, 1)], [(3, 3, 3)], (7, 7, 11)),
        ((1, 1, 1), (7, 7, 12), [(1, 1, 1), (1, 1, 2)], [(3, 3, 3)] * 2, (7, 7, 12)),
        # twice as coarse waits; a kernel is 1 wide until then; odd sides are rounded up
        ((2, 1, 1), (9, 17, 16), [(1, 1, 1), (1, 2, 2), (2, 2, 2)], [(1, 3, 3), (3, 3, 3), (3, 3, 3)], (10, 20, 16)),
        # a coarse axis too short to be halved: the kernel grows all the same
        ((4, 1, 1), (5, 64, 64), [(1, 1, 1)] + [(1, 2, 2)] * 4, [(1, 3, 3)] * 2 + [(3, 3, 3)] * 3, (5, 64, 64)),
    ],
)
def test_topology(spacing, sides, strides, kernels, patch) -> None:
    found = topology(spacing, sides)
    assert (list(found.strides), list(found.kernel_sizes), found.patch_size) == (strides, kernels, patch)


PLAIN = PlainConvUNet(
    features=(4, 8, 12, 12), kernel_sizes=((1, 3, 3), *((3, 3, 3),) * 3), convs=(2, 1, 3, 2), decoder_convs=(2, 3, 1),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2)), out_channels=3,
)  # fmt: skip
RESIDUAL = ResidualEncoderUNet(
    features=PLAIN.features, kernel_sizes=PLAIN.kernel_sizes, blocks=(1, 3, 2, 1), decoder_convs=(1, 2, 1),
    strides=PLAIN.strides, out_channels=3,
)  # fmt: skip


@pytest.mark.parametrize("net", [PLAIN, RESIDUAL], ids=["plain", "residual"])
def test_feature_maps_are_those_of_the_network(net: PlainConvUNet | ResidualEncoderUNet) -> None:
    """All that its convolutions return. Heads of the lower grids are left out, and a skip without a convolution counts."""
    patch = (4, 16, 24)

    def outputs(x):
        variables = net.init(jax.random.key(0), x)
        kept = net.apply(
            variables, x, mutable=["intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, Conv | ConvTranspose | ResidualBlock),
        )[1]  # fmt: skip
        return kept["intermediates"]

    shapes = jax.eval_shape(outputs, jnp.zeros((1, *patch, 2), jnp.float32))
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)][:-1]
        if names[-1].startswith("head"):
            total += leaf.size if names[-1] == "head0" else 0
        elif len(names) == 1 and "_block" in names[0]:
            total += leaf.size if names[0] == "encoder3_block0" else 0  # 12 features in, 12 out, on a coarser grid
        else:
            total += leaf.size
    residual = isinstance(net, ResidualEncoderUNet)
    encoder = net.blocks if isinstance(net, ResidualEncoderUNet) else net.convs
    found = feature_map_size(patch, net.strides, net.features, encoder, net.decoder_convs[::-1], 3, residual)
    assert found == total


def test_refusals() -> None:
    brain = fingerprint([(1.0, 1.0, 1.0)])
    with pytest.raises(
        InputError, match=r"^planner: 'best' is unknown; expected one of ExperimentPlanner, .*choose one$"
    ):
        make_plans(brain, ("FLAIR", "T1w"), planner="best")
    with pytest.raises(InputError, match=r"^channel_names: FLAIR for a fingerprint of 2 channels"):
        make_plans(brain, ("FLAIR",))
    with pytest.raises(InputError, match=r"^classes: 1; expected 2 or more"):
        make_plans(brain, ("FLAIR", "T1w"), classes=1)
    with pytest.raises(InputError, match=r"^fingerprint: images of 7 x 7 x 7 voxels of 1 x 1 x 1 mm are too small"):
        fullres(fingerprint([(1.0, 1.0, 1.0)], (7, 7, 7)))
    with pytest.raises(InputError, match=r"^fingerprint: images of 1 x 90 x 80 voxels are slices"):
        fullres(fingerprint([(999.0, 1.0, 1.0)], (1, 90, 80)))


def test_plans_are_json() -> None:
    plans = plans_of(STORED[0])
    assert json.loads(json.dumps(plans)) == plans


@pytest.mark.parametrize("module", ["nnunet_planner", "nnunet_topology"])
def test_the_examples(module: str) -> None:
    result = doctest.testmod(sys.modules[f"training.{module}"])
    assert result.attempted > 0
    assert result.failed == 0
