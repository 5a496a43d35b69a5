"""MONAI's `DynUNet`: its architecture read off the keys, its tensors put into our variables.

The blocks on the way down are `input_block`, `downsamples.i` and `bottleneck`; `upsamples.i` runs from the bottom up. Each tensor
but those of `output_block` has a second name under `skip_layers`, where level `l` is `"skip_layers" + ".next_layer" · l` with
`downsample`, `upsample` and `super_head`, and the innermost `next_layer` is the bottleneck.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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
    merge_aliases,
    norm_entries,
    read_variables,
)
from xaiseg.errors import InputError
from xaiseg.models.dynunet import DynUNet

_OURS = re.compile(r"skip_layers\.|input_block\.conv|downsamples\.\d+\.conv|upsamples\.\d+\.(transp_conv|conv_block)\.")
_ALIAS = re.compile(r"skip_layers((?:\.next_layer)*)\.(?:(downsample|upsample|super_head)\.)?(.+)")
_OUTPUT = "output_block.conv.conv"

# The fields of `Given` that this reader takes.
USES = ("strides", "norm", "activation")


def recognise(state: State) -> bool:
    """Whether the keys are those of a MONAI DynUNet, complete or not."""
    return any(_OURS.match(key) for key in state)


def read(state: State, source: str, given: Given) -> Reading:
    """The network of a checkpoint with the canonical names, their aliases, or both.

    Tensors tell all but the first stride, the kind of an affine norm, a norm without parameters and an activation without
    parameters; `given` overrides what is assumed for them. Raises InputError for keys and options that do not fit.
    """
    state = drop_counters(state)
    levels = _count_levels(state)
    state = merge_aliases(state, lambda key: _canonical(key, levels), source)
    firsts = [f"{name}.conv1.conv.weight" for name in _down(levels)]
    ups = [f"{name}.transp_conv.conv.weight" for name in _up(levels)]
    telling = [*firsts, *ups, f"{_OUTPUT}.weight"]
    if missing := [key for key in telling if key not in state]:
        raise InputError(
            f"{source}: not a complete MONAI DynUNet: {'; '.join(f'missing {key}' for key in missing[:12])}"
        )
    rank = state[firsts[0]].ndim
    if rank not in (4, 5):
        raise InputError(
            f"{source}: not a DynUNet: {firsts[0]} has shape {state[firsts[0]].shape}, expected 4 or 5 axes"
        )
    if odd := [key for key in telling if state[key].ndim != rank or not state[key].size]:
        shape = state[odd[0]].shape
        raise InputError(f"{source}: {odd[0]} has shape {shape}, expected {rank} axes like {firsts[0]}, none empty")
    check_stride_count(given, levels, source)

    steps = [kernel_sides(state[key]) for key in ups]
    norm, activation = given.norm or _norm(state), given.activation or _activation(state)
    options: dict[str, Any] = {
        "filters": [state[key].shape[0] for key in firsts],
        "kernel_size": [kernel_sides(state[key]) for key in firsts],
        "strides": list(given.strides) if given.strides is not None else [1, *steps],
        "upsample_kernel_size": steps,
        "out_channels": state[f"{_OUTPUT}.weight"].shape[0],
        "norm": norm,
        "activation": activation,
        "residual": any(f"{name}.conv3.conv.weight" in state for name in _down(levels)),
        "trans_bias": any(f"{name}.transp_conv.conv.bias" in state for name in _up(levels)),
        "heads": _count(state, lambda i: f"deep_supervision_heads.{i}."),
        "ndim": rank - 2,
    }
    c_in = state[firsts[0]].shape[1]
    _check_options(options, c_in, source)
    what = f"a MONAI DynUNet with norm {norm} and activation {activation}"
    variables = read_variables(state, _key_map(options, c_in), source, what)
    return Reading(
        "dynunet", options, c_in, options["out_channels"], variables, "decoder1.up", _assumed(norm, activation, given)
    )


def _down(levels: int) -> list[str]:
    return ["input_block", *(f"downsamples.{i}" for i in range(levels - 2)), "bottleneck"]


def _up(levels: int) -> list[str]:
    return [f"upsamples.{i}" for i in reversed(range(levels - 1))]


def _count(state: State, prefix: Callable[[int], str]) -> int:
    count = 0
    while any(key.startswith(prefix(count)) for key in state):
        count += 1
    return count


def _count_levels(state: State) -> int:
    steps = (
        _count(state, lambda i: f"upsamples.{i}."),
        _count(state, lambda i: f"downsamples.{i}.") + 1,
        _count(state, lambda i: "skip_layers" + ".next_layer" * i + ".upsample."),
    )
    return max(3, 1 + max(steps))  # no DynUNet has fewer than three


def _canonical(key: str, levels: int) -> str:
    if not (match := _ALIAS.fullmatch(key)):
        return key
    level, part, rest = match[1].count("."), match[2], match[3]
    bottom = levels - 1
    if part is None:
        return f"bottleneck.{rest}" if level == bottom else key
    if level >= bottom:
        return key
    if part == "super_head":
        return f"deep_supervision_heads.{level - 1}.{rest}" if level > 0 else key
    return f"{(_down if part == 'downsample' else _up)(levels)[level]}.{rest}"


def _norm(state: State) -> str:
    if any(key.endswith("norm1.running_mean") for key in state):
        return "batch"
    return "instance_affine" if any(key.endswith("norm1.weight") for key in state) else "instance"


def _activation(state: State) -> str:
    return "prelu" if any(key.endswith("lrelu.weight") for key in state) else "leakyrelu"


def _assumed(norm: str, activation: str, given: Given) -> tuple[str, ...]:
    lines = []
    if given.strides is None:
        lines.append("the first stride is 1")
    if given.norm is None and norm == "instance":
        lines.append("norm is instance, without parameters (keys tell none; norm none leaves none either)")
    if given.norm is None and norm == "instance_affine":
        lines.append("norm is instance_affine (norm group:N has the same keys)")
    if given.activation is None and activation == "leakyrelu":
        lines.append("activation is leakyrelu with slope 0.01 (keys tell none)")
    return tuple(lines)


def _check_options(options: dict[str, Any], c_in: int, source: str) -> None:
    """Whether there is such a network, as the network itself sees it."""
    network = DynUNet(**options)
    try:
        grid = jax.ShapeDtypeStruct((1, *network.tile_alignment, c_in), jnp.float32)
        jax.eval_shape(network.init, jax.random.key(0), grid)
    except ValueError as error:
        raise InputError(f"{source}: no DynUNet with these tensors and options: {error}") from error


def _key_map(options: dict[str, Any], c_in: int) -> KeyMap:
    wanted: KeyMap = {}
    ndim, norm, filters = options["ndim"], options["norm"], options["filters"]
    levels, ones = len(filters), (1,) * options["ndim"]

    def sides(value: int | list[int]) -> tuple[int, ...]:
        return (value,) * ndim if isinstance(value, int) else tuple(value)

    def block(key: str, name: str, inputs: int, features: int, kernel: tuple[int, ...], shortcut: bool) -> None:
        for i, weight in enumerate(((inputs, *kernel), (features, *kernel), (inputs, *ones))[: 2 + shortcut], 1):
            wanted.update(conv_entries(f"{key}.conv{i}.conv", (name, f"conv{i}"), (features, *weight)))
            wanted.update(norm_entries(norm, f"{key}.norm{i}", (name, f"norm{i}"), features))
        if options["activation"] == "prelu":
            wanted[f"{key}.lrelu.weight"] = Entry(("params", name, "act", "slope"), (1,))

    def head(key: str, name: str, features: int) -> None:
        classes = options["out_channels"]
        wanted.update(conv_entries(f"{key}.conv.conv", (name,), (classes, features, *ones), classes))

    kernels = [sides(k) for k in options["kernel_size"]]
    for level, key in enumerate(_down(levels)):
        inputs, features = filters[level - 1] if level else c_in, filters[level]
        changes = inputs != features or sides(options["strides"][level]) != ones
        name = f"encoder{level}" if level < levels - 1 else "bottleneck"
        block(key, name, inputs, features, kernels[level], options["residual"] and changes)
    for level, key in enumerate(_up(levels)):
        features, below = filters[level], filters[level + 1]
        step = sides(options["upsample_kernel_size"][level])
        bias = features if options["trans_bias"] else None
        up = (below, features, *step)
        wanted.update(conv_entries(f"{key}.transp_conv.conv", (f"decoder{level}_up",), up, bias))
        block(f"{key}.conv_block", f"decoder{level}", 2 * features, features, kernels[level + 1], shortcut=False)
    for level in range(1, options["heads"] + 1):
        head(f"deep_supervision_heads.{level - 1}", f"head{level}", filters[level])
    head("output_block", "output", filters[0])
    return wanted
