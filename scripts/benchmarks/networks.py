"""The paper's three networks with random weights, in PyTorch and in JAX."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

NETWORKS = ("unet", "dynunet", "swin_unetr")

# What the readers of checkpoints find for them (tests/parity/test_published_live.py), for measurements that need no PyTorch.
OPTIONS: dict[str, dict[str, Any]] = {
    "unet": {"channels": (32, 64, 128, 256, 512), "strides": (2, 2, 2, 2), "out_channels": 2, "norm": "batch"},
    "dynunet": {
        "filters": (16, 32, 64),
        "kernel_size": (3, 3, 3),
        "strides": (1, 2, 2),
        "upsample_kernel_size": (2, 2),
        "out_channels": 2,
        "norm": "instance",
        "residual": True,
    },
    "swin_unetr": {"feature_size": 24, "out_channels": 2, "patch_merging": "merging"},
}


def torch_network(name: str) -> Any:
    """In inference mode, in float32, on the GPU if there is one, with as many threads as JAX takes."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(threads())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    net = _papers_network(name)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def trainable_network(name: str) -> Any:
    """In training mode, with PyTorch's first weights and without dropout, which would draw other numbers than JAX."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(threads())
    net = _papers_network(name)
    for module in net.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return net.train().to("cuda" if torch.cuda.is_available() else "cpu")


def _papers_network(name: str) -> Any:
    from monai.networks import nets

    if name == "unet":
        return nets.UNet(3, 2, 2, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), norm="batch", num_res_units=0)
    if name == "dynunet":
        sizes = {
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [16, 32, 64],
        }
        return nets.DynUNet(3, 2, 2, **sizes, dropout=0.1, res_block=True, norm_name="instance", act_name="leakyrelu")
    return nets.SwinUNETR(in_channels=2, out_channels=2, feature_size=24)


def state_of(net: Any) -> dict[str, np.ndarray]:
    return {k: v.cpu().numpy() for k, v in net.state_dict().items()}


def model_of(name: str, state: dict[str, np.ndarray], window: Sequence[int], remat: bool = False) -> Any:
    """The model with the weights of a PyTorch network."""
    import jax
    import jax.numpy as jnp

    from xaiseg.checkpoints import monai_dynunet, monai_swin_unetr, monai_unet
    from xaiseg.checkpoints.mapping import Given
    from xaiseg.models import Model

    reader = {"unet": monai_unet, "dynunet": monai_dynunet, "swin_unetr": monai_swin_unetr}[name]
    reading = reader.read(state, "benchmark", Given(patch_merging="merging" if name == "swin_unetr" else None))
    spec = _spec(reading.architecture, {**reading.options, **({"remat": True} if remat else {})}, window)
    return Model(spec, jax.tree.map(jnp.asarray, reading.variables))


def random_model(name: str, window: Sequence[int]) -> Any:
    """The model with random weights of its own, without PyTorch."""
    import jax
    import jax.numpy as jnp

    from xaiseg.models import Model, expected_variables

    spec, rng = _spec(name, OPTIONS[name], window), np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> Any:
        if path[-1].key == "var":
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype)
        scale = 1 / math.sqrt(math.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 1
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return Model(spec, jax.tree_util.tree_map_with_path(draw, expected_variables(spec)))


def _spec(architecture: str, options: dict[str, Any], window: Sequence[int]) -> Any:
    from xaiseg.models import ModelSpec

    x, y, z = window
    return ModelSpec(architecture, options, ("FLAIR", "T1w"), (x, y, z))


def random_image(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*shape, 2)).astype(np.float32)


def threads() -> int:
    """Cores that this process may use, as many as XLA takes on CPU."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
