"""MONAI's `UNet` (num_res_units=0): its architecture read off the keys, its tensors put into our variables.

With `P(l) = "model" + ".1.submodule" · l`, level `l` on the way down is `P(l).0`, on the way up `P(l).2`, the bottleneck is
`P(L)` itself. Each has `conv` and, but for the top's way up, `adn.N` (norm) and `adn.A` (PReLU).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xaiseg.errors import InputError

_IGNORED = ".num_batches_tracked"


def recognise(state: Mapping[str, np.ndarray]) -> bool:
    """Whether the keys are those of a MONAI UNet, complete or not."""
    return "model.0.conv.weight" in state or any(re.match(r"model\.1\.submodule\.", k) for k in state)


def read(
    state: Mapping[str, np.ndarray], source: str, strides: Sequence[int] | None = None
) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Options of `UNet`, the number of input channels, and the variables.

    Strides cannot be read from tensors: unless given, each level is taken to halve the grid, as in the paper. Raises
    InputError that lists unknown, missing and misshapen keys.
    """
    state = {k: v for k, v in state.items() if not k.endswith(_IGNORED)}
    if any(".unit" in k or k.endswith("residual.weight") for k in state):
        raise InputError(f"{source}: a MONAI UNet with residual units; only num_res_units=0 can be converted")
    levels = 1
    while any(key.startswith(f"{_path(levels)}.0.") for key in state):
        levels += 1
    down = [f"{_path(level)}.0.conv.weight" for level in range(levels)] + [f"{_path(levels)}.conv.weight"]
    if missing := [key for key in (*down, "model.2.conv.weight") if key not in state]:
        raise InputError(f"{source}: not a complete MONAI UNet: {'; '.join(f'missing {key}' for key in missing)}")
    if odd := [key for key in (*down, "model.2.conv.weight") if state[key].ndim not in (4, 5)]:
        raise InputError(f"{source}: not a MONAI UNet: {odd[0]} has shape {state[odd[0]].shape}, expected 4 or 5 axes")

    if strides is not None and len(strides) != levels:
        raise InputError(
            f"{source}: the network has {levels} levels, {len(strides)} strides are given; give one per level"
        )
    channels = [state[key].shape[0] for key in down]
    top, up = state["model.0.conv.weight"], state["model.2.conv.weight"]
    if any(".adn.N.running_" in key for key in state):
        norm = "batch"
    elif any(key.endswith(".adn.N.weight") for key in state):
        norm = "instance_affine"
    else:
        # without parameters an instance norm leaves no key; MONAI's default norm is the one to expect
        norm = "instance"
    options = {
        "channels": channels,
        "strides": list(strides) if strides is not None else [2] * levels,
        "out_channels": up.shape[1],
        "norm": norm,
        "kernel_size": _kernel(top),
        "up_kernel_size": _kernel(up),
        "ndim": top.ndim - 2,
    }

    wanted = _expected(channels, top.shape[1], up.shape[1], norm, top.shape[2:], up.shape[2:])
    _check_keys(state, {key: shape for key, (_, shape) in wanted.items()}, source)
    variables: dict[str, Any] = {}
    for key, ((collection, *names), _) in wanted.items():
        leaf = variables.setdefault(collection, {})
        for name in names[:-1]:
            leaf = leaf.setdefault(name, {})
        leaf[names[-1]] = _convert(names[-1], state[key])
    return options, top.shape[1], variables


def _path(level: int) -> str:
    return "model" + ".1.submodule" * level


def _kernel(weight: np.ndarray) -> int | list[int]:
    sides = list(weight.shape[2:])
    return sides[0] if len(set(sides)) == 1 else sides


_Expected = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]


def _expected(channels: list[int], c_in: int, c_out: int, norm: str, k: tuple, up_k: tuple) -> _Expected:
    """Torch key -> (our path, torch shape), one entry per tensor: a bijection."""
    wanted: _Expected = {}

    def block(key: str, name: str, weight: tuple[int, ...], features: int, adn: bool = True) -> None:
        wanted[f"{key}.conv.weight"] = ("params", f"{name}_conv", "kernel"), weight
        wanted[f"{key}.conv.bias"] = ("params", f"{name}_conv", "bias"), (features,)
        if not adn:
            return
        wanted[f"{key}.adn.A.weight"] = ("params", f"{name}_act", "slope"), (1,)
        if norm in ("batch", "instance_affine"):
            wanted[f"{key}.adn.N.weight"] = ("params", f"{name}_norm", "scale"), (features,)
            wanted[f"{key}.adn.N.bias"] = ("params", f"{name}_norm", "bias"), (features,)
        if norm == "batch":
            wanted[f"{key}.adn.N.running_mean"] = ("batch_stats", f"{name}_norm", "mean"), (features,)
            wanted[f"{key}.adn.N.running_var"] = ("batch_stats", f"{name}_norm", "var"), (features,)

    below = channels[-1]
    levels = len(channels) - 1
    block(_path(levels), "bottleneck", (below, channels[-2], *k), below)
    for level in reversed(range(levels)):
        skip, features = channels[level], channels[level - 1] if level else c_out
        block(f"{_path(level)}.0", f"encoder{level}", (skip, channels[level - 1] if level else c_in, *k), skip)
        block(f"{_path(level)}.2", f"decoder{level}", (skip + below, features, *up_k), features, adn=level > 0)
        below = features
    return wanted


def _check_keys(state: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], source: str) -> None:
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unknown {key}" for key in state if key not in wanted]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(shape)}"
        for key, shape in wanted.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    if problems:
        raise InputError(f"{source}: does not fit a MONAI UNet: {'; '.join(problems)}")


def as_float32(tensor: np.ndarray) -> np.ndarray:
    """`tensor` as the network will hold it; a double beyond float32's range becomes infinite."""
    with np.errstate(over="ignore"):
        return tensor.astype(np.float32)


def _convert(leaf: str, tensor: np.ndarray) -> np.ndarray:
    tensor = as_float32(tensor)
    if leaf != "kernel":
        return tensor
    spatial = tuple(range(2, tensor.ndim))
    # both are kernels of a convolution, [O, I, k] and for the transposed one [I, O, k]: spatial axes first, then input, output
    return np.ascontiguousarray(tensor.transpose(*spatial, 1, 0))
