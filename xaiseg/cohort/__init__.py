"""Runs over the cases of an input: what is planned, computed and written."""

from xaiseg.cohort.explaining import METHODS, Settings
from xaiseg.cohort.run import Request, explain, segment

__all__ = ["METHODS", "Request", "Settings", "explain", "segment"]
