"""The `xaiseg` command."""

import argparse
import dataclasses
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xaiseg._version import __version__
from xaiseg.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 all done, 1 something failed, 2 wrong usage, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        # A scheduler's time limit is an interruption too: what is half done is taken back.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return arguments.run(arguments)
    except (InputError, OSError) as error:
        print(f"xaiseg: error: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"xaiseg: error: out of memory ({error}); give a smaller --memory or --chunk", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("xaiseg: interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    except Exception as error:
        from xaiseg.cohort.stopping import Stopped

        if not isinstance(error, Stopped):
            raise
        print(f"xaiseg: stopped: {error}", file=sys.stderr)
        return 130


def _convert(arguments: argparse.Namespace) -> int:
    from xaiseg.checkpoints import convert, save_model
    from xaiseg.inspection import as_lines, summary

    names = (
        "window",
        "strides",
        "norm",
        "activation",
        "patch_merging",
        "remat",
        "folds",
        "overlap",
        "threshold",
        "connectivity",
    )
    settings = {
        name: value
        for name in (*names, "orientation", "target_class", "checkpoint", "any_trainer", "mirroring")
        if (value := getattr(arguments, name)) is not None
    }
    model = convert(arguments.source, arguments.channels, **settings)
    folder = save_model(arguments.model, model, arguments.overwrite)
    print(f"{folder}: {model.spec.architecture}, {model.parameter_count:,} parameters")
    print("\n".join(f"  {line}" for line in as_lines(summary(model))))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from xaiseg.checkpoints import load_model
    from xaiseg.inspection import describe, inspect

    model = load_model(arguments.model)
    print("\n".join(describe(model, inspect(model))))
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from xaiseg.checkpoints import model_card, shipped_models

    known = shipped_models()
    if not arguments.name:
        print("\n".join(model_card(name).splitlines()[0].removeprefix("# ") for name in known))
        return 0
    if arguments.name not in known:
        raise InputError(f"{arguments.name}: is no model of this package; known are {', '.join(known)}: choose one")
    print(model_card(arguments.name), end="")
    return 0


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


def _evaluate(arguments: argparse.Namespace) -> int:
    from xaiseg.cohort.evaluate import EvaluationRequest, evaluate
    from xaiseg.metrics import EvaluationSettings

    def chosen(kind: Any) -> Any:
        return kind(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(kind)})

    evaluate(chosen(EvaluationRequest), chosen(EvaluationSettings))
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("xaiseg", description="Explain 3-D segmentation networks lesion by lesion.")
    parser.add_argument("--version", action="version", version=f"xaiseg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = _command(commands, "convert", _convert, "turn a trained PyTorch checkpoint into a model folder")
    convert.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a .pth file (MONAI UNet, DynUNet, SwinUNETR) or an nnU-Net result folder",
    )
    convert.add_argument("model", type=Path, metavar="OUT_MODEL", help="the model folder to write")
    convert.add_argument(
        "--channels",
        type=_names,
        metavar="A,B",
        help="input sequences in order (an nnU-Net's; FLAIR,T1w for two channels)",
    )
    convert.add_argument(
        "--window",
        type=_window,
        metavar="X,Y,Z",
        help="sides of the sliding window in voxels (an nnU-Net's plan; else needed)",
    )
    convert.add_argument(
        "--strides",
        type=_strides,
        metavar="2,2,…",
        help="of the levels, where keys do not tell; 1x2x2 for one per axis (2 each for a UNet, 1 first for a DynUNet)",
    )
    convert.add_argument("--norm", help="where keys do not tell: instance, none, instance_affine or group:N")
    convert.add_argument("--activation", help="where keys do not tell: leakyrelu, relu, gelu or swish")
    convert.add_argument(
        "--patch-merging",
        choices=("legacy", "merging", "mergingv2"),
        help="of a SwinUNETR, which keys do not tell (its error message explains the three)",
    )
    convert.add_argument(
        "--remat",
        action="store_true",
        default=None,
        help="of a SwinUNETR: recompute its blocks, slower and in less memory",
    )
    convert.add_argument(
        "--fold", dest="folds", type=_names, metavar="0,1", help="of an nnU-Net (all there are, averaged)"
    )
    convert.add_argument("--checkpoint", choices=("final", "best"), help="of an nnU-Net (final)")
    convert.add_argument(
        "--any-trainer", action="store_true", default=None, help="take an nnU-Net trainer that xaiseg does not know"
    )
    convert.add_argument(
        "--no-mirroring",
        dest="mirroring",
        action="store_false",
        default=None,
        help="one pass of an nnU-Net instead of the mean over its mirrorings",
    )
    convert.add_argument("--overlap", type=_fraction, help="overlap of windows, from 0 to below 1 (0.25)")
    convert.add_argument(
        "--threshold",
        type=_probability,
        help="on the lesion probability (0.3 for a UNet, 0.4 for DynUNet and SwinUNETR; an nnU-Net: most probable class)",
    )
    convert.add_argument("--connectivity", type=int, choices=(6, 18, 26), help="of the instances (18)")
    convert.add_argument(
        "--orientation",
        metavar="CODES",
        help="axis codes the network was trained in, e.g. RAS (native: as files store them)",
    )
    convert.add_argument("--target-class", type=int, help="index of the lesion class in the logits (1)")
    _overwrite(convert)

    inspect = _command(
        commands, "inspect", _inspect, "print a model's network, taps, receptive field, compute and memory"
    )
    inspect.add_argument("model", metavar="MODEL", help="a model folder, or a name of `xaiseg models`")

    models = _command(commands, "models", _models, "list the models that come with xaiseg, or show the card of one")
    models.add_argument("name", nargs="?", metavar="NAME", help="whose card to show: data, recipe, results, limits")

    segment = _command(commands, "segment", _segment, "segment the lesions of every case")
    _cohort(segment)

    explain = _command(commands, "explain", _explain, "segment, then explain every lesion")
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
    explain.add_argument("--samples", type=_positive, default=50, help="noise samples (%(default)s)")
    explain.add_argument(
        "--tolerance",
        type=_probability,
        help="stop sampling a lesion when the standard error of its peak is this fraction of it, e.g. 0.05",
    )
    explain.add_argument(
        "--noise",
        type=_not_negative,
        default=0.05,
        help="σ as a fraction of the FLAIR intensity range (%(default)s); 0: plain gradient",
    )
    explain.add_argument(
        "--instances",
        choices=("predicted", "reference", "given"),
        default="predicted",
        help="what to explain: predicted lesions, those of the reference mask, or of the manifest's label map (%(default)s)",
    )
    explain.add_argument("--lesions", type=_numbers, metavar="3,7", help="only these labels, whatever their size")
    explain.add_argument("--min-voxels", type=_positive, default=6, help="smaller instances are left out (%(default)s)")
    explain.add_argument(
        "--layer",
        dest="layers",
        type=_names,
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
    explain.add_argument("--steps", type=_positive, default=50, help="of integrated gradients (%(default)s)")
    explain.add_argument("--patch", type=_positive, default=8, help="side of occlusion's patch in voxels (%(default)s)")
    explain.add_argument(
        "--margin", type=_whole, default=16, help="voxels around a lesion that occlusion tries (%(default)s)"
    )
    explain.add_argument(
        "--precision",
        choices=("float32", "tf32", "bfloat16"),
        default="float32",
        help="of the network while it explains; the plan tells the error (%(default)s)",
    )
    explain.add_argument("--devices", type=_positive, metavar="N", help="how many to use (all; on CPU 1)")
    explain.add_argument("--seed", type=_seed, default=0, help="of the noise (%(default)s)")
    explain.add_argument("--chunk", type=_positive, help="Jacobian rows at once (what is fast and fits)")
    explain.add_argument(
        "--memory", type=_bytes, metavar="4G", help="bound on a chunk's temporaries and on the maps kept at once"
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

    evaluate = _command(commands, "evaluate", _evaluate, "compare segmentations with reference masks")
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
    evaluate.add_argument("--cases", type=_names, default=(), metavar="A,B", help="only these cases")
    evaluate.add_argument(
        "--threshold",
        type=_probability,
        help="on probability maps (the masks as segmented; 0.5 for maps in the manifest)",
    )
    evaluate.add_argument(
        "--min-voxels", type=_whole, default=1, help="smaller predicted lesions are removed (%(default)s)"
    )
    evaluate.add_argument("--connectivity", type=int, choices=(6, 18, 26), default=18, help="of lesions (%(default)s)")
    evaluate.add_argument(
        "--rule",
        default="overlap",
        metavar="NAME",
        help="by which lesions match: overlap (a shared voxel) or iou (%(default)s)",
    )
    evaluate.add_argument("--iou", type=_portion, default=0.25, help="that the rule iou asks for (%(default)s)")
    evaluate.add_argument("--r", type=_probability, default=0.001, help="lesion load of nDSC (%(default)s)")
    evaluate.add_argument(
        "--brain",
        action="store_true",
        help="V of nDSC and specificity: voxels where any image is not 0 (all voxels of the array)",
    )
    evaluate.add_argument(
        "--channels",
        type=_names,
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
        "--bootstrap", type=_positive, default=2000, help="resamples of patients for intervals (%(default)s)"
    )
    evaluate.add_argument("--seed", type=_seed, default=0, help="of the bootstrap (%(default)s)")
    _overwrite(evaluate)

    status = _command(commands, "status", _how_far, "tell how far a run is: done, running, failed, left, estimated end")
    status.add_argument("output", type=Path, metavar="OUT", help="output folder of `xaiseg explain` or `segment`")
    status.add_argument("--json", action="store_true", help="for programs")

    demo = _command(commands, "demo", _demo, "the built-in example: segment and explain unseen phantoms")
    demo.add_argument("--out", type=Path, default=Path("xaiseg-demo"), help="folder to write (%(default)s)")
    demo.add_argument("--cases", type=_positive, default=2, help="phantoms (%(default)s)")
    demo.add_argument("--samples", type=_positive, default=4, help="noise samples (%(default)s)")
    _overwrite(demo)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


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
    parser.add_argument("--cases", type=_names, default=(), metavar="A,B", help="only these cases")
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
        "--shard", type=_shard, metavar="I/N", help="only the I-th of N parts of the cases; parts may run at once"
    )
    parser.add_argument("--index", choices=("pybids",), help="find the cases of a BIDS folder with pybids")
    parser.add_argument(
        "--executor",
        choices=("local", "dask", "slurm"),
        default="local",
        help="this process, Dask workers, or SLURM jobs (%(default)s)",
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of Dask, tcp://host:port (workers of its own)")
    parser.add_argument("--workers", type=_positive, metavar="N", help="processes, or SLURM jobs, to start")
    parser.add_argument(
        "--job-option",
        dest="job_options",
        action="append",
        type=_option,
        default=[],
        metavar="NAME=VALUE",
        help="of a SLURM job, as dask-jobqueue's SLURMCluster takes it: cores=4, memory=32GB, queue=gpu, walltime=04:00:00",
    )
    parser.add_argument("--stop-on-first-crash", action="store_true", help="leave the rest when something fails")
    parser.add_argument("--threshold", type=_probability, help="on the lesion probability (the model's)")
    parser.add_argument(
        "--whole-volume", action="store_true", help="take each volume in one piece instead of in windows"
    )
    parser.add_argument("--resample", action="store_true", help="bring other channels onto the first channel's grid")
    _overwrite(parser)


def _overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run's files")


def _checked(convert: Any, holds: Any, expected: str) -> Any:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
        return value

    return parse


_positive = _checked(int, lambda n: n > 0, "a positive integer")
_seed = _checked(int, lambda n: 0 <= n < 2**31, "an integer from 0 to below 2³¹")
_whole = _checked(int, lambda n: n >= 0, "an integer not below 0")
_not_negative = _checked(float, lambda x: 0 <= x < float("inf"), "a number not below 0")
_fraction = _checked(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
_probability = _checked(float, lambda x: 0 < x < 1, "a number between 0 and 1")
_portion = _checked(float, lambda x: 0 < x <= 1, "a number above 0, up to 1")
_names = _checked(lambda t: tuple(p.strip() for p in t.split(",")), all, "names separated by commas")
_numbers = _checked(
    lambda t: tuple(int(p) for p in t.split(",")), lambda v: all(n > 0 for n in v), "labels separated by commas"
)
_strides = _checked(
    lambda t: [_stride(p) for p in t.split(",")],
    lambda v: all(min(s) > 0 if isinstance(s, tuple) else s > 0 for s in v),
    "positive integers, one per level, or one per axis as in 1x2x2",
)
_window = _checked(
    lambda t: [int(p) for p in t.split(",")], lambda v: len(v) == 3 and min(v) > 0, "three positive integers X,Y,Z"
)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}, expected I/N with I from 1 to N, such as 2/8")
    return int(match[1]), int(match[2])


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=VALUE")
    return name, value


def _stride(text: str) -> int | tuple[int, ...]:
    return tuple(map(int, text.split("x"))) if "x" in text else int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a size such as 500M or 4G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


if __name__ == "__main__":
    sys.exit(main())
