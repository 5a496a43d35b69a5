"""Windows, their blend weights, and the stitched prediction."""

from xaiseg.inference.stitch import StitchedPredictor, pad, unpad
from xaiseg.inference.windows import WindowPlan, plan_windows

__all__ = ["StitchedPredictor", "WindowPlan", "pad", "plan_windows", "unpad"]
