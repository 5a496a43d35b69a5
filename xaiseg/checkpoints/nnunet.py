"""A result folder of nnU-Net v2, `<trainer>__<plans>__<configuration>`, read without nnunetv2 or PyTorch.

The folder holds plans.json, dataset.json and `fold_*/checkpoint_{final,best}.pth`; the folds are one network trained on parts of
the cases, and nnU-Net averages their logits. Facts are those of nnunetv2 2.8.1.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xaiseg.checkpoints.mapping import read_variables
from xaiseg.checkpoints.nnunet_keys import canonical_state, check_channels, key_map
from xaiseg.checkpoints.nnunet_plans import Plan, difference, read_plan
from xaiseg.checkpoints.nnunet_training import (
    BATCH_NORM_TRAINER,
    Dataset,
    Training,
    check_trainer,
    read_dataset,
    read_training,
)
from xaiseg.checkpoints.torch_file import read_checkpoint
from xaiseg.errors import InputError

_CHECKPOINTS = ("final", "best")


class NnunetReading(NamedTuple):
    """A trained nnU-Net.

    architecture, options: `plain_conv_unet` or `residual_encoder_unet` and the arguments of its module.
    channels: input sequences in order.
    window, mirror_axes: the patch in voxels and the axes that nnU-Net mirrors in inference, both along the axes that preprocessing
      makes; a 2-D configuration has the window (1, h, w), whose first axis is the slices.
    members: fold -> variables, float32 numpy leaves.
    classes: names of the logits' channels. regions: they are regions, each with its own sigmoid; else labels under one softmax.
    target_class: the channel of the lesion, None where it must be chosen.
    preprocessing: what `NnunetPreprocessing.from_dict` takes.
    default_layer: the tap for Grad-CAM++.
    notes: JSON-able, where the parameters come from. source_files: all files that were read.
    """

    architecture: str
    options: dict[str, Any]
    channels: tuple[str, ...]
    window: tuple[int, int, int]
    mirror_axes: tuple[int, ...]
    members: dict[str, dict[str, Any]]
    classes: tuple[str, ...]
    regions: bool
    target_class: int | None
    preprocessing: dict[str, Any]
    default_layer: str
    notes: dict[str, Any]
    source_files: tuple[Path, ...]


class _Place(NamedTuple):
    folder: Path
    fold: str | None
    checkpoint: str | None


def recognise(path: str | Path) -> bool:
    """Whether `path` is a result folder, complete or not, its `fold_k`, or a `checkpoint_*.pth` within that."""
    folder, fold, checkpoint = _place(Path(path))
    described = any((folder / name).is_file() for name in ("plans.json", "dataset.json"))
    if checkpoint is not None:
        return described
    if fold is not None:
        return described or any((folder / fold).glob("checkpoint_*.pth"))
    return described or any(p.is_dir() for p in folder.glob("fold_*"))


def read(
    path: str | Path, folds: Sequence[str] | None = None, checkpoint: str = "final", any_trainer: bool = False
) -> NnunetReading:
    """Read the folds of a result folder. `path` may also be one `fold_k` in it, or a checkpoint of that.

    folds: names such as `0`, `fold_0` or `all`; by default all that hold the checkpoint, `fold_all` only where it is alone, as
    nnU-Net does. checkpoint: `final` or `best`; a file given as `path` has its own. any_trainer: accept trainers other than
    nnU-Net's own, whose network is then taken to be the planned one.

    Raises InputError for what is missing, damaged or disagrees, between files or folds, and for what cannot be converted.
    """
    folder, fold, named = _place(Path(path))
    checkpoint = named or checkpoint
    if checkpoint not in _CHECKPOINTS:
        raise InputError(f"{path}: checkpoint {checkpoint!r}; only final and best can be converted")
    if fold is not None:
        if folds is not None and {_fold(f) for f in folds} != {fold}:
            raise InputError(f"{path}: is {fold}, but folds {', '.join(folds)} are asked for; give the folder above it")
        folds = [fold]
    files = _checkpoints(folder, folds, checkpoint)
    plans_file, dataset_file = folder / "plans.json", folder / "dataset.json"
    plans, described = _json(plans_file), _json(dataset_file)
    dataset = read_dataset(described, str(dataset_file))

    plan: Plan | None = None
    first: Training | None = None
    options: dict[str, Any] = {}
    members, epochs = {}, {}
    for name, file in files.items():
        content = read_checkpoint(file)
        weights = content.get("network_weights") if isinstance(content, Mapping) else None
        if not isinstance(weights, Mapping):
            raise InputError(
                f"{file}: not an nnU-Net v2 checkpoint, it holds no network_weights; take nnU-Net's own file"
            )
        training = read_training(content, folder, file)
        if plan is None or first is None:
            if not any_trainer:
                check_trainer(training.trainer, file)
            plan, first = read_plan(plans, training.configuration, described, str(plans_file)), training
            _check_fit(plan, dataset, training, dataset_file, file)
        for what, one, other in zip(Training._fields, first, training, strict=True):
            if one != other:
                raise InputError(
                    f"{file}: {what} is {other!r}, but {one!r} in {next(iter(files))}; the folds are not of one training: "
                    "choose those that are with --fold"
                )
        _check_agreement(content, training, plan, dataset, described, file)
        state = canonical_state(weights, str(file))
        if not options:
            options = plan.options | {"out_channels": len(dataset.classes)}
            tracked = any(key.endswith("running_mean") for key in state)
            if tracked and (any_trainer or training.trainer == BATCH_NORM_TRAINER):
                options["norm"] = "batch"
        check_channels(state, len(dataset.channels), len(dataset.classes), str(file))
        wanted = key_map(plan.architecture, options, len(dataset.channels))
        members[name] = read_variables(state, wanted, str(file), f"the planned {plan.architecture}")
        epochs[name] = content.get("current_epoch")
    assert plan is not None
    assert first is not None

    flat = len(plan.patch_size) == 2
    x, y, z = (1, *plan.patch_size) if flat else plan.patch_size
    return NnunetReading(
        architecture=plan.architecture,
        options=options,
        channels=dataset.channels,
        window=(x, y, z),
        mirror_axes=tuple(axis + flat for axis in first.mirroring),
        members=members,
        classes=dataset.classes,
        regions=dataset.regions,
        target_class=dataset.target_class,
        preprocessing=plan.preprocessing,
        default_layer="decoder1.up" if len(options["features"]) > 2 else "decoder0.up",
        notes={
            "trainer": first.trainer,
            "configuration": first.configuration,
            "plans": plans.get("plans_name"),
            "dataset": plans.get("dataset_name"),
            "checkpoint": f"checkpoint_{checkpoint}.pth",
            "epochs": epochs,
        },
        source_files=(plans_file, dataset_file, *files.values()),
    )


def _place(path: Path) -> _Place:
    whole = path.absolute()
    match = re.fullmatch(r"checkpoint_(\w+)\.pth", whole.name)
    if match and whole.parent.name.startswith("fold_"):
        return _Place(whole.parent.parent, whole.parent.name, match[1])
    if whole.name.startswith("fold_"):
        return _Place(whole.parent, whole.name, None)
    return _Place(path, None, None)


def _fold(name: str) -> str:
    return f"fold_{str(name).removeprefix('fold_')}"


def _by_number(fold: str) -> tuple[bool, int, str]:
    number = fold.removeprefix("fold_")
    return not number.isdecimal(), int(number) if number.isdecimal() else 0, fold


def _checkpoints(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> dict[str, Path]:
    """Fold -> file, in the order of the folds' numbers."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give an nnU-Net v2 result folder")
    there = {
        kind: sorted((p.parent.name for p in folder.glob(f"fold_*/checkpoint_{kind}.pth")), key=_by_number)
        for kind in _CHECKPOINTS
    }
    present = there[checkpoint]
    default = [f for f in present if f != "fold_all"] or present
    wanted = default if folds is None else sorted({_fold(f) for f in folds}, key=_by_number)
    missing = [f for f in wanted if f not in present]
    if missing or not wanted:
        lacking = (
            f"{', '.join(missing)} with checkpoint_{checkpoint}.pth" if missing else f"any checkpoint_{checkpoint}.pth"
        )
        found = "; ".join(f"checkpoint_{kind}.pth in {', '.join(names)}" for kind, names in there.items() if names)
        raise InputError(
            f"{folder}: lacks {lacking}; there is {found or 'none, nor another'}; choose from those with --fold and --checkpoint, "
            "or finish the training"
        )
    return {name: folder / name / f"checkpoint_{checkpoint}.pth" for name in wanted}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; an nnU-Net v2 result folder has it: copy the whole folder") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; take the file of this training")
    return content


def _check_fit(plan: Plan, dataset: Dataset, training: Training, dataset_file: Path, file: Path) -> None:
    planned = len(plan.preprocessing["normalisation"])
    if len(dataset.channels) != planned:
        raise InputError(
            f"{dataset_file}: names {len(dataset.channels)} channels, plans.json normalises {planned}; "
            "take both files of this training"
        )
    ndim = len(plan.patch_size)
    if any(not 0 <= axis < ndim for axis in training.mirroring):
        raise InputError(
            f"{file}: mirrors along axes {training.mirroring} of a {ndim}-D patch; take nnU-Net's own file"
        )


def _check_agreement(
    content: Mapping[str, Any],
    training: Training,
    plan: Plan,
    dataset: Dataset,
    described: Mapping[str, Any],
    file: Path,
) -> None:
    """The checkpoint holds the plans and dataset.json of its own training; those of the folder may be another's."""
    init = content.get("init_args")
    own = init if isinstance(init, Mapping) else {}
    if isinstance(own.get("dataset_json"), Mapping):
        described = own["dataset_json"]
        within = read_dataset(described, f"{file} (dataset.json within)")
        for what, one, other in zip(Dataset._fields, within, dataset, strict=True):
            if one != other:
                raise InputError(
                    f"{file}: {what} is {one}, but {other} in dataset.json; take the dataset.json of this training"
                )
    if isinstance(own.get("plans"), Mapping):
        found = difference(read_plan(own["plans"], training.configuration, described, f"{file} (plans within)"), plan)
        if found is not None:
            raise InputError(f"{file}: {found} in plans.json; take the plans.json of this training")
