"""nnU-Net's networks beside nnunetv2's at full size, read from folders that its trainer saved; plans beside its own manager."""

import ast
import warnings
from copy import deepcopy
from pathlib import Path

import jax
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they deprecate while they are imported
    torch = pytest.importorskip("torch")
    pytest.importorskip("dynamic_network_architectures")
    nnunetv2 = pytest.importorskip("nnunetv2")
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from scripts.fixtures import nnunet as made

from xaiseg.checkpoints import nnunet
from xaiseg.checkpoints.nnunet_plans import difference, read_plan
from xaiseg.checkpoints.nnunet_training import BATCH_NORM_TRAINER, TRAINERS
from xaiseg.models.nnunet import PlainConvUNet, ResidualEncoderUNet

pytestmark = [
    pytest.mark.parity,
    # nnU-Net's trainer asks for CUDA's scaler and scheduler in ways that PyTorch deprecates
    pytest.mark.filterwarnings("ignore"),
]

NETWORKS = {"plain_conv_unet": PlainConvUNet, "residual_encoder_unet": ResidualEncoderUNet}
ISOTROPIC = {"kernel_sizes": [[3, 3, 3]] * 6, "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5}
ANISOTROPIC = {
    "kernel_sizes": [[1, 3, 3], [1, 3, 3]] + [[3, 3, 3]] * 4,
    "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
}
WIDE = {"features_per_stage": [32, 64, 128, 256, 320, 320]}
PLAIN = {"n_conv_per_stage": [2] * 6, "n_conv_per_stage_decoder": [2] * 5}
RESIDUAL = {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": [1] * 5}
# name, architecture's arguments, patch, tensors with and without copies
CASES = {
    "plain": ("PlainConvUNet", WIDE | ISOTROPIC | PLAIN, [64, 64, 64], (292, 108)),
    "plain_anisotropic": ("PlainConvUNet", WIDE | ANISOTROPIC | PLAIN, [16, 64, 96], (292, 108)),
    "residual": ("ResidualEncoderUNet", WIDE | ISOTROPIC | RESIDUAL, [64, 64, 32], (956, 264)),
    "residual_anisotropic": ("ResidualEncoderUNet", WIDE | ANISOTROPIC | RESIDUAL, [16, 64, 64], (956, 264)),
}


def tuples(value):
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def last(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def in_torch(net, x, cotangent):
    given = torch.from_numpy(x).requires_grad_()
    y = net(given)
    (y * torch.from_numpy(cotangent)).sum().backward()
    return last(y), last(given.grad)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_input_gradients(tmp_path, case):
    """Logits in float32 and both in float64.

    Gradients of so deep a network with random weights are no test in float32: a LeakyReLU on the other side of its kink changes
    them by a percent, and PyTorch's own are 1e-2 of their maximum off its float64 ones (`plain`).
    """
    kind, kwargs, patch, (stored, unique) = CASES[case]
    content = {
        "patch_size": patch,
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "use_mask_for_norm": [True, True],
        "architecture": made.architecture(f"unet.{kind}", 3, **kwargs),
    }
    plan = made.plans("3d_fullres", content, "NibabelIOWithReorient", 2)
    data = made.dataset(["FLAIR", "T1w"], {"background": 0, "lesion": 1})
    trainer = made.trained(made.trainers.nnUNetTrainer, plan, "3d_fullres", 0, data, 0)
    folder = made.save(tmp_path / "results", plan, data, trainer, 0)
    net = trainer.network.eval()
    net.decoder.deep_supervision = False
    assert len(net.state_dict()) == stored

    reading = nnunet.read(folder)
    assert len(jax.tree.leaves(reading.members)) == unique
    network = NETWORKS[reading.architecture](**{k: tuples(v) for k, v in reading.options.items()})
    variables = reading.members["fold_0"]

    rng = np.random.default_rng(0)
    x, cotangent = rng.standard_normal((2, 1, 2, *patch))
    single = x.astype(np.float32)
    with torch.no_grad():
        expected = last(net(torch.from_numpy(single)))
    assert expected.std() > 0.1
    logits = jax.jit(lambda v, x: network.apply(v, x)[0])(variables, np.moveaxis(single, 1, -1))
    # sums over up to 27 · 640 products and norms over as few as 8 voxels, rounded differently
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    expected, wanted = in_torch(net.double(), x, cotangent)
    with jax.enable_x64(True):

        @jax.jit
        def logits_and_gradient(variables, x, cotangent):
            logits, pull = jax.vjp(lambda x: network.apply(variables, x)[0], x)
            return logits, pull(cotangent)[0]

        double = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        logits, gradient = logits_and_gradient(double, *(np.moveaxis(a, 1, -1) for a in (x, cotangent)))
    assert logits.dtype == np.float64
    # far above float64's rounding (1e-13 was measured) and far below any other network
    np.testing.assert_allclose(logits, expected, atol=1e-10)
    np.testing.assert_allclose(gradient, wanted, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_old_plans_as_nnunetv2_rebuilds_them(kind, ndim):
    old = {
        "patch_size": [32, 64, 96][-ndim:],
        "spacing": [1.0] * ndim,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "UNet_class_name": kind,
        "UNet_base_num_features": 32,
        "n_conv_per_stage_encoder": [1, 2, 3, 2, 2],
        "n_conv_per_stage_decoder": [4, 3, 2, 1],
        "num_pool_per_axis": [4] * ndim,
        "pool_op_kernel_sizes": [[1] * ndim] + [[2] * ndim] * 4,
        "conv_kernel_sizes": [[1] + [3] * (ndim - 1)] + [[3] * ndim] * 4,
        "unet_max_num_features": 320,
    }
    plans = made.plans("cfg", old, "SimpleITKIO", 1, child={"inherits_from": "cfg", "batch_size": 3})
    new = deepcopy(plans)
    rebuilt = PlansManager(deepcopy(plans)).get_configuration("child").configuration
    assert "architecture" in rebuilt
    new["configurations"] = {"child": {k: v for k, v in rebuilt.items() if k != "inherits_from"}}
    assert difference(read_plan(plans, "child", {}, "old"), read_plan(new, "child", {}, "new")) is None


def test_the_trainers_are_those_that_build_the_planned_network():
    """Read off nnunetv2's sources: who defines `build_network_architecture`, and who inherits from them."""
    root = Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"
    bases, builders = {}, set()
    for file in root.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base) for base in node.bases]
                if any(getattr(member, "name", "") == "build_network_architecture" for member in node.body):
                    builders.add(node.name)

    def changes(name):
        if name in builders and name != "nnUNetTrainer":
            return True
        return any(changes(base) for base in bases[name] if base in bases)

    assert TRAINERS - {BATCH_NORM_TRAINER} == {name for name in bases if not changes(name)}
    assert BATCH_NORM_TRAINER in builders
