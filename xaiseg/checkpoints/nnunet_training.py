"""What nnU-Net stored about a training besides its plans: the data set, the trainer, and how inference mirrors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xaiseg.errors import InputError

BATCH_NORM_TRAINER = "nnUNetTrainerBN"
# The trainers of nnunetv2 2.8.1 that build the planned network. The others build Primus.
TRAINERS = frozenset(
    """
    nnUNetTrainer nnUNet_Trainer_BS8 nnUNetTrainer_warmup nnUNetTrainer_noDummy2DDA nnUNetTrainerNoDA nnUNetTrainerNoMirroring
    nnUNetTrainer_1epoch nnUNetTrainer_5epochs nnUNetTrainer_10epochs nnUNetTrainer_20epochs nnUNetTrainer_50epochs
    nnUNetTrainer_100epochs nnUNetTrainer_250epochs nnUNetTrainer_500epochs nnUNetTrainer_750epochs nnUNetTrainer_2000epochs
    nnUNetTrainer_4000epochs nnUNetTrainer_8000epochs nnUNetTrainer_250epochs_NoMirroring nnUNetTrainer_2000epochs_NoMirroring
    nnUNetTrainer_4000epochs_NoMirroring nnUNetTrainer_8000epochs_NoMirroring nnUNetTrainer_DASegOrd0
    nnUNetTrainer_DASegOrd0_NoMirroring nnUNetTrainer_onlyMirror01 nnUNetTrainer_onlyMirror01_1500ep
    nnUNetTrainer_onlyMirror01_DA5 nnUNetTrainer_onlyMirror01_DASegOrd0 nnUNetTrainer_probabilisticOversampling
    nnUNetTrainer_probabilisticOversampling_010 nnUNetTrainer_probabilisticOversampling_033 nnUNetTrainerAdam
    nnUNetTrainerAdam1en3 nnUNetTrainerAdam3en4 nnUNetTrainerAdan nnUNetTrainerAdan1en1 nnUNetTrainerAdan1en3
    nnUNetTrainerAdan3en4 nnUNetTrainerAdanCosAnneal nnUNetTrainerBenchmark_5epochs
    nnUNetTrainerBenchmark_5epochs_noDataLoading nnUNetTrainerCELoss nnUNetTrainerCELoss_5epochs nnUNetTrainerCosAnneal
    nnUNetTrainerDA5 nnUNetTrainerDA5_10epochs nnUNetTrainerDA5ord0 nnUNetTrainerDA5Segord0 nnUNetTrainerDiceCELoss_noSmooth
    nnUNetTrainerDiceLoss nnUNetTrainerDiceTopK10Loss nnUNetTrainerNoDeepSupervision nnUNetTrainerTopk10Loss
    nnUNetTrainerTopk10LossLS01 nnUNetTrainerVanillaAdam nnUNetTrainerVanillaAdam1en3 nnUNetTrainerVanillaAdam3en4
    nnUNetTrainerBN
    """.split()  # noqa: SIM905
)


class Dataset(NamedTuple):
    """What dataset.json says about the network's two ends.

    channels: input sequences in order. classes: names of the logits' channels. regions: these may overlap, each has its own
    sigmoid; else they are labels under one softmax.
    """

    channels: tuple[str, ...]
    classes: tuple[str, ...]
    regions: bool

    @property
    def target_class(self) -> int | None:
        """The channel of the only label or region, None where there are several."""
        background = 0 if self.regions else 1
        return background if len(self.classes) == background + 1 else None


class Training(NamedTuple):
    """What all folds of an ensemble share. mirroring: axes of the patch."""

    configuration: str
    trainer: str
    mirroring: tuple[int, ...]


def read_dataset(content: Mapping[str, Any], source: str) -> Dataset:
    """Raises InputError where channels or labels are missing or cannot be nnU-Net's."""
    return Dataset(_channels(content, source), *_classes(content, source))


def read_training(content: Mapping[str, Any], folder: Path, file: Path) -> Training:
    """Of a checkpoint's content; files that lack the names have them from the folder, `trainer__plans__configuration`.

    Raises InputError where there are none.
    """
    init = content.get("init_args")
    parts = folder.absolute().name.split("__")
    named = (parts[0], parts[2]) if len(parts) == 3 else (None, None)
    configuration = init.get("configuration", named[1]) if isinstance(init, Mapping) else named[1]
    trainer = content.get("trainer_name", named[0])
    if not isinstance(configuration, str) or not isinstance(trainer, str):
        raise InputError(
            f"{file}: names no trainer and configuration; take nnU-Net's own file, or name the folder trainer__plans__configuration"
        )
    axes = content.get("inference_allowed_mirroring_axes") or ()
    if not isinstance(axes, tuple | list) or any(type(a) is not int for a in axes):
        raise InputError(
            f"{file}: inference_allowed_mirroring_axes is {axes!r}, expected axes; take nnU-Net's own file"
        )
    return Training(configuration, trainer, tuple(sorted(axes)))


def check_trainer(trainer: str, file: Path) -> None:
    """Raise InputError unless `trainer` is known to build the planned network."""
    if trainer not in TRAINERS:
        raise InputError(
            f"{file}: trained by {trainer!r}, which is not one of nnU-Net's own that build the planned network; if it changes "
            "neither network nor preprocessing, say so with --any-trainer"
        )


def _channels(dataset: Mapping[str, Any], source: str) -> tuple[str, ...]:
    names = dataset.get("channel_names", dataset.get("modality"))
    if not isinstance(names, Mapping) or set(names) != {str(i) for i in range(len(names))} or not names:
        raise InputError(
            f"{source}: channel_names is {names!r}, expected names for 0, 1, …; take the file of this training"
        )
    return tuple(str(names[str(i)]) for i in range(len(names)))


def _classes(dataset: Mapping[str, Any], source: str) -> tuple[tuple[str, ...], bool]:
    """Names of the logits' channels, as nnU-Net's `LabelManager` orders them, and whether they are regions."""
    labels = dataset.get("labels")
    values = {k: v if isinstance(v, list) else [v] for k, v in labels.items()} if isinstance(labels, Mapping) else {}
    if values.get("background") != [0] or any(type(i) is not int for v in values.values() for i in v):
        raise InputError(
            f"{source}: labels is {labels!r}, expected whole numbers with background 0; take the file of this training"
        )
    values.pop("ignore", None)
    if any(len(v) > 1 for v in values.values()):
        names = tuple(k for k, v in values.items() if set(v) != {0})
        order = dataset.get("regions_class_order")
        if not isinstance(order, list) or len(order) != len(names):
            raise InputError(
                f"{source}: regions_class_order is {order!r} for {len(names)} regions; take the file of this training"
            )
        return names, True
    numbered = {v[0]: k for k, v in reversed(values.items()) if v}
    return tuple(numbered[i] for i in sorted(numbered)), False
