"""MONAI's `UNet`: its architecture read off the keys, its tensors put into our variables.

With `P(l) = "model" + ".1.submodule" · l`, level `l` on the way down is `P(l).0`, on the way up `P(l).2`, the bottleneck is
`P(L)` itself. Without residual units each has `conv` and, but for the top's way up, `adn.N` (norm) and `adn.A` (activation). With
them the way down and the bottleneck have `conv.unit{j}.{conv,adn}` and the shortcut `residual`, the way up a transposed
convolution `0.{conv,adn}` and a residual unit `1.conv.unit0`. MONAI's default order, norm before activation, is taken for granted.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from xaiseg.checkpoints.mapping import (
    Entry,
    Given,
    KeyMap,
    Reading,
    State,
    check_stride_count,
    conv_entries,
    drop_counters,
    kernel_sides,
    norm_entries,
    read_variables,
)
from xaiseg.errors import InputError
from xaiseg.models.layers import ACTIVATIONS, check_norm

# The fields of `Given` that this reader takes.
USES = ("strides", "norm", "activation")


def recognise(state: State) -> bool:
    """Whether the keys are those of a MONAI UNet, complete or not."""
    return "model.0.conv.weight" in state or any(re.match(r"model\.1\.submodule\.", k) for k in state)


def read(state: State, source: str, given: Given) -> Reading:
    """The `UNet` of a state dict. `given` has one stride per level; norm and activation where the keys do not tell them.

    Raises InputError that lists unknown, missing and misshapen keys, for `given` that contradicts the keys, and for an activation
    that is neither given nor a PReLU.
    """
    state = drop_counters(state)
    levels = 1
    while any(key.startswith(f"{_path(levels)}.0.") for key in state):
        levels += 1
    units = {found[1] for key in state if (found := re.search(r"\.conv\.unit([0-9]+)\.", key))}
    first, up = ("conv.unit0.conv.weight", "model.2.0.conv.weight") if units else ("conv.weight", "model.2.conv.weight")
    down = [*(f"{_path(level)}.0.{first}" for level in range(levels)), f"{_path(levels)}.{first}"]
    if missing := [key for key in (*down, up) if key not in state]:
        raise InputError(
            f"{source}: not a complete MONAI UNet: {'; '.join(f'missing {key}' for key in missing)}; "
            "another network of MONAI's with such names cannot be converted, an incomplete file must be saved again"
        )
    if odd := [key for key in (*down, up) if state[key].ndim not in (4, 5)]:
        raise InputError(f"{source}: not a MONAI UNet: {odd[0]} has shape {state[odd[0]].shape}, expected 4 or 5 axes")

    strides, unsure_strides = _strides(state, down[:-1], bool(units), source, given)
    norm, unsure_norm = _norm(state, source, given)
    channels, c_in, c_out = [state[key].shape[0] for key in down], state[down[0]].shape[1], state[up].shape[1]
    options: dict[str, Any] = {
        "channels": channels,
        "strides": strides,
        "out_channels": c_out,
        "norm": norm,
        "kernel_size": kernel_sides(state[down[0]]),
        "up_kernel_size": kernel_sides(state[up]),
        "ndim": state[up].ndim - 2,
        "residual_units": len(units),
        "activation": _activation(state, source, given),
        "use_bias": any(key.endswith((".conv.bias", ".residual.bias")) for key in state),
    }
    variables = read_variables(state, _key_map(options, c_in), source, "a MONAI UNet")
    layer = "decoder1.conv" if levels > 1 else "bottleneck" if units else "bottleneck.conv"
    return Reading("unet", options, c_in, c_out, variables, layer, (*unsure_strides, *unsure_norm))


def _path(level: int) -> str:
    return "model" + ".1.submodule" * level


def _strides(
    state: State, down: list[str], residual: bool, source: str, given: Given
) -> tuple[list[int | list[int]], tuple[str, ...]]:
    """The stride of each level and what is assumed. `down`: keys of the first convolution of each."""
    strided = [_is_strided(state, level, key) if residual else None for level, key in enumerate(down)]
    if given.strides is None:
        strides: list[int | list[int]] = [1 if known is False else 2 for known in strided]
        if 2 not in strides:
            return strides, ()
        if 1 in strides:
            return strides, (f"strides {','.join(map(str, strides))} (the shortcuts tell only a 1; --strides)",)
        return strides, ("strides 2 at every level (keys do not tell; --strides)",)
    check_stride_count(given, len(down), source)
    axes = state[down[0]].ndim - 2
    for level, (stride, known) in enumerate(zip(given.strides, strided, strict=True)):
        if isinstance(stride, tuple) and len(stride) != axes:
            raise InputError(
                f"{source}: stride {stride} is given for level {level}, but the network has {axes} spatial axes"
            )
        if known is not None and known != _above_one(stride):
            raise InputError(
                f"{source}: stride {stride} is given for level {level}, but the shortcut of its residual unit is that of "
                f"{'a stride above 1' if known else 'stride 1'}; give the strides that the network was built with"
            )
    return [list(stride) if isinstance(stride, tuple) else stride for stride in given.strides], ()


def _above_one(stride: int | Sequence[int]) -> bool:
    return (stride if isinstance(stride, int) else math.prod(stride)) != 1


def _is_strided(state: State, level: int, first: str) -> bool | None:
    """Whether the shortcut of a residual unit has a stride above 1: it is as wide as the other convolutions then, and 1×1×1 or
    absent if not. None where both look alike."""
    shortcut = f"{_path(level)}.0.residual."
    if not any(key.startswith(shortcut) for key in state):
        return False
    if (weight := state.get(f"{shortcut}weight")) is None:
        return None
    kernel, window = state[first].shape[2:], weight.shape[2:]
    one = (1,) * len(kernel)
    if window == kernel and (kernel != one or weight.shape[0] == weight.shape[1]):
        return True
    return False if window == one != kernel else None


def _norm(state: State, source: str, given: Given) -> tuple[str, tuple[str, ...]]:
    """The norm and what is assumed."""
    if any(".adn.N.running_" in key for key in state):
        possible, unsure = ["batch"], ""
    elif any(".adn.N." in key for key in state):
        possible, unsure = (
            ["instance_affine", "group:N"],
            "instance norm with parameters (keys cannot tell it from group norm",
        )
    else:
        possible, unsure = ["instance", "none"], "instance norm without parameters (keys cannot tell it from none"
    if given.norm is None:
        return possible[0], (f"{unsure}; --norm)",) if unsure else ()
    try:
        check_norm(given.norm)
    except ValueError as error:
        raise InputError(f"{source}: {error}; give one of them with --norm") from error
    if ("group:N" if given.norm.startswith("group:") else given.norm) not in possible:
        raise InputError(
            f"{source}: norm {given.norm} is given, but the keys are those of {' or '.join(possible)}; correct --norm"
        )
    return given.norm, ()


def _activation(state: State, source: str, given: Given) -> str:
    if any(key.endswith(".adn.A.weight") for key in state):
        if given.activation not in (None, "prelu"):
            raise InputError(
                f"{source}: activation {given.activation} is given, but the keys are those of prelu (adn.A.weight); leave "
                "--activation out"
            )
        return "prelu"
    if given.activation not in ACTIVATIONS:
        found = "is not given" if given.activation is None else f"is given as {given.activation}"
        raise InputError(
            f"{source}: no adn.A.weight, so the activation is one without parameters, which keys do not tell, and it {found}; "
            f"give {', '.join(ACTIVATIONS)} with --activation"
        )
    return given.activation


def _key_map(options: dict[str, Any], c_in: int) -> KeyMap:
    channels, c_out, norm, units = (options[k] for k in ("channels", "out_channels", "norm", "residual_units"))
    one = (1,) * options["ndim"]
    kernel, up_kernel = (
        (k,) * len(one) if isinstance(k, int) else tuple(k) for k in (options["kernel_size"], options["up_kernel_size"])
    )
    wanted: KeyMap = {}

    def conv(key: str, path: tuple[str, ...], weight: tuple[int, ...], features: int) -> None:
        wanted.update(conv_entries(key, path, weight, features if options["use_bias"] else None))

    def block(key: str, name: tuple[str, ...], weight: tuple[int, ...], features: int, adn: bool = True) -> None:
        *within, stem = name
        conv(f"{key}.conv", (*within, f"{stem}_conv"), weight, features)
        if not adn:
            return
        wanted.update(norm_entries(norm, f"{key}.adn.N", (*within, f"{stem}_norm"), features))
        if options["activation"] == "prelu":
            wanted[f"{key}.adn.A.weight"] = Entry(("params", *within, f"{stem}_act", "slope"), (1,))

    def down(key: str, name: str, c: int, features: int, stride: int | Sequence[int]) -> None:
        if not units:
            block(key, (name,), (features, c, *kernel), features)
            return
        for j in range(units):
            block(f"{key}.conv.unit{j}", (name, f"unit{j}"), (features, features if j else c, *kernel), features)
        if _above_one(stride) or c != features:
            window = kernel if _above_one(stride) else one
            conv(f"{key}.residual", (name, "residual"), (features, c, *window), features)

    def up(key: str, name: str, c: int, features: int, top: bool) -> None:
        block(f"{key}.0" if units else key, (name,), (c, features, *up_kernel), features, adn=bool(units) or not top)
        if units:
            block(f"{key}.1.conv.unit0", (name, "unit0"), (features, features, *kernel), features, adn=not top)

    below = channels[-1]
    levels = len(channels) - 1
    down(_path(levels), "bottleneck", channels[-2], below, 1)
    for level in reversed(range(levels)):
        skip, above = channels[level], channels[level - 1] if level else None
        down(f"{_path(level)}.0", f"encoder{level}", above or c_in, skip, options["strides"][level])
        up(f"{_path(level)}.2", f"decoder{level}", skip + below, above or c_out, top=level == 0)
        below = above
    return wanted
