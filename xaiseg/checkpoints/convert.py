"""A PyTorch checkpoint becomes a `Model`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xaiseg.checkpoints import monai_unet
from xaiseg.checkpoints.folder import spec_from_dict
from xaiseg.checkpoints.torch_file import read_state_dict
from xaiseg.errors import InputError
from xaiseg.models import Model

_TWO_CHANNELS = ("FLAIR", "T1w")


def convert(
    source: str | Path, channels: Sequence[str] | None = None, strides: Sequence[int] | None = None, **settings: Any
) -> Model:
    """Read a trained checkpoint. `settings` are fields of `ModelSpec` (`window`, `overlap`, `threshold`, …).

    The architecture is recognised from the keys. `channels` names the input sequences in order and defaults to FLAIR, T1w for a
    two-channel network; for any other number it must be given. `strides` of the levels default to 2: a checkpoint does not tell
    them. Raises InputError for anything that does not fit.
    """
    source = Path(source)
    state = read_state_dict(source)
    if not monai_unet.recognise(state):
        some = ", ".join(list(state)[:3])
        raise InputError(f"{source}: not a MONAI UNet, which is what can be converted; its first keys are {some}")
    options, c_in, variables = monai_unet.read(state, str(source), strides)
    if bad := [k for k, v in state.items() if not np.isfinite(monai_unet.as_float32(v)).all()]:
        raise InputError(f"{source}: {bad[0]} holds NaN or infinite values; the training that made it diverged")
    if channels is None:
        if c_in != len(_TWO_CHANNELS):
            raise InputError(f"{source}: the network has {c_in} input channels; name them in order with --channels")
        channels = _TWO_CHANNELS
    if len(channels) != c_in:
        raise InputError(f"{source}: the network has {c_in} input channels, --channels names {len(channels)}")
    if options["out_channels"] > 2 and "target_class" not in settings:
        raise InputError(
            f"{source}: the network has {options['out_channels']} classes; name the lesion's with --target-class (0 is the first)"
        )
    if options["ndim"] != 3:
        raise InputError(f"{source}: a {options['ndim']}-D network; only 3-D ones can be converted")
    description = {
        "architecture": "unet",
        "options": options,
        "channels": list(channels),
        "window": [96, 96, 96],
        "target_class": 1 if options["out_channels"] > 1 else 0,
        "default_layer": "decoder1.conv" if len(options["channels"]) > 2 else "bottleneck.conv",
        "source": source.name,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        **settings,
    }
    return Model(spec_from_dict(description, str(source)), jax.tree.map(jax.numpy.asarray, variables))
