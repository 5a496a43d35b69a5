"""The report of a run as pages that need nothing but a browser."""

from xaiseg.report.html.pages import report

__all__ = ["report"]
