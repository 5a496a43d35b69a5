"""Scans: from files to the model's input, and results back to where the scan lies."""

from xaiseg.imaging.bids import read_bids
from xaiseg.imaging.case import Case, Scan, load_scan, preflight, problems
from xaiseg.imaging.discovery import (
    Cohort,
    Rejected,
    read_cohort,
    read_input,
    select_cases,
    select_participants,
)
from xaiseg.imaging.grid import Grid, difference
from xaiseg.imaging.manifest import read_manifest
from xaiseg.imaging.nifti import check_header, read, read_labels, write
from xaiseg.imaging.normalise import zscore_nonzero
from xaiseg.imaging.plausibility import warnings

__all__ = [
    "Case",
    "Cohort",
    "Grid",
    "Rejected",
    "Scan",
    "check_header",
    "difference",
    "load_scan",
    "preflight",
    "problems",
    "read",
    "read_bids",
    "read_cohort",
    "read_input",
    "read_labels",
    "read_manifest",
    "select_cases",
    "select_participants",
    "warnings",
    "write",
    "zscore_nonzero",
]
