"""Runs over the cases of an input: what is planned, computed and written."""

from xaiseg.cohort.methods import METHODS, Settings
from xaiseg.cohort.run import explain, segment
from xaiseg.cohort.work import Request, load_scan

__all__ = ["METHODS", "Request", "Settings", "explain", "load_scan", "segment"]
