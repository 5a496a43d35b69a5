"""Explainers and the parts they are built from. The pages beside this file show each, and how to write one of your own."""

from xaiseg.saliency.aggregators import (
    AGGREGATORS,
    l2_norm,
    mean,
    negative_max,
    positive_max,
    quantile,
    signed_max,
    total,
)
from xaiseg.saliency.baselines import BASELINES, Baseline, blur, given, normal_appearing_white_matter, zero
from xaiseg.saliency.cam import FORMS, gradcam, gradcam_pp, hirescam, layercam, seg_gradcam
from xaiseg.saliency.convergence import recommended_samples
from xaiseg.saliency.guided import guided, guided_backprop
from xaiseg.saliency.noise import merge_samples, noisy
from xaiseg.saliency.occlusion import occlusion, occlusion_passes
from xaiseg.saliency.paths import (
    completeness_gap,
    expected_gradients,
    integrated_gradients,
    smooth_integrated_gradients,
    times_input,
)
from xaiseg.saliency.rows import input_gradient, jacobian_rows
from xaiseg.saliency.smoothgrad import smoothgrad
from xaiseg.saliency.targets import TARGETS, Target

__all__ = [
    "AGGREGATORS",
    "BASELINES",
    "FORMS",
    "TARGETS",
    "Baseline",
    "Target",
    "blur",
    "completeness_gap",
    "expected_gradients",
    "given",
    "gradcam",
    "gradcam_pp",
    "guided",
    "guided_backprop",
    "hirescam",
    "input_gradient",
    "integrated_gradients",
    "jacobian_rows",
    "l2_norm",
    "layercam",
    "mean",
    "merge_samples",
    "negative_max",
    "noisy",
    "normal_appearing_white_matter",
    "occlusion",
    "occlusion_passes",
    "positive_max",
    "quantile",
    "recommended_samples",
    "seg_gradcam",
    "signed_max",
    "smooth_integrated_gradients",
    "smoothgrad",
    "times_input",
    "total",
    "zero",
]
