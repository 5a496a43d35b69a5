"""Commands about scans: `segment`, `explain`, `status`, `demo`."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xaiseg.cli import options
from xaiseg.errors import InputError


def add(commands: Any) -> None:
    segment = options.command(commands, "segment", _segment, "segment the lesions of every case")
    _cohort(segment)

    explain = options.command(commands, "explain", _explain, "segment, then explain every lesion")
    _cohort(explain)
    explain.add_argument(
        "--method",
        action="append",
        choices=(
            *("smoothgrad", "smoothgrad-squared", "vargrad", "gradient", "input-x-gradient", "guided-backprop"),
            *("integrated-gradients", "smooth-integrated-gradients", "gradcam", "gradcam++", "hirescam", "layercam"),
            "occlusion",
        ),
        metavar="NAME",
        help="may be given several times (smoothgrad): %(choices)s",
    )
    explain.add_argument(
        "--target",
        choices=("logit", "log_odds", "probability", "margin"),
        default="logit",
        help="what of the lesion class is explained (%(default)s)",
    )
    explain.add_argument(
        "--aggregate",
        choices=("signed_max", "mean", "sum", "positive_max", "negative_max", "median", "l2_norm"),
        default="signed_max",
        help="of Jacobian rows (%(default)s)",
    )
    explain.add_argument("--samples", type=options.positive, default=50, help="noise samples (%(default)s)")
    explain.add_argument(
        "--tolerance",
        type=options.probability,
        help="stop sampling a lesion when the standard error of its peak is this fraction of it, e.g. 0.05",
    )
    explain.add_argument(
        "--noise",
        type=options.not_negative,
        default=0.05,
        help="σ as a fraction of the FLAIR intensity range (%(default)s); 0: plain gradient",
    )
    explain.add_argument(
        "--instances",
        choices=("predicted", "reference", "missed", "given"),
        default="predicted",
        help="predicted lesions, the reference mask's, its missed ones (FN), or the manifest's label map (%(default)s)",
    )
    explain.add_argument(
        "--lesions", type=options.numbers, metavar="3,7", help="only these labels, whatever their size"
    )
    explain.add_argument(
        "--min-voxels", type=options.positive, default=6, help="smaller instances are left out (%(default)s)"
    )
    explain.add_argument(
        "--layer",
        dest="layers",
        type=options.names,
        default=(),
        metavar="A,B",
        help="taps of class-activation maps (the model's default); see `xaiseg inspect`",
    )
    explain.add_argument(
        "--form", choices=("paper", "pooled", "monai", "authors"), default="paper", help="of Grad-CAM++ (%(default)s)"
    )
    explain.add_argument(
        "--derivatives",
        choices=("closed_form", "exact"),
        default="closed_form",
        help="the higher ones in Grad-CAM++; exact takes minutes a lesion on CPU (%(default)s)",
    )
    explain.add_argument(
        "--region",
        choices=("instance", "class"),
        default="instance",
        help="what class-activation maps are of: each lesion, or the whole class (%(default)s)",
    )
    explain.add_argument(
        "--baseline",
        choices=("zero", "blur", "nawm"),
        default="zero",
        help="reference image of integrated gradients and occlusion; nawm: normal-appearing white matter (%(default)s)",
    )
    explain.add_argument("--steps", type=options.positive, default=50, help="of integrated gradients (%(default)s)")
    explain.add_argument(
        "--patch", type=options.positive, default=8, help="side of occlusion's patch in voxels (%(default)s)"
    )
    explain.add_argument(
        "--margin", type=options.whole, default=16, help="voxels around a lesion that occlusion tries (%(default)s)"
    )
    explain.add_argument(
        "--precision",
        choices=("float32", "tf32", "bfloat16"),
        default="float32",
        help="of the network while it explains; the plan tells the error (%(default)s)",
    )
    explain.add_argument("--devices", type=options.positive, metavar="N", help="how many to use (all; on CPU 1)")
    explain.add_argument("--seed", type=options.seed, default=0, help="of the noise (%(default)s)")
    explain.add_argument("--chunk", type=options.positive, help="Jacobian rows at once (what is fast and fits)")
    explain.add_argument(
        "--memory", type=options.size, metavar="4G", help="bound on a chunk's temporaries and on the maps kept at once"
    )
    explain.add_argument("--dry-run", action="store_true", help="segment and print the plan; write nothing")
    explain.add_argument(
        "--save-maps",
        choices=("crop", "full", "none"),
        default="crop",
        help="around the lesion, on the whole grid, or tables alone (%(default)s)",
    )
    explain.add_argument(
        "--map-dtype",
        choices=("float32", "float16"),
        default="float32",
        help="float16: values rounded to its 11 significant bits, files of half the size (%(default)s)",
    )
    explain.add_argument(
        "--no-pictures", dest="pictures", action="store_false", help="none of each lesion; tables and maps alone"
    )

    status = options.command(
        commands, "status", _how_far, "tell how far a run is: done, running, failed, left, estimated end"
    )
    status.add_argument("output", type=Path, metavar="OUT", help="output folder of `xaiseg explain` or `segment`")
    status.add_argument("--json", action="store_true", help="for programs")

    demo = options.command(commands, "demo", _demo, "the built-in example: segment and explain unseen phantoms")
    demo.add_argument("--out", type=Path, default=Path("xaiseg-demo"), help="folder to write (%(default)s)")
    demo.add_argument("--cases", type=options.positive, default=2, help="phantoms (%(default)s)")
    demo.add_argument("--samples", type=options.positive, default=4, help="noise samples (%(default)s)")
    options.overwrite(demo)


def _cohort(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", type=Path, metavar="INPUT", help="a BIDS folder, or a manifest TSV (case, one column per channel, …)"
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write, or of an earlier run to go on with")
    parser.add_argument(
        "level",
        nargs="?",
        choices=("participant", "group"),
        help="of a BIDS-App: participant leaves the cohort's tables to group, which computes nothing (both)",
    )
    parser.add_argument(
        "--model", required=True, metavar="M", help="a model folder, see `xaiseg convert`, or a name of `xaiseg models`"
    )
    parser.add_argument("--cases", type=options.names, default=(), metavar="A,B", help="only these cases")
    parser.add_argument(
        "--participant-label",
        "--participant_label",
        dest="participants",
        nargs="+",
        default=(),
        metavar="LABEL",
        help="only these subjects, with or without sub-",
    )
    parser.add_argument(
        "--session-label",
        "--session_label",
        dest="sessions",
        nargs="+",
        default=(),
        metavar="LABEL",
        help="only these sessions, with or without ses-",
    )
    parser.add_argument(
        "--shard",
        type=options.shard,
        metavar="I/N",
        help="only the I-th of N parts of the cases; parts may run at once",
    )
    parser.add_argument("--index", choices=("pybids",), help="find the cases of a BIDS folder with pybids")
    parser.add_argument(
        "--executor",
        choices=("local", "dask", "slurm"),
        default="local",
        help="this process, Dask workers, or SLURM jobs (%(default)s)",
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of Dask, tcp://host:port (workers of its own)")
    parser.add_argument("--workers", type=options.positive, metavar="N", help="processes, or SLURM jobs, to start")
    parser.add_argument(
        "--job-option",
        dest="job_options",
        action="append",
        type=options.option,
        default=[],
        metavar="NAME=VALUE",
        help="of a SLURM job, as dask-jobqueue's SLURMCluster takes it: cores=4, memory=32GB, queue=gpu, walltime=04:00:00",
    )
    parser.add_argument("--stop-on-first-crash", action="store_true", help="leave the rest when something fails")
    parser.add_argument("--threshold", type=options.probability, help="on the lesion probability (the model's)")
    parser.add_argument(
        "--whole-volume", action="store_true", help="take each volume in one piece instead of in windows"
    )
    parser.add_argument("--resample", action="store_true", help="bring other channels onto the first channel's grid")
    options.overwrite(parser)


def _segment(arguments: argparse.Namespace) -> int:
    from xaiseg.cohort import segment

    return _status(segment(_model(arguments), _request(arguments), execution=_execution(arguments)))


def _explain(arguments: argparse.Namespace) -> int:
    from xaiseg.cohort import Settings, explain

    settings = Settings(
        methods=tuple(dict.fromkeys(arguments.method or ["smoothgrad"])),
        **{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings) if f.name != "methods"},
    )
    return _status(explain(_model(arguments), _request(arguments), settings, execution=_execution(arguments)))


def _how_far(arguments: argparse.Namespace) -> int:
    import json

    from xaiseg.cohort.status import lines, status

    found = status(arguments.output)
    print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else "\n".join(lines(found)))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from xaiseg.demo import run_demo

    return _status(run_demo(arguments.out, arguments.cases, arguments.samples, arguments.overwrite))


def _model(arguments: argparse.Namespace) -> Any:
    from xaiseg.checkpoints import load_model

    model = load_model(arguments.model)
    return model if arguments.threshold is None else model.with_spec(threshold=arguments.threshold)


def _request(arguments: argparse.Namespace) -> Any:
    from xaiseg.cohort import Request

    given = {f.name for f in dataclasses.fields(Request)} & set(vars(arguments))
    return Request(**{name: getattr(arguments, name) for name in given})


def _execution(arguments: argparse.Namespace) -> Any:
    from xaiseg.cohort import Execution

    if arguments.executor == "local" and (arguments.scheduler or arguments.workers or arguments.job_options):
        raise InputError("--scheduler, --workers, --job-option: are for --executor dask or slurm; give that too")
    return Execution(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Execution)})


def _status(rows: Sequence[dict[str, Any]]) -> int:
    return int(any(row["status"] in ("failed", "partial") for row in rows))
