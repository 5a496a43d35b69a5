"""The volumes of a run: of its cases, of synthetic brains, and of scans with lesions put in."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training.cases import Cases
from training.config import Config
from training.lesion_bank import LesionBank
from training.synthesis import synthesise
from training.volumes import Volume, cached, volume_of_case, volume_of_phantom
from xaiseg.errors import InputError
from xaiseg.imaging import Case
from xaiseg.imaging.nnunet_plan import NnunetPreprocessing


def load_volumes(
    config: Config, cases: Cases, folder: Path, say: Callable[[str], Any] = print
) -> tuple[list[Volume], list[Volume]]:
    """The volumes to train on and to validate with, each stored once in `folder`.

    Raises InputError where a case cannot be used, none has a lesion, or lesions are to be put in and there are none to copy.
    """

    preprocessing = NnunetPreprocessing.from_dict(config.preprocessing, "config") if config.preprocessing else None

    def volumes(members: Sequence[Case], seeds: tuple[int, ...]) -> list[Volume]:
        scans = [volume_of_case(folder, case, config.channels, config.orientation, preprocessing) for case in members]
        return scans + [volume_of_phantom(folder, seed, config.orientation) for seed in range(*seeds or (0,))]

    training = volumes(cases.training, config.phantoms)
    validation = volumes(cases.validation, config.validation_phantoms)
    for volume in training:
        if preprocessing is None and any(
            n < side for n, side in zip(volume.reference.shape, config.patch, strict=True)
        ):
            raise InputError(
                f"{volume.name}: {volume.reference.shape} voxels, fewer than the patch of {config.patch} along an axis; expected a "
                "volume that holds it: choose a smaller patch, or leave the case out"
            )
    voxels = sum(len(volume.lesion) for volume in training)
    say(f"{len(training)} cases to train on ({voxels} lesion voxels), {len(validation)} to validate with")
    if voxels == 0:
        names = ", ".join(volume.name for volume in training[:3])
        raise InputError(
            f"training cases ({names}, …): no lesion voxel in any reference; expected some: check the masks"
        )
    return training + (with_lesions(config, training, folder, say) if config.synthetic else []), validation


def with_lesions(
    config: Config, volumes: Sequence[Volume], folder: Path, say: Callable[[str], Any] = print
) -> list[Volume]:
    """`config.synthetic` copies of each volume, into which lesions of these volumes are put; of no others, so none of a patient
    who is held out."""
    bank = LesionBank.of(volumes, config.channels)
    say(f"putting {len(bank.lesions)} lesions of these cases into {config.synthetic} copies of each")

    def copy(volume: Volume, number: int, place: int) -> Volume:
        def draw() -> Any:
            made = synthesise((config.seed, number, place), volume, bank, config.synthesis)
            return made.image, made.reference

        return cached(folder, f"{volume.name}_synthetic-{number + 1}", draw)

    return [copy(v, number, place) for number in range(config.synthetic) for place, v in enumerate(volumes)]
