"""A config of which nnU-Net's plan decides the rest: made here from the training cases, or read from a `plans.json`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from training.config import Config
from training.fingerprint import LoadedCase, take_fingerprint
from training.nnunet_plan import read_plan, training_plan
from training.nnunet_planner import make_plans
from xaiseg.errors import InputError
from xaiseg.imaging import Case, nifti

PLANNED = ("architecture", "options", "patch", "window", "batch", "dice_over_batch", "preprocessing")
"""Fields of a config that a plan decides about."""

_SAMPLES = 10_000_000  # of lesion intensities, which only CT's normalisation would use; nnU-Net draws ten times as many
# Volumes are read as stored, which is how SimpleITK's reader has them.
_READER = "SimpleITKIO"


def planned(config: Config, cases: Sequence[Case], out: Path, file: Path | None = None) -> tuple[Config, str]:
    """The config with its network, patch, batch, Dice and preprocessing as planned, and the plan as text.

    The plan is read from `file`, from the folder of a run that was begun, or made from the training cases.

    Raises InputError where the plan or a case cannot be used, or the plan has other channels.
    """
    begun = Path(out) / "plans.json"
    if file is not None or begun.is_file():
        source = Path(file or begun)
        plan, text = read_plan(source), source.read_text()
    else:
        source = Path("plans.json")
        print(f"reading {len(cases)} cases for nnU-Net's fingerprint", flush=True)
        found = take_fingerprint(_loaded(cases, config.channels), len(cases), samples=_SAMPLES)
        plans = make_plans(found, config.channels, planner=config.planner, reader=_READER)
        plan, text = training_plan(plans), json.dumps(plans, indent=2) + "\n"
    if plan.preprocessing.channels != len(config.channels):
        raise InputError(
            f"{source}: plans {plan.preprocessing.channels} channels, expected {', '.join(config.channels)}; "
            "give the plans of this data, or name its channels with --set channels=…"
        )
    return replace(
        config,
        architecture=plan.architecture,
        options={**plan.options, "out_channels": 2},
        patch=plan.patch_size,
        window=plan.patch_size,
        batch=plan.batch_size,
        dice_over_batch=plan.batch_dice,
        preprocessing=json.loads(json.dumps(plan.preprocessing.to_dict())),
    ), text


def _loaded(cases: Sequence[Case], channels: Sequence[str]) -> Iterator[LoadedCase]:
    for case in cases:
        assert case.reference is not None
        volumes = []
        for channel in channels:
            volume, grid, header = nifti.read(case.images[channel])
            volumes.append(volume)
        reference = nifti.read_labels(case.reference, grid)
        x, y, z = (float(side) for side in header.get_zooms()[:3])
        yield LoadedCase(np.stack(volumes, -1), reference > 0, (x, y, z), case.name)
