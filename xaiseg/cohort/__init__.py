"""Runs over the cases of an input: what is planned, computed and written."""

from xaiseg.cohort.job import Result, explain, run, segment
from xaiseg.cohort.methods import METHODS, Settings
from xaiseg.cohort.work import Execution, Request, load_scan

__all__ = ["METHODS", "Execution", "Request", "Result", "Settings", "explain", "load_scan", "run", "segment"]
