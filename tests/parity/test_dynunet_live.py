"""DynUNet beside MONAI's: the paper's at full size, deeper and differently normalised ones in smaller windows."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch and MONAI deprecate while they are imported
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")
    import monai.networks.nets as monai_nets

from xaiseg.checkpoints import monai_dynunet, read_state_dict
from xaiseg.checkpoints.mapping import Given
from xaiseg.models.dynunet import DynUNet

pytestmark = pytest.mark.parity

PAPER = {
    "spatial_dims": 3,
    "in_channels": 2,
    "out_channels": 2,
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [16, 32, 64],
    "dropout": 0.1,
    "res_block": True,
    "norm_name": "instance",
    "act_name": "leakyrelu",
}
DEEP = {
    "in_channels": 1,
    "out_channels": 4,
    "kernel_size": [[1, 3, 3], 3, 3, 3, 3],
    "strides": [1, [1, 2, 2], 2, 2, 2],
    "upsample_kernel_size": [[1, 2, 2], 2, 2, 2],
    "filters": [16, 32, 64, 96, 128],
    "res_block": False,
    "norm_name": ("instance", {"affine": True}),
    "act_name": ("leakyrelu", {"inplace": True, "negative_slope": 0.01}),  # MONAI's default
    "trans_bias": True,
    "deep_supervision": True,
    "deep_supr_num": 3,
}
NETWORKS = {
    # options of MONAI, what the keys do not tell, parameters, window
    "paper": ({}, Given(), 341_922, (96, 96, 96)),
    "deep": (DEEP, Given(), None, (48, 64, 48)),
    "batch": ({"norm_name": "batch"}, Given(), None, (32, 24, 40)),
    "group": ({"norm_name": ("group", {"num_groups": 4})}, Given(norm="group:4"), None, (32, 24, 40)),
}


def random_network(options):
    torch.manual_seed(0)
    net = monai_nets.DynUNet(**{**PAPER, **options}).eval()
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.3, 2)
            elif ".norm" in name and name.endswith(".weight"):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean")):
                value.normal_(0, 0.3)
    return net


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def channels_last(y):
    return np.moveaxis(y.detach().numpy(), 1, -1)


@pytest.mark.parametrize(("options", "given", "count", "window"), NETWORKS.values(), ids=NETWORKS)
def test_logits_and_input_gradients(options, given, count, window, tmp_path):
    net = random_network(options)
    path = tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    reading = monai_dynunet.read(read_state_dict(path), str(path), given)
    network = DynUNet(**reading.options)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(reading.variables["params"]))
    assert parameters == sum(p.numel() for p in net.parameters())
    assert count in (None, parameters)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, *window, net.in_channels)).astype(np.float32)
    cotangent = rng.standard_normal((1, *window, net.out_channels)).astype(np.float32)
    torch_x = to_torch(x).requires_grad_()
    y = net(torch_x)
    (gradient,) = torch.autograd.grad(y, torch_x, to_torch(cotangent))
    # DynUNet's own list of the heads' outputs, level 1 first
    heads = {f"head{i}": channels_last(head) for i, head in enumerate(net.heads, 1)} if net.deep_supervision else {}
    expected, expected_gradient = channels_last(y), channels_last(gradient)

    @jax.jit
    def both(variables, x, cotangent):
        logits, pull, taps = jax.vjp(lambda x: network.apply(variables, x), x, has_aux=True)
        return logits, {name: taps[name] for name in heads}, pull(cotangent)[0]

    logits, found_heads, found_gradient = both(reading.variables, jnp.asarray(x), jnp.asarray(cotangent))
    assert expected.std() > 0.1
    # two float32 computations in different order: logits of order one, gradients relative to their maximum; measured
    # below 1e-5 and 4e-6
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    largest = np.abs(expected_gradient).max()
    np.testing.assert_allclose(found_gradient, expected_gradient, atol=1e-4 * largest)
    for name, head in heads.items():
        np.testing.assert_allclose(found_heads[name], head, atol=1e-4, err_msg=name)
    print(float(np.abs(logits - expected).max()), float(np.abs(found_gradient - expected_gradient).max() / largest))
