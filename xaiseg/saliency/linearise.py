"""Views of the network linearised at one image, and the passes back through them: the compiled steps of everything with gradients.

Three programs do nearly all the work, compiled once for a network: the linearisation of a view, and the pull-back of a chunk of
cotangents, in two sizes of chunks.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import LogitsFn
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor, check_grid, cut
from xaiseg.inference.devices import device_of
from xaiseg.saliency.schedule import Geometry, Portion, View
from xaiseg.saliency.targets import Head

# Linearised views kept at once: as many as a quarter of the memory holds, and no more than this.
_KEPT = 64
_KEPT_SHARE = 4
# On CPU a chunk whose temporaries outgrow this is slower per row than a smaller one: fresh pages cost more than batching saves.
_CPU_WORKING_SET = 40 * 2**20
MAX_CHUNK = 128
# A small chunk is this fraction of a large one: padding wastes little, and two programs do.
_SMALL = 8
# Rows that are held while their views, too large to be kept together, are linearised one after another.
_HELD_ROWS = 32


class Linear(NamedTuple):
    """A view at one image: its chosen logits `(*sides, n)`, and the pull-back of their cotangents to the field."""

    logits: Array
    pull: Any


class Views:
    """The views of one padded volume, linearised when they are asked for, the last ones kept until they are forgotten."""

    def __init__(
        self,
        predictor: StitchedPredictor,
        geometry: Geometry,
        padded: Array,
        head: Head,
        memory: int | None = None,
    ) -> None:
        self.geometry, self.head = geometry, head
        self._predictor = predictor
        self._source = geometry.with_reach(padded)
        self._kept: OrderedDict[View, Linear] = OrderedDict()
        self._budget = memory if memory is not None else total_memory(device_of(predictor)) // _KEPT_SHARE

    def __getitem__(self, view: View) -> Linear:
        if view not in self._kept:
            while self._kept and (len(self._kept) >= _KEPT or not self.fits(len(self._kept) + 1)):
                self._kept.popitem(last=False)
            self._kept[view] = self._linearise(view)
        self._kept.move_to_end(view)
        return self._kept[view]

    def forget(self, view: View) -> None:
        self._kept.pop(view, None)

    def fits(self, count: int) -> bool:
        """Whether so many views may be kept, all being as large as the last; as far as is known."""
        if not self._kept:
            return True
        newest = next(reversed(self._kept.values()))
        return count * sum(leaf.nbytes for leaf in jax.tree.leaves(newest)) <= self._budget

    def values(self, portion: Portion) -> np.ndarray:
        """`∇t` at the blended logits of a portion's voxels, `(n, classes)`."""
        head, count = self.head, len(portion.row)
        if portion.values is not None:
            return portion.values
        if head.linear:
            classes = len(head.classes or ())
            return np.broadcast_to(_constant_gradient(head, classes), (count, classes))
        # on the host, and in few sizes: gathering so few numbers is not worth a program for each size of lesion
        blended: Any = 0.0
        for view, place, share in zip(portion.views, portion.place, portion.share, strict=True):
            logits = np.asarray(self[view].logits)
            blended = blended + logits[tuple(place.T)] * share[:, None].astype(logits.dtype)
        return np.asarray(_gradient(head, fill(blended, few_sizes(count))))[:count]

    def _linearise(self, view: View) -> Linear:
        p, plan = self._predictor, self.geometry.plan
        corner = self.geometry.place(view)
        if p.local_fn is None:
            return Linear(*linearise_window(p.logits_fn, self._source, corner, plan.window, self.head))
        start, sides = np.array(view[1:], np.int32), np.array(plan.window, np.int32)
        function, field = p.local_fn.function, p.local_fn.field
        return Linear(*linearise_tile(function, self._source, corner, start, sides, field, self.head))


@partial(jax.jit, static_argnums=(3, 4))
def linearise_window(logits_fn: LogitsFn, padded: Array, corner: Array, window: tuple[int, ...], head: Head) -> Any:
    def chosen(x: Array) -> Array:
        logits = logits_fn(x[None])
        check_grid(logits, window)
        return head.choose(logits[0])

    return jax.vjp(chosen, cut(padded, corner, window))


@partial(jax.jit, static_argnums=(5, 6))
def linearise_tile(
    function: Any, padded: Array, corner: Array, start: Array, sides: Array, field: tuple[int, ...], head: Head
) -> Any:
    x = cut(padded, corner, field)
    return jax.vjp(lambda x: head.choose(function(x[None], start, sides)[0]), x)


@partial(jax.jit, static_argnums=0)
def _gradient(head: Head, blended: Array) -> Array:
    return head.gradient(blended)


@lru_cache(maxsize=64)
def _constant_gradient(head: Head, classes: int) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(head.gradient(jnp.zeros(classes)))


class Chunk(NamedTuple):
    """Cotangents that are pulled back together. Entry `e` adds `share[view, e] · value[e]` at `place[view, e]` to row `row_of[e]`.

    instance, number, weight: `(K,)` of each row: whose it is, -1 for none; its number; how many rows it stands for.
    """

    row_of: np.ndarray
    place: np.ndarray
    share: np.ndarray
    value: np.ndarray
    instance: np.ndarray
    number: np.ndarray
    weight: np.ndarray

    @property
    def rows(self) -> int:
        return int(np.count_nonzero(self.weight))


def row_chunks(portion: Portion, values: np.ndarray, sizes: Sequence[int]) -> Iterator[Chunk]:
    """One row for each voxel, in chunks of the given sizes, largest first."""
    first, count = 0, len(portion.row)
    while first < count:
        size = _next_size(count - first, sizes)
        held = slice(first, first + size)
        part, first = portion.part(held), first + size
        filled = partial(fill, size=size)
        yield Chunk(
            np.arange(size, dtype=np.int32),
            filled(part.place, axis=1),
            filled(part.share, axis=1),
            filled(values[held]),
            filled(part.instance, value=-1),
            filled(part.row),
            filled(np.ones(len(part.row), np.float32)),
        )


def sum_chunks(portion: Portion, values: np.ndarray, sizes: Sequence[int]) -> Iterator[Chunk]:
    """One row for each instance of a portion, the sum of its own."""
    numbers, row_of = np.unique(portion.instance, return_inverse=True)
    first = 0
    while first < len(numbers):
        size = _next_size(len(numbers) - first, sizes)
        held = (row_of >= first) & (row_of < first + size)
        part = portion.part(np.flatnonzero(held))
        # a row that comes from several views counts by its shares, which add up to one
        counts = np.bincount(row_of[held] - first, part.share[0])
        # few shapes of the step that builds the cotangents
        entries = partial(fill, size=few_sizes(len(part.row)))
        yield Chunk(
            entries((row_of[held] - first).astype(np.int32)),
            entries(part.place, axis=1),
            entries(part.share, axis=1),
            entries(values[held]),
            fill(numbers[first : first + size], size, value=-1),
            np.zeros(size, np.int32),
            fill(counts.astype(np.float32), size),
        )
        first += size


def _next_size(left: int, sizes: Sequence[int]) -> int:
    """The largest size unless more than half of it would be padding."""
    large, small = sizes[0], sizes[-1]
    return large if left > large // 2 or small == large else small


def few_sizes(count: int) -> int:
    """The next power of two: programs are compiled for few sizes."""
    return 1 << (count - 1).bit_length()


def fill(array: np.ndarray, size: int, axis: int = 0, value: float = 0) -> np.ndarray:
    """Zeros behind the last, so that there is a compiled shape; an entry with share 0 adds nothing."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths, constant_values=value)


def pull_rows(linear: Linear, chunk: Chunk, view: int, sides: tuple[int, ...]) -> Array:
    """The rows of a chunk through one of the portion's views: `(K, *field, C)`."""
    shape = (len(chunk.number), *sides, linear.logits.shape[-1])
    cotangents = _cotangents(chunk.row_of, chunk.place[view], chunk.share[view], chunk.value, shape)
    return pull_back(linear.pull, cotangents.astype(linear.logits.dtype))


@partial(jax.jit, static_argnums=4)
def _cotangents(row_of: Array, place: Array, share: Array, value: Array, shape: tuple[int, ...]) -> Array:
    at = (row_of, place[:, 0], place[:, 1], place[:, 2])
    return jnp.zeros(shape, value.dtype).at[at].add(share[:, None].astype(value.dtype) * value)


@jax.jit
def pull_back(pull: Any, cotangents: Array) -> Array:
    return jax.vmap(lambda cotangent: pull(cotangent)[0])(cotangents)


def chunk_sizes(linear: Linear, chunk: int | None, memory: int | None, extra: int = 0) -> tuple[int, ...]:
    """Rows to pull back together, large and small: `chunk` if given, else what is fast here and fits into `memory` bytes.

    `extra` bytes a row are needed besides the pull-back.

    Raises InputError where `memory` holds fewer than the rows asked for.
    """
    if chunk is not None and memory is None:
        return (chunk,)  # nothing to find out, for which a row would be compiled
    needed = row_bytes(linear) + extra
    if memory is not None and memory < needed * (chunk or 1):
        rows = f"a chunk of {chunk} rows" if chunk else "one row"
        raise InputError(
            f"--memory {memory / 2**20:.3g} MiB is too little: {rows} of this network takes "
            f"{needed * (chunk or 1) / 2**20:.3g} MiB; "
            f"give more memory{' or a smaller --chunk' if chunk else ''}"
        )
    if chunk is not None:
        return (chunk,)
    device = next(iter(linear.logits.devices()))
    budget = _CPU_WORKING_SET if device.platform == "cpu" else max(total_memory(device) // 4, 2**30)
    if memory is not None:
        budget = min(budget, memory)
    size = max(1, min(MAX_CHUNK, budget // max(needed, 1)))
    return (size, size // _SMALL) if size >= 2 * _SMALL else (size,)


def row_bytes(linear: Linear) -> int:
    """Bytes of temporaries and output that one row takes, as XLA plans them."""
    leaves, treedef = jax.tree.flatten(linear)
    return _row_bytes(treedef, tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves))


@lru_cache(maxsize=32)
def _row_bytes(treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> int:
    linear = jax.tree.unflatten(treedef, leaves)
    one = jax.ShapeDtypeStruct((1, *linear.logits.shape), linear.logits.dtype)
    analysis = pull_back.lower(linear.pull, one).compile().memory_analysis()
    if analysis is None:
        return 0
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def held_rows(views: Views, portion: Portion, sizes: Sequence[int], each: int, memory: int | None) -> int:
    """Rows of a portion that are computed view by view before they are reduced: a chunk, if all views can be kept meanwhile;
    more, if each has to be linearised anew for every such block. `each` is bytes of one, `memory` what all may take."""
    if views.fits(len(portion.views)):
        return sizes[0]
    held = _HELD_ROWS if memory is None else min(_HELD_ROWS, memory // max(each, 1))
    return max(sizes[0], held)


def total_memory(device: Any = None) -> int:
    """Bytes of the device; on CPU, of the machine."""
    stats = (device or jax.local_devices()[0]).memory_stats() or {}
    return int(stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def box_bytes(shape: Sequence[int], channels: int) -> int:
    """Of a row over a box, float32."""
    return math.prod(shape) * channels * 4
