"""The command `context`: how much of its surroundings a lesion needs."""

import argparse
from typing import Any

import numpy as np

from xaiseg.cli import options


def add(commands: Any) -> None:
    parser = options.command(
        commands, "context", _context, "find how much of its surroundings the network needs to detect a lesion"
    )
    options.opened_run(parser)
    options.chosen_lesions(parser, None, "TP, or all without references")
    parser.add_argument(
        "--distances",
        type=options.rising,
        default=tuple(range(35)),
        metavar="A:B:STEP",
        help="mm from the lesion within which the image is kept, or a list A,B,C (0:34:1)",
    )
    parser.add_argument(
        "--background",
        type=_levels,
        default=(0.0,),
        metavar="V",
        help="of the normalised image, in place of what is taken away: one number, or one per channel V,W (0)",
    )
    parser.add_argument("--chunk", type=options.positive, help="images evaluated at once (1 on CPU, else 8)")


def _context(arguments: argparse.Namespace) -> int:
    from xaiseg.analysis.context_run import context
    from xaiseg.analysis.reopened import Choice
    from xaiseg.analysis.run_tables import read_run
    from xaiseg.checkpoints import load_model

    background = arguments.background
    context(
        read_run(arguments.output),
        load_model(arguments.model),
        Choice(arguments.groups, arguments.volume, arguments.lesions, arguments.seed),
        distances_mm=arguments.distances,
        background=background[0] if len(background) == 1 else background,
        source=arguments.source,
        chunk=arguments.chunk,
    )
    return 0


_levels = options.checked(
    lambda t: tuple(float(part) for part in t.split(",")),
    lambda v: bool(np.isfinite(v).all()),
    "one number, or one per channel separated by commas",
)
