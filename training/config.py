"""Everything that a training run depends on, besides its cases."""

import importlib
import pkgutil
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import training.configs
from xaiseg.checkpoints.folder import spec_from_dict
from xaiseg.errors import InputError
from xaiseg.models import ModelSpec, expected_variables

SCHEDULES = ("constant", "cosine", "polynomial")


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults are the paper's, where it gives one. Lengths are in voxels.

    channels, orientation, window, overlap, min_voxels: see `xaiseg.models.ModelSpec`.
    default_layer: the tap of Grad-CAM++; the paper's, the second-highest level of the decoder, if empty.
    features, strides, norm: of the `UNet`.
    phantoms, validation_phantoms: seeds (first, one past the last) of synthetic brains to use instead of scans.

    patch: sides of the volume a network sees in training. batch: patches per step.
    positive_fraction: of the patches, those around a lesion voxel.
    flips, quarter_turns: probability of each, for each axis or plane. affine: probability of one combined rotation by up to ±15°
      about each axis and scaling by up to ±10 %. intensity: probability of a shift by up to ±0.1, and of a scaling by up to ±10 %.

    steps: of the optimiser, AdamW. learning_rate: at the first step; schedule: `constant`, `cosine` or `polynomial` (power 0.9),
      the latter two down to zero at the last.
    dice_weight, focal_weight, dice_r, focal_gamma: see `losses`.

    validate_every, checkpoint_every, log_every: steps.
    thresholds: on the lesion probability; the one with the best validation nDSC goes into the model, without validation the first.
    seed: of the initial parameters and the patches.
    """

    channels: tuple[str, ...] = ("FLAIR", "T1w")
    orientation: str = "RAS"
    features: tuple[int, ...] = (32, 64, 128, 256, 512)
    strides: tuple[int, ...] = (2, 2, 2, 2)
    norm: str = "batch"
    window: tuple[int, ...] = (96, 96, 96)
    overlap: float = 0.25
    min_voxels: int = 1
    default_layer: str = ""
    phantoms: tuple[int, ...] = ()
    validation_phantoms: tuple[int, ...] = ()

    patch: tuple[int, ...] = (96, 96, 96)
    batch: int = 4
    positive_fraction: float = 0.8
    flips: float = 0.5
    quarter_turns: float = 0.5
    affine: float = 0.5
    intensity: float = 0.5

    steps: int = 100_000
    learning_rate: float = 1e-5
    schedule: str = "constant"
    weight_decay: float = 0.0
    dice_weight: float = 0.5
    focal_weight: float = 1.0
    dice_r: float = 0.001
    focal_gamma: float = 2.0

    validate_every: int = 1000
    checkpoint_every: int = 1000
    log_every: int = 20
    thresholds: tuple[float, ...] = (0.3,)
    seed: int = 0

    def spec(self, threshold: float, source: str = "", notes: dict[str, Any] | None = None) -> ModelSpec:
        """The description of the model that this run trains."""
        description = {
            "architecture": "unet",
            "options": {"channels": list(self.features), "strides": list(self.strides), "norm": self.norm},
            "channels": list(self.channels),
            "window": list(self.window),
            "overlap": self.overlap,
            "threshold": threshold,
            "min_voxels": self.min_voxels,
            "orientation": self.orientation,
            "default_layer": self.default_layer or ("decoder1.conv" if len(self.features) > 2 else "bottleneck.conv"),
            "source": source,
            "notes": notes or {},
        }
        return spec_from_dict(description, "training config")


def load_config(name: str, settings: Sequence[str] = ()) -> Config:
    """The config of that name with changes, each as `field=value`.

    Raises InputError for an unknown config or field and for a value that cannot be.
    """
    known = sorted(module.name for module in pkgutil.iter_modules(training.configs.__path__))
    if name not in known:
        raise InputError(f"--config {name}: unknown; known are {', '.join(known)}: choose one")
    config: Config = importlib.import_module(f"training.configs.{name}").CONFIG
    kinds = {field.name: field.type for field in fields(Config)}
    changes = {}
    for setting in settings:
        field, sign, text = setting.partition("=")
        if not sign or field not in kinds:
            raise InputError(f"--set {setting}: expected FIELD=VALUE with a field among {', '.join(kinds)}: correct it")
        changes[field] = _value(setting, text, kinds[field])
    return check(replace(config, **changes))


def check(config: Config) -> Config:
    """The config itself. Raises InputError that names the first field whose value cannot be."""
    for name, sides in (("window", config.window), ("patch", config.patch)):
        if len(sides) != 3 or min(sides) < 1:
            raise InputError(f"config: {name} is {sides}, expected three positive numbers of voxels: correct it")
    for name, seeds in (("phantoms", config.phantoms), ("validation_phantoms", config.validation_phantoms)):
        if seeds and not (len(seeds) == 2 and 0 <= seeds[0] < seeds[1]):
            raise InputError(
                f"config: {name} is {seeds}, expected two seeds, the first and one past the last: correct it"
            )
    at_least_one = ("batch", "steps", "validate_every", "checkpoint_every", "log_every")
    shares = ("positive_fraction", "flips", "quarter_turns", "affine", "intensity")
    rules = [(name, getattr(config, name) >= 1, "1 or more") for name in at_least_one]
    rules += [(name, 0 <= getattr(config, name) <= 1, "a number from 0 to 1") for name in shares]
    rules += [(name, getattr(config, name) >= 0, "0 or more") for name in ("seed", "weight_decay", "focal_gamma")]
    rules += [(name, getattr(config, name) > 0, "a positive number") for name in ("learning_rate", "dice_r")]
    rules += [
        ("schedule", config.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("thresholds", len(config.thresholds) > 0, "at least one number"),
        ("channels", not config.phantoms or config.channels == ("FLAIR", "T1w"), "FLAIR,T1w, as phantoms have them"),
        ("quarter_turns", config.quarter_turns == 0 or len(set(config.patch)) == 1, "0 unless the patch is a cube"),
    ]
    for name, holds, expected in rules:
        if not holds:
            raise InputError(f"config: {name} is {getattr(config, name)!r}, expected {expected}: correct it")
    for threshold in config.thresholds:
        spec = config.spec(threshold)
    try:
        x, y, z = config.patch
        expected_variables(replace(spec, window=(x, y, z)))
    except ValueError as error:
        raise InputError(f"config: patch is {config.patch}: {error}") from error
    return config


def _value(setting: str, text: str, kind: Any) -> Any:
    """`text` as a value of a field's type: a str, int or float, or a tuple of them, separated by commas."""
    try:
        if typing.get_origin(kind) is not tuple:
            return kind(text)
        element = typing.get_args(kind)[0]
        return tuple(element(part.strip()) for part in text.strip("()").split(",") if part.strip())
    except ValueError as error:
        raise InputError(f"--set {setting}: expected {kind}, as 1 or 64,64,64: correct it") from error
