"""Windows, their blend weights, and the stitched prediction."""

from xaiseg.inference.stitch import StitchedPredictor, class_logit, cut, pad, unpad
from xaiseg.inference.windows import Box, WindowPlan, plan_windows

__all__ = ["Box", "StitchedPredictor", "WindowPlan", "class_logit", "cut", "pad", "plan_windows", "unpad"]
