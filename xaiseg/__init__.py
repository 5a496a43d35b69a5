"""Explain 3-D segmentation networks lesion by lesion."""

from xaiseg._version import __version__

__all__ = ["__version__"]
