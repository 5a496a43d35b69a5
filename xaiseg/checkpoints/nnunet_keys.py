"""Keys of nnU-Net v2's networks: each tensor once, under its first name, and the variable that it becomes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xaiseg.checkpoints.mapping import KeyMap, check_finite, conv_entries, drop_counters, merge_aliases, norm_entries
from xaiseg.checkpoints.torch_file import strip_prefixes
from xaiseg.errors import InputError


def canonical_state(weights: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    """The tensors of `network_weights`, each under one name.

    Raises InputError where two copies of one tensor differ and for values that are not finite.
    """
    tensors = {str(k): v for k, v in weights.items() if isinstance(v, np.ndarray)}
    state = merge_aliases(drop_counters(strip_prefixes(tensors, source)), _canonical, source)
    check_finite(state, source)
    return state


def key_map(architecture: str, options: Mapping[str, Any], c_in: int) -> KeyMap:
    """PyTorch's keys of the network that `options` describe, and where each tensor goes."""
    wanted: KeyMap = {}
    features, kernels, strides = options["features"], options["kernel_sizes"], options["strides"]
    norm, bias = options["norm"], options["conv_bias"]
    ones = (1,) * options["ndim"]

    def conv_norm(
        key: str, path: tuple[str, ...], names: tuple[str, str], i: int, o: int, kernel: Any, b: bool = bias
    ) -> None:
        wanted.update(conv_entries(f"{key}.conv", (*path, names[0]), (o, i, *kernel), o if b else None))
        wanted.update(norm_entries(norm, f"{key}.norm", (*path, names[1]), o))

    def stack(key: str, path: str, convs: int, i: int, o: int, kernel: Sequence[int]) -> None:
        for j in range(convs):
            conv_norm(f"{key}.convs.{j}", (path,), (f"conv{j}", f"norm{j}"), o if j else i, o, kernel)

    below = c_in
    if architecture == "residual_encoder_unet":
        below = options.get("stem_features") or features[0]
        stack("encoder.stem", "stem", 1, c_in, below, kernels[0])
        for s, blocks in enumerate(options["blocks"]):
            for b in range(blocks):
                key, path = f"encoder.stages.{s}.blocks.{b}", (f"encoder{s}_block{b}",)
                conv_norm(f"{key}.conv1", path, ("conv1", "norm1"), below, features[s], kernels[s])
                conv_norm(f"{key}.conv2", path, ("conv2", "norm2"), features[s], features[s], kernels[s])
                if below != features[s]:
                    pooled = b == 0 and any(n != 1 for n in strides[s])
                    names = ("skip_conv", "skip_norm")
                    conv_norm(f"{key}.skip.{int(pooled)}", path, names, below, features[s], ones, b=False)
                below = features[s]
    else:
        for s, convs in enumerate(options["convs"]):
            stack(f"encoder.stages.{s}.0", f"encoder{s}", convs, below, features[s], kernels[s])
            below = features[s]
    levels = len(features) - 1
    for s, convs in enumerate(options["decoder_convs"]):
        place = levels - 1 - s
        o = features[s]
        up = (features[s + 1], o, *strides[s + 1])
        wanted.update(conv_entries(f"decoder.transpconvs.{place}", (f"decoder{s}_up",), up, o if bias else None))
        stack(f"decoder.stages.{place}", f"decoder{s}", convs, 2 * o, o, kernels[s])
        classes = options["out_channels"]
        wanted.update(conv_entries(f"decoder.seg_layers.{place}", (f"head{s}",), (classes, o, *ones), classes))
    return wanted


def check_channels(state: Mapping[str, np.ndarray], c_in: int, c_out: int, source: str) -> None:
    """Raise InputError unless the network takes `c_in` channels and gives `c_out`, as dataset.json says."""
    heads = [k for k in state if re.fullmatch(r"decoder\.seg_layers\.\d+\.weight", k)]
    first = [k for k in ("encoder.stem.convs.0.conv.weight", "encoder.stages.0.0.convs.0.conv.weight") if k in state]
    for keys, axis, expected, what in ((first, 1, c_in, "input channels"), (heads, 0, c_out, "classes or regions")):
        if keys and state[keys[0]].ndim > 3 and state[keys[0]].shape[axis] != expected:
            raise InputError(
                f"{source}: the network has {state[keys[0]].shape[axis]} {what}, dataset.json {expected}; "
                "take the dataset.json of this training"
            )


def _canonical(key: str) -> str:
    """The decoder holds the encoder, and each block its operations once more in a row: convolution, maybe dropout, norm."""
    key = re.sub(r"^decoder\.encoder\.", "encoder.", key)
    key = key.replace(".all_modules.0.", ".conv.")
    return re.sub(r"\.all_modules\.[12]\.", ".norm.", key)
