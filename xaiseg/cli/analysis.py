"""Commands about finished runs: `analyse`, `true-negatives`."""

import argparse
from pathlib import Path
from typing import Any

from xaiseg.cli import options


def add(commands: Any) -> None:
    analyse = options.command(
        commands,
        "analyse",
        _analyse,
        "compare groups, sequences and profiles of explained lesions, and find wrong detections",
    )
    analyse.add_argument("output", type=Path, metavar="OUT", help="folder of a finished `xaiseg explain`")
    analyse.add_argument(
        "--missed",
        type=Path,
        metavar="RUN",
        help="a run with --instances missed (or reference), whose FN join the groups",
    )
    analyse.add_argument(
        "--normal", type=Path, metavar="RUN", help="a run on the regions of `xaiseg true-negatives`, which are the TN"
    )
    analyse.add_argument(
        "--radiomics",
        nargs="+",
        choices=("maps", "scans"),
        default=(),
        help="find wrong detections by radiomic features of these, too (xaiseg[radiomics])",
    )
    analyse.add_argument("--source", type=Path, metavar="INPUT", help="the run's input for that, if it was moved")
    analyse.add_argument(
        "--resamples", type=options.positive, default=2000, help="of patients, for intervals (%(default)s)"
    )
    analyse.add_argument("--seed", type=options.seed, default=0, help="of the resamples (%(default)s)")

    regions = options.command(
        commands,
        "true-negatives",
        _true_negatives,
        "sample regions of normal white matter shaped like a run's lesions, to be explained beside them",
    )
    regions.add_argument("output", type=Path, metavar="OUT", help="folder of a finished `xaiseg explain`")
    regions.add_argument("folder", type=Path, metavar="FOLDER", help="where label maps and their manifest are written")
    regions.add_argument(
        "--source", type=Path, metavar="INPUT", help="the run's manifest or BIDS folder, if it was moved"
    )
    regions.add_argument(
        "--t1w", default="T1w", metavar="CHANNEL", help="in which white matter is brightest (%(default)s)"
    )
    regions.add_argument(
        "--distance", type=options.not_negative, default=5.0, metavar="MM", help="from any lesion (%(default)s)"
    )
    regions.add_argument(
        "--most", type=options.positive, metavar="N", help="regions in a scan, shaped like N of its lesions (all)"
    )
    regions.add_argument("--seed", type=options.seed, default=0, help="of the places (%(default)s)")


def _analyse(arguments: argparse.Namespace) -> int:
    from xaiseg.analysis.analyse import analyse

    analyse(
        arguments.output,
        missed=arguments.missed,
        normal=arguments.normal,
        radiomics=arguments.radiomics,
        source=arguments.source,
        resamples=arguments.resamples,
        seed=arguments.seed,
    )
    return 0


def _true_negatives(arguments: argparse.Namespace) -> int:
    from xaiseg.analysis.run_tables import read_run
    from xaiseg.analysis.true_negatives import write_true_negatives

    manifest = write_true_negatives(
        read_run(arguments.output),
        arguments.folder,
        arguments.source,
        t1w=arguments.t1w,
        distance_mm=arguments.distance,
        most=arguments.most,
        seed=arguments.seed,
    )
    print(f"{manifest}: explain it with the run's own options and --instances given")
    return 0
