"""Options of commands: what their texts may be, and those that several commands have."""

import argparse
import re
from itertools import pairwise
from pathlib import Path
from typing import Any


def command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run's files")


def opened_run(parser: argparse.ArgumentParser) -> None:
    """Of commands that open a finished run again with its network and its scans; see `analysis.reopened`."""
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of a finished `xaiseg explain`")
    parser.add_argument("--model", required=True, metavar="M", help="the model that the run explained")
    parser.add_argument(
        "--source", type=Path, metavar="INPUT", help="the run's manifest or BIDS folder, if it was moved"
    )


def chosen_lesions(parser: argparse.ArgumentParser, number: int | None, groups: str = "all") -> None:
    """Which lesions of a run. number: as many at most, by default. groups: what is said of those that are taken by default."""
    parser.add_argument("--groups", type=names, default=(), metavar="TP,FP", help=f"only these groups ({groups})")
    parser.add_argument(
        "--volume", type=span, default=(0.0, float("inf")), metavar="A:B", help="only lesions of A to B mm³"
    )
    parser.add_argument(
        "--lesions",
        type=positive,
        default=number,
        metavar="N",
        help=f"as many at most, drawn evenly over patients ({'all' if number is None else number})",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of what is drawn (%(default)s)")


def checked(convert: Any, holds: Any, expected: str) -> Any:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
        return value

    return parse


positive = checked(int, lambda n: n > 0, "a positive integer")
seed = checked(int, lambda n: 0 <= n < 2**31, "an integer from 0 to below 2³¹")
whole = checked(int, lambda n: n >= 0, "an integer not below 0")
not_negative = checked(float, lambda x: 0 <= x < float("inf"), "a number not below 0")
fraction = checked(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
probability = checked(float, lambda x: 0 < x < 1, "a number between 0 and 1")
portion = checked(float, lambda x: 0 < x <= 1, "a number above 0, up to 1")
names = checked(lambda t: tuple(p.strip() for p in t.split(",")), all, "names separated by commas")
numbers = checked(
    lambda t: tuple(int(p) for p in t.split(",")), lambda v: all(n > 0 for n in v), "labels separated by commas"
)
strides = checked(
    lambda t: [_stride(p) for p in t.split(",")],
    lambda v: all(min(s) > 0 if isinstance(s, tuple) else s > 0 for s in v),
    "positive integers, one per level, or one per axis as in 1x2x2",
)
window = checked(
    lambda t: [int(p) for p in t.split(",")], lambda v: len(v) == 3 and min(v) > 0, "three positive integers X,Y,Z"
)
span = checked(
    lambda t: tuple(float(p) if p else end for p, end in zip(t.split(":"), (0.0, float("inf")), strict=True)),
    lambda v: 0 <= v[0] < v[1],
    "A:B with 0 <= A < B, such as 50:200, :200 or 50:",
)


def _steps(text: str) -> tuple[float, ...]:
    if ":" not in text:
        return tuple(float(part) for part in text.split(","))
    first, last, step = (float(part) for part in text.split(":"))
    count = int((last - first) / step + 0.5) if step > 0 else -1
    return tuple(first + n * step for n in range(count + 1))


rising = checked(
    _steps,
    lambda v: len(v) > 0 and v[0] >= 0 and v[-1] < float("inf") and all(a < b for a, b in pairwise(v)),
    "rising numbers from 0 or more, A:B:STEP or a list, such as 0:20:2",
)


def shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}, expected I/N with I from 1 to N, such as 2/8")
    return int(match[1]), int(match[2])


def option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=VALUE")
    return name, value


def _stride(text: str) -> int | tuple[int, ...]:
    return tuple(map(int, text.split("x"))) if "x" in text else int(text)


def size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a size such as 500M or 4G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
