"""Everything that a training run depends on, besides its cases."""

import dataclasses
import importlib
import json
import math
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import training.configs
from training.augment import PAPER, Augmentation, check_augmentation
from training.losses import LOSSES
from training.synthesis import Settings
from xaiseg.checkpoints.folder import spec_from_dict
from xaiseg.errors import InputError
from xaiseg.models import ModelSpec, expected_variables
from xaiseg.models.precision import PRECISIONS

OPTIMISERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "polynomial", "plateau")

# z-scored scans: contrasts in that unit carry over between scanners better than in the spread of each one's white matter
_ALWAYS = Settings(probability=1.0, unit="image")
_PAPER_UNET = {"channels": [32, 64, 128, 256, 512], "strides": [2, 2, 2, 2], "norm": "batch"}


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults are the paper's, where it gives one. Lengths are in voxels.

    The model:
    architecture, options: of the network, see `xaiseg.models`; a U-Net or DynUNet with `heads` is supervised on coarser grids too.
    channels, orientation, window, overlap, min_voxels: see `xaiseg.models.ModelSpec`.
    default_layer: the tap of Grad-CAM++; the architecture's usual one if empty.
    planner: nnU-Net's planner that decides about network, patch, batch, Dice and preprocessing from the training cases, see
      `planned`; empty for none. preprocessing: nnU-Net's, as it then says; empty for z-scores over non-zero voxels. A model with it
      predicts nnU-Net's way: its tiles, and the mean over mirrorings.

    The data:
    phantoms, validation_phantoms: seeds (first, one past the last) of synthetic brains to use instead of scans.
    patch: sides of the volume a network sees in training. batch: patches per step.
    positive_fraction: of the patches, those around a lesion voxel. forced: nnU-Net's way, the last of each batch; else drawn.
    augmentation: see `augment.Augmentation`. margin: voxels around a patch that it may draw from.
    synthetic: copies of each scan to train on beside it, with lesions of the training scans put in and some of its own filled, see
      `synthesis.Settings`, whose parts are `synthesis`.

    The loss:
    loss: weights of `losses.LOSSES`. dice_r, dice_over_batch, focal_gamma, focal_activation: see `losses.weighted_sum`.

    The optimiser:
    steps: batches. optimiser: `adam`, `adamw` or `sgd` (Nesterov's momentum; weight decay is added to the gradient, as PyTorch's).
    learning_rate: after `warmup` updates, in which it rises from 0. schedule: `constant`; `cosine` or `polynomial` (power 0.9)
      down to zero at the last; `plateau`: halved when the mean loss of `validate_every` steps has not fallen for 5 of them
      (with `accumulate`, the loss of each update's last batch).
    clip: the largest norm of the gradient, 0 for none. accumulate: batches whose mean gradient is one update.
    average: decay, per batch, of an exponential moving average of the parameters, which is then validated and exported; 0 for none.
    precision: of convolutions and matrix products, see `xaiseg.models.precision`; parameters and sums are float32 in any case.

    The run:
    validate_every, checkpoint_every, log_every: steps. patience: validations without a better nDSC before it stops, 0 for no end.
    thresholds: on the lesion probability; the one with the best validation nDSC goes into the model, without validation the first.
    seed: of the initial parameters, the patches and their augmentation.
    """

    architecture: str = "unet"
    options: dict[str, Any] = field(default_factory=lambda: dict(_PAPER_UNET))
    channels: tuple[str, ...] = ("FLAIR", "T1w")
    orientation: str = "RAS"
    window: tuple[int, ...] = (96, 96, 96)
    overlap: float = 0.25
    min_voxels: int = 1
    default_layer: str = ""
    planner: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)

    phantoms: tuple[int, ...] = ()
    validation_phantoms: tuple[int, ...] = ()
    patch: tuple[int, ...] = (96, 96, 96)
    batch: int = 4
    positive_fraction: float = 0.8
    forced: bool = False
    augmentation: Augmentation = PAPER
    margin: int = 0
    synthetic: int = 0
    synthesis: Settings = _ALWAYS

    loss: dict[str, float] = field(default_factory=lambda: {"normalised_dice": 0.5, "focal": 1.0})
    dice_r: float = 0.001
    dice_over_batch: bool = False
    focal_gamma: float = 2.0
    focal_activation: str = "softmax"

    steps: int = 100_000
    optimiser: str = "adam"
    learning_rate: float = 1e-5
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    momentum: float = 0.99
    clip: float = 0.0
    accumulate: int = 1
    average: float = 0.0
    precision: str = "float32"

    validate_every: int = 1000
    checkpoint_every: int = 1000
    log_every: int = 20
    patience: int = 0
    thresholds: tuple[float, ...] = (0.3,)
    seed: int = 0

    @property
    def heads(self) -> int:
        """Coarser grids that have logits of their own."""
        if self.architecture in ("plain_conv_unet", "residual_encoder_unet"):
            return len(self.options["features"]) - 2
        return int(self.options.get("heads", 0))

    @property
    def _usual_tap(self) -> str:
        levels = len(
            self.options.get("channels") or self.options.get("filters") or self.options.get("features") or "   "
        )
        name = "decoder1" if levels > 2 else "decoder0"
        if self.architecture == "unet":
            return "decoder1.conv" if levels > 2 else "bottleneck.conv"
        return "decoder2.up" if self.architecture == "swin_unetr" else f"{name}.up"

    def spec(self, threshold: float, source: str = "", notes: dict[str, Any] | None = None) -> ModelSpec:
        """The description of the model that this run trains."""
        description = {
            "architecture": self.architecture,
            "options": self.options,
            "channels": list(self.channels),
            "window": list(self.window),
            "overlap": self.overlap,
            "threshold": threshold,
            "min_voxels": self.min_voxels,
            "orientation": self.orientation,
            "default_layer": self.default_layer or self._usual_tap,
            "source": source,
            "notes": notes or {},
        }
        if self.preprocessing:
            description |= {"normalisation": "nnunet", "preprocessing": self.preprocessing}
            description |= {"tiling": "nnunet", "mirror_axes": [0, 1, 2]}
        return spec_from_dict(description, "training config")


def known_configs() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(training.configs.__path__))


def load_config(name: str, settings: Sequence[str] = ()) -> Config:
    """The config of that name with changes, each as `field=value`; `field.part=value` changes a part of a field.

    Raises InputError for an unknown config or field and for a value that cannot be.
    """
    if name not in known_configs():
        raise InputError(f"--config {name}: unknown; known are {', '.join(known_configs())}: choose one")
    return check(changed(importlib.import_module(f"training.configs.{name}").CONFIG, settings))


def changed(config: Config, settings: Sequence[str]) -> Config:
    """Raises InputError where a setting names no field, or its value is not of the field's kind."""
    for setting in settings:
        path, sign, text = setting.partition("=")
        name, dot, part = path.partition(".")
        if not sign or name not in {f.name for f in fields(Config)}:
            known = ", ".join(f.name for f in fields(Config))
            raise InputError(f"--set {setting}: expected FIELD=VALUE with a field among {known}: correct it")
        old = getattr(config, name)
        if not dot:
            new = _value(setting, text, old)
        elif isinstance(old, dict):
            new = {**old, part: _value(setting, text, old.get(part))}
        elif dataclasses.is_dataclass(old) and part in (parts := {f.name: getattr(old, f.name) for f in fields(old)}):
            new = replace(old, **{part: _value(setting, text, parts[part])})  # type: ignore[type-var]
        else:
            raise InputError(f"--set {setting}: {name} has no part {part}: correct it")
        config = replace(config, **{name: new})
    return config


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
    at_least_one = ("batch", "steps", "validate_every", "checkpoint_every", "log_every", "accumulate")
    rules = [(name, getattr(config, name) >= 1, "1 or more") for name in at_least_one]
    rules += [(name, 0 <= getattr(config, name) <= 1, "a number from 0 to 1") for name in ("positive_fraction",)]
    rules += [(name, 0 <= getattr(config, name) < 1, "0 or more and less than 1") for name in ("momentum", "average")]
    not_negative = ("seed", "weight_decay", "focal_gamma", "warmup", "clip", "patience", "margin", "synthetic")
    rules += [(name, getattr(config, name) >= 0, "0 or more") for name in not_negative]
    rules += [("learning_rate", 0 < config.learning_rate < math.inf, "a positive number")]
    rules += [("dice_r", 0 < config.dice_r < 1, "a number between 0 and 1")]
    rules += [
        ("optimiser", config.optimiser in OPTIMISERS, f"one of {', '.join(OPTIMISERS)}"),
        ("schedule", config.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("precision", config.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        ("focal_activation", config.focal_activation in ("softmax", "sigmoid"), "softmax or sigmoid"),
        ("loss", set(config.loss) <= set(LOSSES), f"weights of {', '.join(LOSSES)}"),
        ("loss", _are_weights(config.loss), "weights that are not negative, one of them positive"),
        ("warmup", config.warmup < max(config.steps // config.accumulate, 1), "fewer than the updates"),
        ("synthetic", not config.synthetic or "FLAIR" in config.channels, "0 for scans without FLAIR"),
        ("thresholds", len(config.thresholds) > 0, "at least one number"),
        ("channels", not config.phantoms or config.channels == ("FLAIR", "T1w"), "FLAIR,T1w, as phantoms have them"),
    ]
    for name, holds, expected in rules:
        if not holds:
            raise InputError(f"config: {name} is {getattr(config, name)!r}, expected {expected}: correct it")
    check_augmentation(config.augmentation, config.patch)
    for threshold in config.thresholds:
        spec = config.spec(threshold)
    try:
        x, y, z = config.patch
        expected_variables(replace(spec, window=(x, y, z)))
    except ValueError as error:
        raise InputError(f"config: patch is {config.patch}: {error}") from error
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"config: options {config.options} make no {config.architecture} ({error}); expected values of the kinds that "
            "its other configs have: correct them"
        ) from error
    return config


def _are_weights(loss: dict[str, float]) -> bool:
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) for w in loss.values())
    return numbers and all(w >= 0 for w in loss.values()) and any(w > 0 for w in loss.values())


def _value(setting: str, text: str, old: Any) -> Any:
    """`text` as a value of the kind of an old one: text, a number, a tuple separated by commas, or JSON where nothing was there."""
    if dataclasses.is_dataclass(old):
        name, part = setting.partition("=")[0], fields(old)[0].name
        raise InputError(f"--set {setting}: {name} has parts; expected one of them, as {name}.{part}=…: name it")
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if isinstance(old, tuple):
            parts = [part.strip() for part in text.strip("()").split(",") if part.strip()]
            return _alike(tuple(part if part[:1].isalpha() else json.loads(part) for part in parts), old)
        if isinstance(old, int | float | str):
            return type(old)(text)
        return _alike(json.loads(text), old)
    except (ValueError, KeyError) as error:
        kind = type(old).__name__ if old is not None else "JSON"
        raise InputError(f'--set {setting}: expected {kind}, as 1, 64,64,64 or {{"a": 1}}: correct it') from error


def _alike(new: Any, old: Any) -> Any:
    """`new`. Raises ValueError unless it is of the kind of `old`: dict, list, or tuple of text, of whole numbers or of any."""
    if isinstance(old, dict | list) and not isinstance(new, type(old)):
        raise ValueError("another kind")
    if isinstance(old, tuple):
        # what is empty holds seeds of phantoms
        kind = str if old and isinstance(old[0], str) else int if all(isinstance(v, int) for v in old) else int | float
        if not all(isinstance(value, kind) and not isinstance(value, bool) for value in new):
            raise ValueError("values of another kind")
    return new
