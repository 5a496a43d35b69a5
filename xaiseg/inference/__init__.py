"""Windows, their blend weights, and the stitched prediction."""

from xaiseg.inference.devices import device_mesh
from xaiseg.inference.stitch import StitchedPredictor, check_grid, class_logit, cut, logits_shape, pad, unpad
from xaiseg.inference.windows import Box, WindowPlan, plan_windows

__all__ = [
    "Box",
    "StitchedPredictor",
    "WindowPlan",
    "check_grid",
    "class_logit",
    "cut",
    "device_mesh",
    "logits_shape",
    "pad",
    "plan_windows",
    "unpad",
]
