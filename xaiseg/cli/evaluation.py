"""The command `evaluate`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from xaiseg.cli import options


def add(commands: Any) -> None:
    evaluate = options.command(commands, "evaluate", _evaluate, "compare segmentations with reference masks")
    evaluate.add_argument(
        "input", type=Path, metavar="INPUT", help="a BIDS folder, or a manifest TSV (case, reference, prediction, …)"
    )
    evaluate.add_argument("output", type=Path, metavar="OUT", help="folder to write")
    evaluate.add_argument(
        "--predictions",
        type=Path,
        metavar="DIR",
        help="output of `xaiseg segment` (the manifest's column 'prediction')",
    )
    evaluate.add_argument("--cases", type=options.names, default=(), metavar="A,B", help="only these cases")
    evaluate.add_argument(
        "--threshold",
        type=options.probability,
        help="on probability maps (the masks as segmented; 0.5 for maps in the manifest)",
    )
    evaluate.add_argument(
        "--min-voxels", type=options.whole, default=1, help="smaller predicted lesions are removed (%(default)s)"
    )
    evaluate.add_argument("--connectivity", type=int, choices=(6, 18, 26), default=18, help="of lesions (%(default)s)")
    evaluate.add_argument(
        "--rule",
        default="overlap",
        metavar="NAME",
        help="by which lesions match: overlap (a shared voxel) or iou (%(default)s)",
    )
    evaluate.add_argument("--iou", type=options.portion, default=0.25, help="that the rule iou asks for (%(default)s)")
    evaluate.add_argument("--r", type=options.probability, default=0.001, help="lesion load of nDSC (%(default)s)")
    evaluate.add_argument(
        "--brain",
        action="store_true",
        help="V of nDSC and specificity: voxels where any image is not 0 (all voxels of the array)",
    )
    evaluate.add_argument(
        "--channels",
        type=options.names,
        default=("FLAIR", "T1w"),
        metavar="A,B",
        help="images by which a BIDS folder's cases are found, and the images of --brain (FLAIR,T1w)",
    )
    evaluate.add_argument(
        "--tune",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUES",
        help="try all combinations and use the best: threshold=0.1:0.9:0.05 min-voxels=0,3,5,10 (after INPUT OUT)",
    )
    evaluate.add_argument(
        "--tune-for",
        choices=("ndsc", "dice", "f1"),
        default="ndsc",
        help="the mean over scans that is to be largest (%(default)s)",
    )
    evaluate.add_argument(
        "--bootstrap", type=options.positive, default=2000, help="resamples of patients for intervals (%(default)s)"
    )
    evaluate.add_argument("--seed", type=options.seed, default=0, help="of the bootstrap (%(default)s)")
    options.overwrite(evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from xaiseg.cohort.evaluate import EvaluationRequest, evaluate
    from xaiseg.metrics import EvaluationSettings

    def chosen(kind: Any) -> Any:
        return kind(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(kind)})

    evaluate(chosen(EvaluationRequest), chosen(EvaluationSettings))
    return 0
