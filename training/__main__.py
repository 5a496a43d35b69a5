"""`python -m training --config NAME --out DIR`: see `--help`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from training.cases import Cases, read_cases
from training.config import Config, load_config
from training.loop import train
from xaiseg.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    settings = list(args.set)
    settings += [f"{name}={getattr(args, name)}" for name in ("steps", "seed") if getattr(args, name) is not None]
    try:
        config = load_config(args.config, settings)
        folder = train(
            config, _cases(args, config), args.out, _command(args, settings), lambda line: print(line, flush=True)
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(f"model folder: {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train a segmentation network and write a model folder for `xaiseg segment` and `xaiseg explain`. "
        "Run again, the same command goes on where it stopped.",
    )
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a file of training/configs: example, unet, unet_cpu"
    )
    parser.add_argument(
        "--data", action="append", default=[], type=Path, help="BIDS folder or manifest; may be repeated"
    )
    parser.add_argument("--validation", default="", metavar="CASE,CASE", help="cases to hold out and validate with")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the run; the model is DIR/model"
    )
    parser.add_argument("--steps", type=int, help="steps of the optimiser")
    parser.add_argument("--seed", type=int, help="of the initial parameters and the patches")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any other field of the config"
    )
    return parser


def _cases(args: argparse.Namespace, config: Config) -> Cases:
    if config.phantoms:
        if args.data or args.validation:
            raise InputError(
                f"--data: config {args.config} draws synthetic brains; expected no scans: leave --data out"
            )
        return Cases([], [])
    if not args.data:
        raise InputError(f"--data: missing; config {args.config} needs scans: give a BIDS folder or a manifest")
    return read_cases(args.data, [name for name in args.validation.split(",") if name], config.channels)


def _command(args: argparse.Namespace, settings: list[str]) -> str:
    """The command that makes this model, without its destination."""
    words = ["python", "-m", "training", "--config", args.config]
    words += [word for path in args.data for word in ("--data", str(path))]
    words += ["--validation", args.validation] if args.validation else []
    words += [word for setting in settings for word in ("--set", setting)]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
