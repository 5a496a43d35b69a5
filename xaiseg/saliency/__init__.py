"""Explainers and the parts they are built from."""

from xaiseg.saliency.aggregators import AGGREGATORS, mean, signed_max
from xaiseg.saliency.gradcam import gradcam_pp
from xaiseg.saliency.noise import noisy_mean
from xaiseg.saliency.rows import jacobian_rows
from xaiseg.saliency.smoothgrad import smoothgrad

__all__ = ["AGGREGATORS", "gradcam_pp", "jacobian_rows", "mean", "noisy_mean", "signed_max", "smoothgrad"]
