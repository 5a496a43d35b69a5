"""What a reader sees of a run: the pictures."""

from xaiseg.report.convergence import convergence_figure
from xaiseg.report.lesion import lesion_figure
from xaiseg.report.summary import summary_figure

__all__ = ["convergence_figure", "lesion_figure", "summary_figure"]
