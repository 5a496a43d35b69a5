"""Explain 3-D segmentation networks lesion by lesion.

The README shows its use in ten lines; `_types` holds the shapes of the parts.
"""

from xaiseg._types import Aggregator, Explainer, Info, Instance, LogitsFn, SaliencyMap, TappedFn
from xaiseg._version import __version__
from xaiseg.checkpoints import convert, load_model, save_model
from xaiseg.cohort import Request, Settings, explain, load_scan, segment
from xaiseg.errors import InputError
from xaiseg.imaging import Case, Scan, read_input
from xaiseg.inference import StitchedPredictor
from xaiseg.instances import instances_of, label_components, match_instances
from xaiseg.models import DynUNet, Model, ModelSpec, PlainConvUNet, ResidualEncoderUNet, SwinUNETR, UNet
from xaiseg.models.adapters import (
    check_logits_fn,
    from_equinox,
    from_function,
    from_linen,
    from_nnx,
    slicewise,
    slicewise_tapped,
    tapped_from_linen,
)
from xaiseg.models.taps import Taps
from xaiseg.report import lesion_figure
from xaiseg.saliency import gradcam_pp, jacobian_rows, mean, noisy_mean, signed_max, smoothgrad

__all__ = [
    "Aggregator",
    "Case",
    "DynUNet",
    "Explainer",
    "Info",
    "InputError",
    "Instance",
    "LogitsFn",
    "Model",
    "ModelSpec",
    "PlainConvUNet",
    "Request",
    "ResidualEncoderUNet",
    "SaliencyMap",
    "Scan",
    "Settings",
    "StitchedPredictor",
    "SwinUNETR",
    "TappedFn",
    "Taps",
    "UNet",
    "__version__",
    "check_logits_fn",
    "convert",
    "explain",
    "from_equinox",
    "from_function",
    "from_linen",
    "from_nnx",
    "gradcam_pp",
    "instances_of",
    "jacobian_rows",
    "label_components",
    "lesion_figure",
    "load_model",
    "load_scan",
    "match_instances",
    "mean",
    "noisy_mean",
    "read_input",
    "save_model",
    "segment",
    "signed_max",
    "slicewise",
    "slicewise_tapped",
    "smoothgrad",
    "tapped_from_linen",
]
