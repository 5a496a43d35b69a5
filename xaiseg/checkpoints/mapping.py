"""From names and layouts of PyTorch tensors to ours: the part that all architectures share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from xaiseg.errors import InputError

State = Mapping[str, np.ndarray]

# PyTorch's name of a leaf of a norm and ours, in the collection it belongs to.
_NORM_LEAVES = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


class Entry(NamedTuple):
    """Where one tensor goes: path in the variables, collection first, and the PyTorch shape it must have."""

    path: tuple[str, ...]
    shape: tuple[int, ...]


KeyMap = dict[str, Entry]
"""Torch key -> entry, one per tensor of the network: a bijection."""


class Given(NamedTuple):
    """What the caller knows and keys do not tell; None where unknown. The fields are options of `xaiseg convert`.

    strides: of each level, an int or one int per axis.
    """

    strides: tuple[int | tuple[int, ...], ...] | None = None
    norm: str | None = None
    activation: str | None = None
    patch_merging: str | None = None


class Reading(NamedTuple):
    """A network read off a checkpoint.

    architecture, options: for `ModelSpec`. c_in, c_out: channels of input and logits. variables: float32 numpy leaves.
    default_layer: the tap for Grad-CAM++. assumed: what the keys do not tell, as lines to print and to store with the model.
    """

    architecture: str
    options: dict[str, Any]
    c_in: int
    c_out: int
    variables: dict[str, Any]
    default_layer: str
    assumed: tuple[str, ...] = ()


def conv_entries(key: str, path: tuple[str, ...], weight: tuple[int, ...], bias: int | None = None) -> KeyMap:
    """Of a convolution or matrix product at `path`: its weight's PyTorch shape, and the length of its bias, if it has one."""
    entries = {f"{key}.weight": Entry(("params", *path, "kernel"), weight)}
    return entries if bias is None else entries | {f"{key}.bias": Entry(("params", *path, "bias"), (bias,))}


def norm_entries(kind: str, key: str, path: tuple[str, ...], features: int) -> KeyMap:
    """Of a normalisation at `path`: what `kind`, one of `layers.NORMS` or `layer`, leaves in a checkpoint."""
    if kind in ("instance", "none"):
        return {}
    return {
        f"{key}.{leaf}": Entry((collection, *path, ours), (features,))
        for leaf, (collection, ours) in _NORM_LEAVES.items()
        if collection == "params" or kind == "batch"
    }


def kernel_sides(weight: np.ndarray) -> int | list[int]:
    """Sides of a convolution's window, one number where they are equal."""
    sides = list(weight.shape[2:])
    return sides[0] if len(set(sides)) == 1 else sides


def check_stride_count(given: Given, levels: int, source: str) -> None:
    """Raise InputError where strides are given, but not one for each level."""
    if given.strides is not None and len(given.strides) != levels:
        raise InputError(
            f"{source}: the network has {levels} levels, {len(given.strides)} strides are given; give one per level"
        )


def check_finite(state: State, source: str) -> None:
    """Raise InputError where a tensor holds what float32 cannot."""
    if bad := [key for key, tensor in state.items() if not np.isfinite(as_float32(tensor)).all()]:
        raise InputError(f"{source}: {bad[0]} holds NaN or infinite values; the training that made it diverged")


def drop_counters(state: State) -> dict[str, np.ndarray]:
    """Without `num_batches_tracked`, which no result depends on."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def merge_aliases(state: State, canonical: Callable[[str], str], source: str) -> dict[str, np.ndarray]:
    """One tensor per name where a network registers one under several. `canonical` maps each key to its name.

    Raises InputError where two tensors of one name differ.
    """
    merged: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for key, tensor in state.items():
        name = canonical(key)
        if name in merged and not _equal(merged[name], tensor):
            raise InputError(
                f"{source}: {origin[name]} and {key} are one tensor of the network but differ; "
                "the file was edited or put together from two: save the state dict again"
            )
        if name not in merged:
            merged[name], origin[name] = tensor, key
    return merged


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    # NaN in both is equal here: that a network holds NaN is said later, in better words
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def read_variables(state: State, wanted: KeyMap, source: str, what: str) -> dict[str, Any]:
    """The tensors at their places, in our layout and float32.

    what: the architecture, for messages. Raises InputError that lists missing, unknown and misshapen keys.
    """
    check_keys(state, {key: entry.shape for key, entry in wanted.items()}, source, what)
    variables: dict[str, Any] = {}
    for key, entry in wanted.items():
        *names, leaf = entry.path
        place = variables
        for name in names:
            place = place.setdefault(name, {})
        place[leaf] = to_ours(leaf, state[key])
    return variables


def check_keys(state: State, wanted: Mapping[str, tuple[int, ...]], source: str, what: str) -> None:
    """Raise InputError unless the keys and shapes are those of `wanted`; at most twelve problems are listed."""
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unknown {key}" for key in state if key not in wanted]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(shape)}"
        for key, shape in wanted.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise InputError(
            f"{source}: does not fit {what}: {'; '.join(problems[:12])}{more}; "
            "expected exactly the tensors of that network: save its own state dict, unchanged"
        )


def as_float32(tensor: np.ndarray) -> np.ndarray:
    """`tensor` as the network will hold it; a double beyond float32's range becomes infinite."""
    with np.errstate(over="ignore"):
        return tensor.astype(np.float32)


def to_ours(leaf: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor in our layout. Kernels of any rank end in input, output: `[O, I, *window]` becomes `(*window, I, O)`.

    A transposed convolution's `[I, O, *window]` becomes `(*window, O, I)` by the same step; a matrix `[O, I]` becomes `(I, O)`.
    """
    tensor = as_float32(tensor)
    if leaf != "kernel":
        return tensor
    return np.ascontiguousarray(tensor.transpose(*range(2, tensor.ndim), 1, 0))
