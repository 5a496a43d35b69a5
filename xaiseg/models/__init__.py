"""Networks as thin Flax Linen modules that return logits and named taps, and `Model`: a spec with parameters."""

from xaiseg.models.dynunet import DynUNet
from xaiseg.models.model import NETWORKS, Model, build_network, expected_variables, outputs
from xaiseg.models.nnunet import PlainConvUNet, ResidualEncoderUNet
from xaiseg.models.spec import ModelSpec
from xaiseg.models.swin_unetr import SwinUNETR
from xaiseg.models.unet import UNet

__all__ = [
    "NETWORKS",
    "DynUNet",
    "Model",
    "ModelSpec",
    "PlainConvUNet",
    "ResidualEncoderUNet",
    "SwinUNETR",
    "UNet",
    "build_network",
    "expected_variables",
    "outputs",
]
