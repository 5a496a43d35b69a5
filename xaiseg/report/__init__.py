"""What a reader sees of a run: the pictures."""

from xaiseg.report.figure import lesion_figure, summary_figure

__all__ = ["lesion_figure", "summary_figure"]
