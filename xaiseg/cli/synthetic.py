"""The commands `synthetic` and `counterfactual`: lesions put into scans, and real ones taken out of them."""

import argparse
from typing import Any

import numpy as np

from xaiseg.cli import options

_SIGNS = {"+": 1, "-": -1, "\u2212": -1}


def add(commands: Any) -> None:
    synthetic = options.command(
        commands,
        "synthetic",
        _synthetic,
        "put lesions of known place, size and contrast into scans of a run, and ask the network",
    )
    options.opened_run(synthetic)
    which = synthetic.add_argument_group("scans and places")
    which.add_argument("--cases", type=options.names, default=(), metavar="A,B", help="scans of the run")
    which.add_argument(
        "--scans",
        type=options.positive,
        default=4,
        metavar="N",
        help="without --cases: as many, drawn evenly over patients (4)",
    )
    which.add_argument(
        "--lesions-per-scan",
        type=options.positive,
        default=2,
        metavar="N",
        help="places, drawn in normal white matter (2)",
    )
    which.add_argument(
        "--centre",
        type=_centre,
        action="append",
        default=[],
        metavar="R,A,S",
        help="a place in mm instead, the same in each scan, such as --centre=-25,10,20; repeat it for more",
    )
    what = synthetic.add_argument_group("lesions")
    what.add_argument(
        "--diameter", type=_diameters, default=(6.0, 10.0), metavar="MM,MM", help="of each place's lesions (6,10)"
    )
    what.add_argument(
        "--shape",
        choices=("ball", "lesion"),
        default="ball",
        help="or the shape of a real lesion of the scan (%(default)s)",
    )
    what.add_argument(
        "--roughness",
        type=options.fraction,
        default=0.15,
        help="of a ball's surface: SD of its log radius (%(default)s)",
    )
    what.add_argument(
        "--contrast",
        type=options.rising,
        default=(0.0, 2.0, 4.0, 6.0, 8.0),
        metavar="A:B:STEP",
        help="or a list A,B,C (0:8:2)",
    )
    what.add_argument(
        "--unit",
        choices=("spread", "intensity"),
        default="spread",
        help="of contrast: standard deviations of the tissue around, or normalised intensity (%(default)s)",
    )
    what.add_argument(
        "--sign",
        type=_signs,
        default={},
        metavar="FLAIR=+,T1w=-",
        help="bright or dark in a channel (dark in T1w, else bright)",
    )
    what.add_argument(
        "--series",
        type=options.names,
        default=(),
        metavar="FLAIR,T1w,all",
        help="channels that have the lesion alone, and all: in all of them (each channel, and all)",
    )
    _explainer(synthetic)
    synthetic.add_argument(
        "--seed", type=options.seed, default=0, help="of scans, places, shapes and noise (%(default)s)"
    )
    synthetic.add_argument("--chunk", type=options.positive, help="images evaluated at once (1 on CPU, else 8)")

    counterfactual = options.command(
        commands,
        "counterfactual",
        _counterfactual,
        "fill lesions of a run with normal white matter, and see what changes for them and their neighbours",
    )
    options.opened_run(counterfactual)
    options.chosen_lesions(counterfactual, 8, "TP, or all without references")
    counterfactual.add_argument(
        "--only", type=_labelled, action="append", default=[], metavar="CASE:N", help="this lesion; repeat it for more"
    )
    counterfactual.add_argument(
        "--neighbours",
        type=options.not_negative,
        default=20.0,
        metavar="MM",
        help="lesions as near as this (%(default)s)",
    )
    _explainer(counterfactual)
    counterfactual.add_argument("--chunk", type=options.positive, help="images evaluated at once (1 on CPU, else 8)")


def _explainer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("saliency")
    group.add_argument("--method", metavar="NAME", help="of the run's, with its settings (the first)")
    group.add_argument("--samples", type=options.positive, metavar="N", help="of noise (the run's, 4 at most)")
    group.add_argument("--no-saliency", action="store_true", help="segment only")


def _synthetic(arguments: argparse.Namespace) -> int:
    from xaiseg.analysis.run_tables import read_run
    from xaiseg.analysis.synthetic import synthetic
    from xaiseg.analysis.synthetic_plan import Design
    from xaiseg.checkpoints import load_model

    design = Design(
        places=arguments.lesions_per_scan,
        centres_mm=tuple(arguments.centre),
        diameters_mm=arguments.diameter,
        shape=arguments.shape,
        roughness=arguments.roughness,
        contrasts=arguments.contrast,
        unit=arguments.unit,
        signs=arguments.sign,
        series=arguments.series,
    )
    synthetic(
        read_run(arguments.output),
        load_model(arguments.model),
        design,
        cases=arguments.cases,
        scans=arguments.scans,
        saliency=not arguments.no_saliency,
        method=arguments.method,
        samples=arguments.samples,
        source=arguments.source,
        seed=arguments.seed,
        chunk=arguments.chunk,
    )
    return 0


def _counterfactual(arguments: argparse.Namespace) -> int:
    from xaiseg.analysis.counterfactual_run import counterfactual
    from xaiseg.analysis.reopened import Choice
    from xaiseg.analysis.run_tables import read_run
    from xaiseg.checkpoints import load_model

    counterfactual(
        read_run(arguments.output),
        load_model(arguments.model),
        Choice(arguments.groups, arguments.volume, arguments.lesions, arguments.seed),
        only=arguments.only,
        neighbours_mm=arguments.neighbours,
        saliency=not arguments.no_saliency,
        method=arguments.method,
        samples=arguments.samples,
        source=arguments.source,
        chunk=arguments.chunk,
    )
    return 0


_diameters = options.checked(
    lambda t: tuple(float(part) for part in t.split(",")),
    lambda v: all(0 < d < float("inf") for d in v) and len(set(v)) == len(v),
    "different diameters in mm separated by commas",
)
_centre = options.checked(
    lambda t: tuple(float(part) for part in t.split(",")),
    lambda v: len(v) == 3 and bool(np.isfinite(v).all()),
    "R,A,S in mm, such as -25,10,20",
)
_signs = options.checked(
    lambda t: {name.strip(): _SIGNS.get(sign.strip(), 0) for name, sign in (part.split("=") for part in t.split(","))},
    lambda v: all(v) and all(v.values()),
    "channels with + or -, such as FLAIR=+,T1w=-",
)
_labelled = options.checked(
    lambda t: (t.rpartition(":")[0], int(t.rpartition(":")[2])),
    lambda v: v[0] and v[1] > 0,
    "the name of a scan and the label of a lesion, such as sub-01_ses-1:3",
)
