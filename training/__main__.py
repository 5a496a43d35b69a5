"""`python -m training --config NAME --out DIR`: see `--help`."""

import argparse
import logging
import re
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from training.cases import Cases, read_cases
from training.config import Config, changed, check, known_configs, load_config
from training.cross_validation import evaluate_held_out
from training.files import Stopped
from training.planned import PLANNED, planned
from xaiseg.errors import InputError
from xaiseg.imaging import Case


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 refused, 130 stopped by Ctrl-C, 143 by SIGTERM; both with the state saved."""
    args = _parser().parse_args(arguments)
    # Orbax writes in threads of its own, which log tracebacks for what is raised here afterwards and reported in one line
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    settings = list(args.set)
    settings += [f"{name}={getattr(args, name)}" for name in ("steps", "seed") if getattr(args, name) is not None]
    with _Stopping() as stopping:
        try:
            folder = _cross_validate(args, settings, stopping) if args.fold is None else _run(args, settings, stopping)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except OSError as error:  # of the disk, a log line or a table that found no room
            print(
                f"error: {error.filename or args.out}: {error.strerror or error}; what was saved before is intact: mend that and "
                "give the same command again",
                file=sys.stderr,
            )
            return 1
        except Stopped as stopped:
            print(f"{stopped}; the same command goes on from there", file=sys.stderr)
            return 128 + (stopping.signal or signal.SIGINT)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
            return 128 + (stopping.signal or signal.SIGINT)
    print(f"evaluation: {folder}" if args.fold is None else f"model folder: {folder}")
    return 0


def _without_late_threads(late: "sys.UnraisableHookArgs") -> None:
    """For `sys.unraisablehook`, which Python gives what C++ threads could not deliver: Tensorstore's writes, after one of them
    found the disk full and Orbax has stopped to listen. The first is raised in the main thread, which says so in one line."""
    if not (late.exc_type is RuntimeError and str(late.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(late)


def _cross_validate(args: argparse.Namespace, settings: Sequence[str], stopping: "_Stopping") -> Path:
    """Each fold held out in turn, in `DIR/fold-0`, …; folds that are done cost nothing when the command is given again."""
    if not (args.folds or args.splits):
        raise InputError("--fold all: expected folds: give --folds K or --splits TSV")
    held_out: list[list[Case]] = []
    count = 1  # until the cases are read
    while len(held_out) < count:
        number = len(held_out)
        of_fold = argparse.Namespace(**{**vars(args), "fold": number, "out": args.out / f"fold-{number}"})
        config, cases, plans = _config_and_cases(of_fold, settings)
        count = len(cases.folds)
        held_out.append(cases.validation)
        print(f"fold {number} of {count}, held out: {', '.join(case.name for case in cases.validation)}", flush=True)
        _train(of_fold, settings, stopping, config, cases, plans)
    if len(config.thresholds) > 1 or config.steps > config.validate_every:
        print("note: step or threshold are those that were best on the held-out cases, so the numbers are optimistic")
    stopping.at_once = True  # nothing of what follows needs to be saved
    return evaluate_held_out(args.out, config.channels, held_out, cases.patients or {})


def _run(args: argparse.Namespace, settings: Sequence[str], stopping: "_Stopping") -> Path:
    return _train(args, settings, stopping, *_config_and_cases(args, settings))


def _train(
    args: argparse.Namespace, settings: Sequence[str], stopping: "_Stopping", config: Config, cases: Cases, plans: str
) -> Path:
    from training.loop import train  # says so where an optional library is missing

    return train(
        config,
        cases,
        args.out,
        _command(args, settings),
        lambda line: print(line, flush=True),
        devices=args.devices,
        stop=lambda: stopping.signal is not None,
        tensorboard=args.tensorboard,
        plans=plans,
    )


def _config_and_cases(args: argparse.Namespace, settings: Sequence[str]) -> tuple[Config, Cases, str]:
    """And nnU-Net's plans, where the config asks for them."""
    config, plans = load_config(args.config), ""
    # what is set counts more than what is planned, and may not fit without it
    own = settings if not config.planner else [s for s in settings if re.split("[.=]", s)[0] not in PLANNED]
    config = check(changed(config, own))
    cases = _cases(args, config)
    if config.planner:
        config, plans = planned(config, cases.training, args.out, args.plans)
        config = check(changed(config, settings))
    elif args.plans:
        raise InputError(
            f"--plans: config {args.config} has no planner; expected one that has, nnunet: leave --plans out"
        )
    return config, cases, plans


class _Stopping:
    """Remembers the first Ctrl-C or SIGTERM, after which the step at hand is finished and saved; the second interrupts at once, and
    the first does where `at_once` says so."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at_once = False
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> Any:
        again, self.signal = self.signal is not None, number
        if again or self.at_once:
            raise KeyboardInterrupt

    def __enter__(self) -> "_Stopping":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _fold(text: str) -> int | None:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 on nor 'all'")
    return None if text == "all" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train a segmentation network and write a model folder for `xaiseg segment` and `xaiseg explain`. "
        "Run again, the same command goes on where it stopped.",
    )
    parser.add_argument(
        "--config", required=True, metavar="NAME", help=f"a file of training/configs: {', '.join(known_configs())}"
    )
    parser.add_argument(
        "--data", action="append", default=[], type=Path, help="BIDS folder or manifest; may be repeated"
    )
    parser.add_argument("--validation", default="", metavar="CASE,CASE", help="cases to hold out and validate with")
    parser.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="instead: split the patients into K folds of like lesion load; K = patients leaves one out at a time",
    )
    parser.add_argument(
        "--fold",
        type=_fold,
        default=0,
        metavar="I",
        help="the fold to hold out, from 0; all: each in turn, then `xaiseg evaluate` of all held-out cases together",
    )
    parser.add_argument(
        "--splits", type=Path, metavar="TSV", help="instead: folds as a splits.tsv names them, as a run writes it"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the run; the model is DIR/model"
    )
    parser.add_argument(
        "--plans", type=Path, metavar="JSON", help="nnU-Net's plans.json for config nnunet, instead of making a plan"
    )
    parser.add_argument("--steps", type=int, help="steps of the optimiser")
    parser.add_argument("--seed", type=int, help="of the initial parameters, the patches and their augmentation")
    parser.add_argument("--devices", type=int, default=1, help="devices of this machine that share each batch")
    parser.add_argument("--tensorboard", action="store_true", help="write DIR/tensorboard too")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the config, or a part of it: augmentation.affine=0, loss.blob=1",
    )
    return parser


def _cases(args: argparse.Namespace, config: Config) -> Cases:
    if config.phantoms:
        if args.data or args.validation or args.folds or args.splits:
            raise InputError(
                f"--data: config {args.config} draws synthetic brains; expected no scans: leave --data out"
            )
        return Cases([], [])
    if not args.data:
        raise InputError(f"--data: missing; config {args.config} needs scans: give a BIDS folder or a manifest")
    if args.fold and not (args.folds or args.splits):
        raise InputError(f"--fold {args.fold}: expected folds to choose from: give --folds K or --splits TSV")
    if sum(map(bool, (args.validation, args.folds, args.splits))) > 1:
        raise InputError("--validation, --folds, --splits: expected one of them: leave the others out")
    named = [name for name in args.validation.split(",") if name]
    return read_cases(args.data, named, config.channels, args.folds, args.splits, args.fold, config.seed)


def _command(args: argparse.Namespace, settings: Sequence[str]) -> str:
    """The command that makes this model, without its destination."""
    words = ["python", "-m", "training", "--config", args.config]
    words += [word for path in args.data for word in ("--data", str(path))]
    words += ["--validation", args.validation] if args.validation else []
    words += ["--folds", str(args.folds), "--fold", str(args.fold)] if args.folds else []
    words += ["--splits", str(args.splits), "--fold", str(args.fold)] if args.splits else []
    words += ["--plans", str(args.plans)] if args.plans else []
    words += [word for setting in settings for word in ("--set", setting)]
    return shlex.join(words)


if __name__ == "__main__":
    sys.unraisablehook = _without_late_threads
    sys.exit(main())
