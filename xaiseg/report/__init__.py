"""What a reader sees of a run: the pictures."""

from xaiseg.report.lesion import lesion_figure
from xaiseg.report.summary import summary_figure

__all__ = ["lesion_figure", "summary_figure"]
