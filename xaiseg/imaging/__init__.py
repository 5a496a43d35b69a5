"""Scans: from files to the model's input, and results back to where the scan lies."""

from xaiseg.imaging.bids import read_bids
from xaiseg.imaging.case import Case, Scan, load_scan, preflight
from xaiseg.imaging.discovery import read_input, select_cases
from xaiseg.imaging.grid import Grid, difference
from xaiseg.imaging.manifest import read_manifest
from xaiseg.imaging.nifti import check_header, read, read_labels, write
from xaiseg.imaging.normalise import zscore_nonzero

__all__ = [
    "Case",
    "Grid",
    "Scan",
    "check_header",
    "difference",
    "load_scan",
    "preflight",
    "read",
    "read_bids",
    "read_input",
    "read_labels",
    "read_manifest",
    "select_cases",
    "write",
    "zscore_nonzero",
]
