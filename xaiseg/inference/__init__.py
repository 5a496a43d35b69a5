"""Windows, their blend weights, and the stitched prediction."""

from xaiseg.inference.stitch import StitchedPredictor, cut, pad, unpad
from xaiseg.inference.windows import WindowPlan, plan_windows

__all__ = ["StitchedPredictor", "WindowPlan", "cut", "pad", "plan_windows", "unpad"]
