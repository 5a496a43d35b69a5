"""Moved to `cam`."""

from xaiseg.saliency.cam import gradcam_pp

__all__ = ["gradcam_pp"]
