"""Networks as thin Flax Linen modules that return logits and named taps, and `Model`: a spec with parameters."""

from xaiseg.models.model import NETWORKS, Model, ModelSpec, build_network, expected_variables
from xaiseg.models.unet import UNet

__all__ = ["NETWORKS", "Model", "ModelSpec", "UNet", "build_network", "expected_variables"]
