"""Commands about models: `convert`, `inspect`, `models`."""

import argparse
from pathlib import Path
from typing import Any

from xaiseg.cli import options
from xaiseg.errors import InputError


def add(commands: Any) -> None:
    convert = options.command(commands, "convert", _convert, "turn a trained PyTorch checkpoint into a model folder")
    convert.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a .pth file (MONAI UNet, DynUNet, SwinUNETR) or an nnU-Net result folder",
    )
    convert.add_argument("model", type=Path, metavar="OUT_MODEL", help="the model folder to write")
    convert.add_argument(
        "--channels",
        type=options.names,
        metavar="A,B",
        help="input sequences in order (an nnU-Net's; FLAIR,T1w for two channels)",
    )
    convert.add_argument(
        "--window",
        type=options.window,
        metavar="X,Y,Z",
        help="sides of the sliding window in voxels (an nnU-Net's plan; else needed)",
    )
    convert.add_argument(
        "--strides",
        type=options.strides,
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
        "--fold", dest="folds", type=options.names, metavar="0,1", help="of an nnU-Net (all there are, averaged)"
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
    convert.add_argument("--overlap", type=options.fraction, help="overlap of windows, from 0 to below 1 (0.25)")
    convert.add_argument(
        "--threshold",
        type=options.probability,
        help="on the lesion probability (0.3 for a UNet, 0.4 for DynUNet and SwinUNETR; an nnU-Net: most probable class)",
    )
    convert.add_argument("--connectivity", type=int, choices=(6, 18, 26), help="of the instances (18)")
    convert.add_argument(
        "--orientation",
        metavar="CODES",
        help="axis codes the network was trained in, e.g. RAS (native: as files store them)",
    )
    convert.add_argument("--target-class", type=int, help="index of the lesion class in the logits (1)")
    options.overwrite(convert)

    inspect = options.command(
        commands, "inspect", _inspect, "print a model's network, taps, receptive field, compute and memory"
    )
    inspect.add_argument("model", metavar="MODEL", help="a model folder, or a name of `xaiseg models`")

    models = options.command(
        commands, "models", _models, "list the models that come with xaiseg, or show the card of one"
    )
    models.add_argument("name", nargs="?", metavar="NAME", help="whose card to show: data, recipe, results, limits")


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
