"""The command `sanity`: can a run's explanations be trusted, and which explainer most?"""

import argparse
from typing import Any

from xaiseg.cli import options


def add(commands: Any) -> None:
    parser = options.command(
        commands,
        "sanity",
        _sanity,
        "compare explainers on the same lesions by measures of faithfulness, with controls that must fail",
    )
    options.opened_run(parser)
    options.chosen_lesions(parser, 6)
    parser.add_argument(
        "--explainer",
        dest="explainers",
        action="append",
        default=[],
        metavar="NAME",
        help="repeat it for more: a method of `xaiseg explain`, with options after a colon if need be, such as "
        "smoothgrad:samples=20,aggregate=mean; or a control, random or edges (the run's methods, gradient, input-x-gradient, "
        "random, edges)",
    )
    parser.add_argument(
        "--measures",
        type=options.names,
        metavar="A,B",
        help="deletion, insertion, infidelity, faithfulness_correlation, max_sensitivity, localisation, leakage, random_instance, "
        "randomisation, smooth_randomisation (all but the last)",
    )
    parser.add_argument(
        "--samples",
        type=options.positive,
        default=50,
        help="of infidelity and faithfulness correlation, at least 2 (%(default)s)",
    )
    parser.add_argument(
        "--margin",
        type=options.whole,
        default=16,
        help="voxels around the lesion that are replaced and compared (%(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=options.positive,
        default=5,
        help="in which randomisation goes from the last layer to the first (%(default)s)",
    )
    parser.add_argument("--chunk", type=options.positive, help="images evaluated at once (1 on CPU, else 8)")


def _sanity(arguments: argparse.Namespace) -> int:
    from xaiseg.analysis.reopened import Choice
    from xaiseg.analysis.run_tables import read_run
    from xaiseg.analysis.sanity import SanitySettings
    from xaiseg.analysis.sanity_run import USUAL, compare_explainers
    from xaiseg.checkpoints import load_model

    settings = SanitySettings(
        measures=arguments.measures or USUAL,
        margin=arguments.margin,
        samples=arguments.samples,
        steps=arguments.steps,
        chunk=arguments.chunk,
    )
    compare_explainers(
        read_run(arguments.output),
        load_model(arguments.model),
        Choice(arguments.groups, arguments.volume, arguments.lesions, arguments.seed),
        arguments.explainers,
        settings,
        source=arguments.source,
    )
    return 0
