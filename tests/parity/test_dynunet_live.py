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
    lesion = np.zeros((1, *window, net.out_channels), np.float32)
    lesion[(0, *(slice(n // 2, n // 2 + k) for n, k in zip(window, (2, 3, 4), strict=True)), 1)] = 1
    everywhere = rng.standard_normal(lesion.shape)

    @jax.jit
    def ours(variables, x, cotangent):
        logits, pull, taps = jax.vjp(lambda x: network.apply(variables, x), x, has_aux=True)
        return logits, pull(cotangent)[0], {name: value for name, value in taps.items() if name.startswith("head")}

    def theirs(x, cotangent):
        torch_x = to_torch(x).requires_grad_()
        y = net(torch_x)
        (gradient,) = torch.autograd.grad(y, torch_x, to_torch(cotangent))
        # the network's own list of what its heads gave, level 1 first
        heads = {f"head{i}": channels_last(h) for i, h in enumerate(net.heads, 1)} if net.deep_supervision else {}
        return channels_last(y), channels_last(gradient), heads

    def agree(found, expected, tolerance, gradient_tolerance):
        logits, gradient, heads = expected
        assert logits.std() > 0.1
        np.testing.assert_allclose(found[0], logits, atol=tolerance)
        np.testing.assert_allclose(found[1], gradient, atol=gradient_tolerance * np.abs(gradient).max())
        assert set(found[2]) == set(heads)
        for name, head in heads.items():
            np.testing.assert_allclose(found[2][name], head, atol=tolerance, err_msg=name)

    # Logits of order one, gradients relative to their maximum. Rounding is of order 1e-6, and a few of the activations are so
    # close to 0 that it turns their sign, and with it the slope from 0.01 to 1: few of those that a lesion depends on. Measured
    # 6.7e-5 of the gradient's maximum, on another processor perhaps a slope more
    agree(ours(reading.variables, jnp.asarray(x), jnp.asarray(lesion)), theirs(x, lesion), 1e-4, 3e-4)

    # By way of all activations, PyTorch's float32 gradient is 1e-2 from its own float64 one. In float64 no sign turns.
    net.double()
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), reading.variables)
        found = ours(variables, jnp.asarray(np.float64(x)), jnp.asarray(everywhere))
    agree(found, theirs(np.float64(x), everywhere), 1e-9, 1e-9)


def test_dropout_is_where_monais_is(monkeypatch):
    """A function of the value in place of chance, which a norm does not undo."""
    options = {"dropout": 0.1, "deep_supervision": True, "deep_supr_num": 1}
    net = random_network(options).train()
    state = {k: v.numpy().copy() for k, v in net.state_dict().items()}
    reading = monai_dynunet.read(state, "live", Given())
    x = np.random.default_rng(0).standard_normal((32, 24, 40, 2), dtype=np.float32)
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, y: y + 0.3 * torch.sin(2 * y))
    monkeypatch.setattr("flax.linen.Dropout.__call__", lambda self, y, **_: y + 0.3 * jnp.sin(2 * y))
    with torch.no_grad():
        expected = net(torch.from_numpy(np.moveaxis(x, -1, 0)[None].copy()))[0, 0].numpy()
    network = DynUNet(**{**reading.options, "dropout": 0.1})
    logits, _ = jax.jit(lambda x: network.apply(reading.variables, x, train=True))(x[None])
    # both in float32
    np.testing.assert_allclose(np.moveaxis(logits[0], -1, 0), expected, atol=1e-4 * np.abs(expected).max())
