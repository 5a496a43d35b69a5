"""The command `report`: pages that show a finished run."""

import argparse
from pathlib import Path
from typing import Any

from xaiseg.cli import options


def add(commands: Any) -> None:
    parser = options.command(
        commands, "report", _report, "write a finished run as self-contained pages: report.html, and one per subject"
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of a finished `xaiseg explain`")
    parser.add_argument(
        "--source", type=Path, metavar="INPUT", help="the run's manifest or BIDS folder, if it was moved"
    )
    parser.add_argument(
        "--no-viewer",
        dest="viewer",
        action="store_false",
        help="no scans in the pages of subjects: small ones, for sharing; nor an error where scans cannot be read",
    )
    parser.add_argument(
        "--gallery",
        type=options.positive,
        default=1000,
        metavar="N",
        help="lesions in the gallery at most, the most suspicious and those of the highest peak (%(default)s)",
    )
    parser.add_argument("--method", metavar="KEY", help="whose maps the gallery shows (the run's first)")


def _report(arguments: argparse.Namespace) -> int:
    from xaiseg.report.html import report

    report(
        arguments.output,
        source=arguments.source,
        viewer=arguments.viewer,
        gallery=arguments.gallery,
        method=arguments.method,
    )
    return 0
