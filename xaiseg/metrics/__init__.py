"""Measures of agreement."""

from xaiseg.metrics.segmentation import dice, normalised_dice

__all__ = ["dice", "normalised_dice"]
