"""MONAI's `SwinUNETR`: its architecture read off the keys, its tensors put into our variables."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xaiseg.checkpoints.mapping import (
    Entry,
    Given,
    KeyMap,
    Reading,
    State,
    conv_entries,
    drop_counters,
    merge_aliases,
    norm_entries,
    read_variables,
)
from xaiseg.errors import InputError
from xaiseg.models.swin import MERGINGS, relative_position_index
from xaiseg.models.swin_unetr import STAGES

_WHAT = "a MONAI SwinUNETR"
_INDEX = ".attn.relative_position_index"
_TABLE = ".attn.relative_position_bias_table"
_CONV_NORM = re.compile(r"(encoder\d+\.layer|decoder\d\.conv_block)\.norm\d\.(\w+)")
# What each kind of parameters that a norm leaves in the file can mean; the first is taken unless the caller knows better.
_NORMS = {"none": ("instance", "none"), "affine": ("instance_affine", "group:"), "running": ("batch",)}

# The fields of `Given` that this reader takes.
USES = ("norm", "patch_merging")


def recognise(state: State) -> bool:
    """Whether the keys are those of a MONAI SwinUNETR, complete or not, or of its self-supervised encoder."""
    return any(re.match(r"swinViT\.|(encoder\.)?layers1\.0\.(0\.)?blocks\.", key) for key in state)


def read(state: State, source: str, given: Given) -> Reading:
    """Options of `SwinUNETR` and its variables. `given.patch_merging` is needed: no tensor tells which one was trained.

    Raises InputError for a file without a decoder, missing, unknown and misshapen keys, a stored relative position index that is
    not ours, and where `patch_merging` is not given.
    """
    state = merge_aliases(drop_counters(state), _canonical, source)
    if not any(re.match(r"decoder[1-5]\.", key) for key in state):
        raise InputError(
            f"{source}: only the self-supervised encoder of {_WHAT}, without a decoder, so there are no logits to explain; "
            "give the checkpoint of the network that was fine-tuned for segmentation"
        )
    tables = [_block(i, 0) + _TABLE for i in range(1, STAGES + 1)]
    ranks = {
        "swinViT.patch_embed.proj.weight": (4, 5),
        "out.conv.conv.weight": (4, 5),
        f"{_block(STAGES, 0)}.mlp.linear1.weight": (2,),
        **dict.fromkeys(tables, (2,)),
    }
    embed, out, hidden, *biases = _of_rank(state, ranks, source)
    ndim = embed.ndim - 2
    feature_size, c_in = embed.shape[:2]
    last = feature_size * 2 ** (STAGES - 1)
    norm = _norm(state, source, given.norm)
    options = {
        "patch_merging": given.patch_merging,
        "feature_size": feature_size,
        "out_channels": out.shape[0],
        "depths": [_depth(state, i) for i in range(1, STAGES + 1)],
        "num_heads": [table.shape[1] for table in biases],
        "attention_window": _attention_window(state, biases[0].shape[0], ndim, source),
        "mlp_ratio": hidden.shape[0] / last,
        "qkv_bias": f"{_block(1, 0)}.attn.qkv.bias" in state,
        "norm": norm,
        "patch_norm": "swinViT.patch_embed.norm.weight" in state,
        "use_v2": any(key.startswith("swinViT.layers1c.") for key in state),
        "ndim": ndim,
    }
    tensors = {key: tensor for key, tensor in state.items() if not key.endswith(_INDEX)}
    variables = read_variables(tensors, key_map(options, c_in), source, _WHAT)
    _check_merging(given.patch_merging, source)
    assumed = ["normalize=True, MONAI's default: a network trained without has the same keys"]
    if given.norm is None and norm == "instance":
        assumed.append("instance norm without parameters in the convolution blocks, MONAI's default: it leaves no keys")
    if given.norm is None and norm == "instance_affine":
        assumed.append("instance norm in the convolution blocks: a group norm has the same keys")
    return Reading("swin_unetr", options, c_in, out.shape[0], variables, "decoder2.up", tuple(assumed))


def key_map(options: dict[str, Any], c_in: int) -> KeyMap:
    """Torch key -> where it goes, for options of `SwinUNETR`."""
    wanted: KeyMap = {}
    f, ndim, norm = options["feature_size"], options["ndim"], options["norm"]

    def dense(key: str, path: tuple[str, ...], c_out: int, c: int, bias: bool = True) -> None:
        wanted.update(conv_entries(key, path, (c_out, c), c_out if bias else None))

    def layer_norm(key: str, path: tuple[str, ...], features: int) -> None:
        wanted.update(norm_entries("layer", key, path, features))

    def residual(key: str, path: tuple[str, ...], c: int, c_out: int, norm: str) -> None:
        for i, (side, features) in enumerate(((3, c), (3, c_out), (1, c)) if c != c_out else ((3, c), (3, c_out)), 1):
            weight = (c_out, features, *(side,) * ndim)
            wanted.update(conv_entries(f"{key}.conv{i}.conv", (*path, f"conv{i}"), weight))
            wanted.update(norm_entries(norm, f"{key}.norm{i}", (*path, f"norm{i}"), c_out))

    def convolution(key: str, name: str, c_out: int, c: int, side: int) -> None:
        wanted.update(conv_entries(key, (name,), (c_out, c, *(side,) * ndim), c_out))

    convolution("swinViT.patch_embed.proj", "patch_embed", f, c_in, 2)
    if options["patch_norm"]:
        layer_norm("swinViT.patch_embed.norm", ("patch_embed_norm",), f)
    window = options["attention_window"]
    rows = math.prod(2 * w - 1 for w in ([window] * ndim if isinstance(window, int) else window))
    for i, (depth, heads) in enumerate(zip(options["depths"], options["num_heads"], strict=True), 1):
        c = f * 2 ** (i - 1)
        if options["use_v2"]:
            residual(f"swinViT.layers{i}c.0.layer", (f"stage{i}_residual",), c, c, "instance")
        for j in range(depth):
            key, name = _block(i, j), f"stage{i}_block{j}"
            layer_norm(f"{key}.norm1", (name, "norm1"), c)
            wanted[key + _TABLE] = Entry(("params", name, "attn", "position_bias"), (rows, heads))
            dense(f"{key}.attn.qkv", (name, "attn", "qkv"), 3 * c, c, options["qkv_bias"])
            dense(f"{key}.attn.proj", (name, "attn", "proj"), c, c)
            layer_norm(f"{key}.norm2", (name, "norm2"), c)
            hidden = int(c * options["mlp_ratio"])
            dense(f"{key}.mlp.linear1", (name, "linear1"), hidden, c)
            dense(f"{key}.mlp.linear2", (name, "linear2"), c, hidden)
        merge = f"swinViT.layers{i}.0.downsample"
        layer_norm(f"{merge}.norm", (f"stage{i}_merge", "norm"), 2**ndim * c)
        dense(f"{merge}.reduction", (f"stage{i}_merge", "reduction"), 2 * c, 2**ndim * c, bias=False)
    for i, c, c_out in ((1, c_in, f), (2, f, f), (3, 2 * f, 2 * f), (4, 4 * f, 4 * f), (10, 16 * f, 16 * f)):
        residual(f"encoder{i}.layer", (f"encoder{i}",), c, c_out, norm)
    for i, c, c_out in ((5, 16 * f, 8 * f), (4, 8 * f, 4 * f), (3, 4 * f, 2 * f), (2, 2 * f, f), (1, f, f)):
        up = (c, c_out, *(2,) * ndim)
        wanted.update(conv_entries(f"decoder{i}.transp_conv.conv", (f"decoder{i}", "up"), up))
        residual(f"decoder{i}.conv_block", (f"decoder{i}", "conv_block"), 2 * c_out, c_out, norm)
    convolution("out.conv.conv", "out", options["out_channels"], f, 1)
    return wanted


def _canonical(key: str) -> str:
    """Self-supervised training names the layers of the MLP otherwise."""
    return re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", key)


def _block(stage: int, i: int) -> str:
    return f"swinViT.layers{stage}.0.blocks.{i}"


def _depth(state: State, stage: int) -> int:
    return next(i for i in itertools.count() if _block(stage, i) + _TABLE not in state)


def _of_rank(state: State, ranks: Mapping[str, tuple[int, ...]], source: str) -> list[np.ndarray]:
    """The tensors that the architecture is read off."""
    if missing := [key for key in ranks if key not in state]:
        raise InputError(f"{source}: not a complete SwinUNETR: {'; '.join(f'missing {key}' for key in missing)}")
    for key, rank in ranks.items():
        if state[key].ndim not in rank:
            expected = " or ".join(map(str, rank))
            raise InputError(f"{source}: not {_WHAT}: {key} has shape {state[key].shape}, expected {expected} axes")
    return [state[key] for key in ranks]


def _norm(state: State, source: str, given: str | None) -> str:
    names = {match[2] for key in state if (match := _CONV_NORM.match(key))}
    left = "running" if "running_mean" in names else "affine" if names else "none"
    if given is not None and not given.startswith(_NORMS[left]):
        raise InputError(
            f"{source}: the norms of its convolution blocks have {sorted(names) or 'no parameters'}, which {given!r} has not; "
            f"known for such keys are {', '.join(_NORMS[left])}"
        )
    return given or _NORMS[left][0]


def _attention_window(state: State, rows: int, ndim: int, source: str) -> int | list[int]:
    """Sides of the attention window: those of a cube, or of the one box that gives the relative position index of the file."""
    indices = {key: tensor for key, tensor in state.items() if key.endswith(_INDEX)}
    sides = [(n + 1) // 2 for n in range(1, rows + 1, 2) if rows % n == 0]
    boxes = [box for box in itertools.product(sides, repeat=ndim) if math.prod(2 * w - 1 for w in box) == rows]
    if not indices:
        boxes = [box for box in boxes if len(set(box)) == 1]
    for key, stored in indices.items():
        boxes = [box for box in boxes if _is_index(stored, box)]
        if not boxes:
            raise InputError(
                f"{source}: {key} is not the relative position index of any window with {rows} offsets; the file was edited"
            )
    if not boxes:
        raise InputError(
            f"{source}: {rows} relative positions fit no attention window with equal sides, and the file holds no "
            "relative_position_index to read other sides from; save the whole state dict"
        )
    return boxes[0][0] if len(set(boxes[0])) == 1 else list(boxes[0])


def _is_index(stored: np.ndarray, window: Sequence[int]) -> bool:
    tokens = math.prod(window)
    return stored.shape == (tokens, tokens) and np.array_equal(stored, relative_position_index(window))


def _check_merging(given: str | None, source: str) -> None:
    if given is None:
        raise InputError(
            f"{source}: the keys of a SwinUNETR do not tell how patches are merged, and each way gives other logits; "
            "say it with --patch-merging: legacy if it was trained with MONAI <= 1.4, merging with MONAI >= 1.5, "
            "mergingv2 if with downsample='mergingv2' in any version"
        )
    if given not in MERGINGS:
        raise InputError(
            f"{source}: patch merging is {given!r}, expected {', '.join(MERGINGS)}; say it with --patch-merging"
        )
