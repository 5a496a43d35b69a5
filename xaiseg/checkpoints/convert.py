"""A PyTorch checkpoint, or an nnU-Net result folder, becomes a `Model`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from xaiseg.checkpoints import monai_dynunet, monai_swin_unetr, monai_unet, nnunet
from xaiseg.checkpoints.folder import spec_from_dict
from xaiseg.checkpoints.mapping import Given, Reading, State, check_finite
from xaiseg.checkpoints.torch_file import read_state_dict
from xaiseg.errors import InputError
from xaiseg.models import Model

_READERS = {"MONAI UNet": monai_unet, "MONAI DynUNet": monai_dynunet, "MONAI SwinUNETR": monai_swin_unetr}
# What a training script's own class puts before the names of the network it holds.
_WRAPPERS = ("net.", "network.", "model.", "_model.", "module.")
_TWO_CHANNELS = ("FLAIR", "T1w")
# Thresholds of the paper; the last two were tuned to 0.4.
_THRESHOLDS = {"unet": 0.3, "dynunet": 0.4, "swin_unetr": 0.4}


def convert(
    source: str | Path,
    channels: Sequence[str] | None = None,
    window: Sequence[int] | None = None,
    *,
    strides: Sequence[int | Sequence[int]] | None = None,
    norm: str | None = None,
    activation: str | None = None,
    patch_merging: str | None = None,
    remat: bool = False,
    folds: Sequence[str] | None = None,
    checkpoint: str = "final",
    any_trainer: bool = False,
    mirroring: bool = True,
    **settings: Any,
) -> Model:
    """Read a trained checkpoint. The architecture is recognised from the keys, or from an nnU-Net folder's plans.

    channels: input sequences in order; by default those of an nnU-Net's `dataset.json`, else FLAIR, T1w for two channels.
    window: sides of the sliding window in voxels, which only an nnU-Net's plans tell; one side is 1 for a 2-D network.
    strides, norm, activation, patch_merging: what keys do not tell, see `mapping.Given`; needed or assumed as the reader says.
    remat: of a SwinUNETR: compute each block again in the backward pass instead of keeping its activations; slower, less memory.
    folds, checkpoint: of an nnU-Net: which folds (all), `final` or `best`. any_trainer: take a trainer that is not known to leave
      the network as planned. mirroring: average over the mirrorings that it was trained with.
    settings: other fields of `ModelSpec` (`overlap`, `threshold`, …).

    What was assumed is in `spec.notes["assumed"]`. Raises InputError for anything that does not fit or is needed.
    """
    source = Path(source)
    if nnunet.recognise(source):
        told = {"strides": strides, "norm": norm, "activation": activation, "patch_merging": patch_merging}
        if useless := [name for name, value in {**told, "remat": remat or None}.items() if value is not None]:
            option = useless[0].replace("_", "-")
            raise InputError(f"{source}: an nnU-Net, whose plans tell its network; leave out --{option}")
        return _from_nnunet(source, channels, window, folds, checkpoint, any_trainer, mirroring, settings)
    if folds is not None or checkpoint != "final" or any_trainer or not mirroring:
        raise InputError(
            f"{source}: not an nnU-Net result folder (plans.json, dataset.json, fold_*), which --fold, --checkpoint, "
            "--any-trainer and --no-mirroring are for; give that folder, or leave them out"
        )
    given = Given(_tuple(strides), norm, activation, patch_merging)
    return _from_state_dict(source, channels, window, given, remat, settings)


def _from_state_dict(
    source: Path,
    channels: Sequence[str] | None,
    window: Sequence[int] | None,
    given: Given,
    remat: bool,
    settings: dict[str, Any],
) -> Model:
    state = read_state_dict(source)
    reading = _read(state, source, given)
    if remat and reading.architecture != "swin_unetr":
        raise InputError(f"{source}: a {reading.architecture}; --remat is for a SwinUNETR, leave it out")
    options = {**reading.options, **({"remat": True} if remat else {})}
    check_finite(state, str(source))
    assumed = list(reading.assumed)
    if channels is None:
        assumed.append(f"channels {', '.join(_TWO_CHANNELS)} (--channels)")
        if reading.c_in != len(_TWO_CHANNELS):
            raise InputError(
                f"{source}: the network has {reading.c_in} input channels; name them in order with --channels"
            )
        channels = _TWO_CHANNELS
    _check_channels(source, channels, reading.c_in)
    if reading.c_out > 2:
        _check_target(source, [str(i) for i in range(reading.c_out)], settings)
    if window is None:
        sides = "X,Y,1 (a 2-D network)" if reading.options.get("ndim") == 2 else "X,Y,Z (96,96,96 in the paper)"
        raise InputError(
            f"{source}: a checkpoint does not tell the size of its window; give that of its training, --window {sides}"
        )
    threshold = _THRESHOLDS[reading.architecture]
    if "threshold" not in settings:
        assumed.append(f"threshold {threshold}, the paper's for this architecture (--threshold)")
    description = {
        "architecture": reading.architecture,
        "options": options,
        "channels": list(channels),
        "window": list(window),
        "threshold": threshold,
        "output_activation": "softmax" if reading.c_out > 1 else "sigmoid",
        "target_class": 1 if reading.c_out > 1 else 0,
        "default_layer": reading.default_layer,
        "source": source.name,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "notes": {"assumed": assumed},
        **settings,
    }
    return Model(spec_from_dict(description, str(source)), jax.tree.map(jax.numpy.asarray, reading.variables))


def _read(state: State, source: Path, given: Given) -> Reading:
    """The reading of the first architecture that knows the keys, without what wrappers put before every name."""
    candidate = state
    while True:
        _check_mixture(candidate, source)
        if (what := _recognised(candidate)) is not None:
            break
        if (shorter := _without_common_prefix(candidate)) is candidate:
            raise InputError(_unknown(state, source))
        candidate = shorter
    module = _READERS[what]
    if useless := [f for f in Given._fields if getattr(given, f) is not None and f not in module.USES]:
        raise InputError(
            f"{source}: a {what}, whose keys leave no such choice; leave out --{useless[0].replace('_', '-')}"
        )
    return module.read(candidate, str(source), given)


def _recognised(state: State) -> str | None:
    return next((what for what, module in _READERS.items() if module.recognise(state)), None)


def _check_mixture(state: State, source: Path) -> None:
    """Raise InputError where a network lies under the name of a wrapper and other tensors beside it."""
    for wrapper in _WRAPPERS:
        inside = {k.removeprefix(wrapper): v for k, v in state.items() if k.startswith(wrapper)}
        others = [k for k in state if not k.startswith(wrapper)]
        if inside and others and (what := _recognised(inside)) is not None:
            raise InputError(
                f"{source}: mixed prefixes: {len(inside)} tensors of a {what} are called {wrapper}…, {len(others)} others are not "
                f"({', '.join(others[:3])}); save the state dict of the network alone"
            )


def _unknown(state: State, source: Path) -> str:
    if any(key.startswith(("encoder.stages.", "decoder.stages.")) for key in state):
        return (
            f"{source}: an nnU-Net checkpoint; give its result folder, with plans.json and dataset.json beside fold_*"
        )
    return (
        f"{source}: not a network that can be converted ({', '.join(_READERS)}, nnU-Net); its first keys are "
        f"{', '.join(list(state)[:3])}; a network of your own can be explained from Python, see the README"
    )


def _without_common_prefix(state: State) -> State:
    prefixes = {key.split(".", 1)[0] for key in state}
    if len(prefixes) != 1 or any("." not in key for key in state):
        return state
    return {key.split(".", 1)[1]: tensor for key, tensor in state.items()}


def _from_nnunet(
    source: Path,
    channels: Sequence[str] | None,
    window: Sequence[int] | None,
    folds: Sequence[str] | None,
    checkpoint: str,
    any_trainer: bool,
    mirroring: bool,
    settings: dict[str, Any],
) -> Model:
    if "orientation" in settings:
        raise InputError(f"{source}: an nnU-Net, whose plans tell the orientation; leave out --orientation")
    reading = nnunet.read(source, folds, checkpoint, any_trainer)
    if channels is not None and set(channels) == set(reading.channels) and tuple(channels) != tuple(reading.channels):
        raise InputError(
            f"{source}: its dataset.json has the channels in the order {', '.join(reading.channels)}; --channels only renames "
            "them: leave it out, the manifest's columns may come in any order"
        )
    channels = reading.channels if channels is None else channels
    _check_channels(source, channels, len(reading.channels))
    if reading.target_class is None:
        _check_target(source, reading.classes, settings)
    else:
        settings = {"target_class": reading.target_class, **settings}
    ensemble = len(reading.members) > 1
    (first, *_) = reading.members.values()
    description = {
        "architecture": reading.architecture,
        "options": reading.options,
        "channels": list(channels),
        "window": list(window or reading.window),
        "overlap": 0.5,
        "tiling": "nnunet",
        "mirror_axes": list(reading.mirror_axes) if mirroring else [],
        "members": list(reading.members) if ensemble else [],
        "output_activation": "sigmoid" if reading.regions else "softmax",
        "threshold": None,
        "normalisation": "nnunet",
        "preprocessing": reading.preprocessing,
        "default_layer": reading.default_layer,
        "source": source.resolve().name,
        "source_sha256": _digest(reading.source_files),
        "notes": {
            **reading.notes,
            "folds": list(reading.members),
            "classes": list(reading.classes),
            "dataset_channels": list(reading.channels),
        },
        **settings,
    }
    variables = reading.members if ensemble else first
    return Model(spec_from_dict(description, str(source)), jax.tree.map(jax.numpy.asarray, variables))


def _check_channels(source: Path, channels: Sequence[str], c_in: int) -> None:
    if len(channels) != c_in:
        raise InputError(f"{source}: the network has {c_in} input channels, --channels names {len(channels)}")


def _check_target(source: Path, classes: Sequence[str], settings: dict[str, Any]) -> None:
    if "target_class" not in settings:
        named = ", ".join(f"{i} {name}" if name != str(i) else name for i, name in enumerate(classes))
        raise InputError(
            f"{source}: the network has {len(classes)} classes ({named}); name the lesion's with --target-class"
        )


def _digest(files: Sequence[Path]) -> str:
    """One hash over several files, independent of where they lie."""
    hashes = sorted(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _tuple(strides: Sequence[int | Sequence[int]] | None) -> Any:
    return None if strides is None else tuple(tuple(s) if isinstance(s, Sequence) else s for s in strides)
