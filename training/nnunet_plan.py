"""How nnU-Net trains one configuration of a plans.json: patch, network, preprocessing, and the recipe of its trainer.

Source: `nnUNetTrainer` of nnunetv2 2.8.1. Everything per axis is in nnU-Net's order: the file's axes in reverse, then transposed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.losses import supervision_weights
from xaiseg.checkpoints import nnunet_plans
from xaiseg.errors import InputError
from xaiseg.imaging.nnunet_plan import NnunetPreprocessing

CONFIGURATION = "3d_fullres"


@dataclass(frozen=True)
class Recipe:
    """How `nnUNetTrainer` optimises.

    Attributes:
        learning_rate, power: at the first epoch, and of its fall, see `learning_rate_at`.
        momentum, nesterov, weight_decay: of SGD; the decay is added to the gradient, of biases and norms too.
        gradient_norm: to which the gradient of all parameters together is clipped.
        epochs, iterations, validation_iterations: epochs, and the batches of each.
        foreground: part of the patches that are centred on a lesion, see `foreground_patches`.
        dice_weight, cross_entropy_weight: of the terms of the loss on each grid.
        dice_smooth: in the denominator of the Dice; the background is left out of it.
    """

    learning_rate: float = 1e-2
    power: float = 0.9
    momentum: float = 0.99
    nesterov: bool = True
    weight_decay: float = 3e-5
    gradient_norm: float = 12.0
    epochs: int = 1000
    iterations: int = 250
    validation_iterations: int = 50
    foreground: float = 0.33
    dice_weight: float = 1.0
    cross_entropy_weight: float = 1.0
    dice_smooth: float = 1e-5

    def learning_rate_at(self, epoch: int) -> float:
        """`learning_rate · (1 - epoch / epochs)^power`, the same for all iterations of an epoch; the first epoch is 0."""
        return self.learning_rate * (1 - epoch / self.epochs) ** self.power

    def foreground_patches(self, batch_size: int) -> int:
        """How many patches of a batch, the last ones, are centred on a lesion; 1 of 2, since nnU-Net rounds the others."""
        return batch_size - round(batch_size * (1 - self.foreground))


@dataclass(frozen=True)
class TrainingPlan:
    """What training needs of a configuration.

    Attributes:
        configuration: its name.
        patch_size: in voxels. batch_size: patches.
        architecture, options: of the network, as `ModelSpec` takes them, `out_channels` left out; `network_class_name` is nnU-Net's
            name of it.
        preprocessing: axes, spacing in mm, normalisation and resampling.
        batch_dice: whether the Dice is taken over a batch as over one volume, and not per patch.
        deep_supervision_weights: of the losses on the grids of the decoder, the finest first; they sum to 1.
        lowres: whether the plans hold a 3d_lowres too, which nnU-Net makes where the patch holds less than a quarter of the
            image; it would train both, and a cascade, and keep the best.
        recipe: of the trainer; plans hold none.
    """

    configuration: str
    patch_size: tuple[int, int, int]
    batch_size: int
    architecture: str
    network_class_name: str
    options: dict[str, Any]
    preprocessing: NnunetPreprocessing
    batch_dice: bool
    deep_supervision_weights: tuple[float, ...]
    lowres: bool
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Per axis in mm."""
        return self.preprocessing.spacing

    @property
    def normalisation(self) -> tuple[str, ...]:
        """nnU-Net's class for each channel."""
        return self.preprocessing.normalisation


def read_plan(path: str | Path, configuration: str = CONFIGURATION) -> TrainingPlan:
    """Read a configuration of a plans.json, of any nnU-Net v2.

    Raises InputError where the file is missing or no JSON, and as `training_plan`.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); give nnU-Net's plans.json") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected an object; give nnU-Net's plans.json")
    return training_plan(content, configuration, str(path))


def training_plan(
    plans: Mapping[str, Any], configuration: str = CONFIGURATION, source: str = "plans.json"
) -> TrainingPlan:
    """What `plans`, the content of a plans.json or what `make_plans` gives, say about training a configuration.

    source: for messages, a path.

    Raises InputError where the configuration is missing, 2-D or the second stage of a cascade, its network or preprocessing is not
    known here, or something in it is missing or does not fit together.
    """
    plan = nnunet_plans.read_plan(plans, configuration, {}, source)
    if len(plan.patch_size) != 3:
        raise InputError(
            f"{source}: configuration {configuration!r} is 2-D, its patches {plan.patch_size}; only 3-D networks are trained here: "
            f"take {CONFIGURATION}"
        )
    content = _with_inherited(plans["configurations"], configuration)
    batch_size, batch_dice = content.get("batch_size"), content.get("batch_dice")
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(
            f"{source}: batch_size is {batch_size!r} in configuration {configuration!r}, expected patches, 1 or more"
        )
    if not isinstance(batch_dice, bool):
        raise InputError(
            f"{source}: batch_dice is {batch_dice!r} in configuration {configuration!r}, expected true or false"
        )
    x, y, z = plan.patch_size
    names = {ours: theirs for theirs, ours in nnunet_plans.NETWORKS.items()}
    return TrainingPlan(
        configuration,
        (x, y, z),
        batch_size,
        plan.architecture,
        names[plan.architecture],
        plan.options,
        NnunetPreprocessing.from_dict(plan.preprocessing, source),
        batch_dice,
        supervision_weights(len(plan.options["features"]) - 2),
        "3d_lowres" in plans["configurations"],
    )


def _with_inherited(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`nnunet_plans.read_plan` has found the chain sound."""
    own = configurations[name]
    parent = own.get("inherits_from")
    return {**(_with_inherited(configurations, parent) if parent is not None else {}), **own}
