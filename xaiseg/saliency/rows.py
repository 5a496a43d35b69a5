"""Jacobian rows of the stitched logits, reduced as they stream by.

The blended logit of a voxel is a fixed linear combination of the logits of the windows that hold it, `y[v] = Σ_w s_w(v) y_w[v]`, so
its row is `Σ_w s_w(v) · ∂y_w[v]/∂x`: a few pull-backs, each through one window, and no other window of the volume matters.
Each window is linearised once; its pull-back is then mapped over chunks of one-hot cotangents. A one-hot cotangent reaches only a
small part of the decoder: where the network can compute the logits of a tile alone, the tile around the voxels is linearised.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import Aggregator, Explainer, Info, Instance, LogitsFn, Progress, SaliencyMap
from xaiseg.errors import InputError
from xaiseg.inference import Box, StitchedPredictor, WindowPlan, class_logit, cut, pad

# Windows kept linearised at once. A voxel lies in up to three per axis, since the last start is clamped (182 voxels: 0, 72, 86).
_LINEARISED = 27
# Fewer where they outgrow a quarter of the memory: a window of a Swin UNETR keeps gigabytes. Those of one voxel are needed at once.
_LINEARISED_SHARE = 4
# On CPU a chunk whose temporaries outgrow this is slower per row than a smaller one: fresh pages cost more than batching saves.
_CPU_WORKING_SET = 64 * 2**20
_MAX_CHUNK = 128


def jacobian_rows(aggregator: Aggregator, *, chunk: int | None = None, memory: int | None = None) -> Explainer:
    """An explainer: the rows of each instance, reduced by `aggregator`.

    chunk: rows pulled back together; by default as many as are fast. memory: bytes the temporaries of a chunk may take; it lowers
    the chunk. Neither changes the result beyond float addition order. The explainer raises InputError where one row alone needs
    more than `memory`.
    """

    def explain(
        key: Array,
        predictor: StitchedPredictor,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        plan = predictor.plan(image.shape)
        linearised = _Linearised(predictor, plan, pad(image, plan), memory)
        maps, infos = [], []
        for instance in instances:
            groups = list(window_groups(plan, instance))
            region = plan.bounding_box(np.concatenate([g.windows for g in groups]))
            state = aggregator.init((*region.shape, image.shape[-1]))
            for group in groups:
                box = plan.bounding_box(group.windows)
                inner = np.array(box.start, np.int32) - np.array(region.start, np.int32)
                for rows, index, weight in _stream(linearised, group, box, aggregator, chunk, memory):
                    state = _update(aggregator, state, rows, index, weight, inner)
                    if progress is not None:
                        jax.block_until_ready(state)
                        progress(int(np.count_nonzero(weight)) * len(group.windows))
            maps.append(crop_to_volume(plan, np.asarray(aggregator.finalize(state)), region.start))
            infos.append(
                Info(rows=count_rows(groups, aggregator), windows=len({w for g in groups for w in g.windows.tolist()}))
            )
        return maps, infos

    return explain


class WindowGroup(NamedTuple):
    """Voxels of an instance that lie in the same windows.

    windows: `(m,)` numbers of the plan. rows: `(n,)` row numbers. local: `(m, n, 3)` places in each window.
    share: `(m, n)` blend shares.
    """

    windows: np.ndarray
    rows: np.ndarray
    local: np.ndarray
    share: np.ndarray


def window_groups(plan: WindowPlan, instance: Instance) -> Iterator[WindowGroup]:
    """The voxels of an instance, grouped by the set of windows that hold them."""
    local, share = plan.coverage(instance.voxels)
    members, group_of = np.unique(share > 0, axis=1, return_inverse=True)
    for number, held in enumerate(members.T):
        windows, index = np.flatnonzero(held), np.flatnonzero(group_of.reshape(-1) == number)
        yield WindowGroup(windows, index.astype(np.int32), local[windows][:, index], share[windows][:, index])


def count_rows(groups: Sequence[WindowGroup], aggregator: Aggregator) -> int:
    """Backward passes through one window that the rows of an instance take."""
    return sum(len(g.windows) * (1 if aggregator.linear else len(g.rows)) for g in groups)


def crop_to_volume(plan: WindowPlan, values: np.ndarray, start: Sequence[int]) -> SaliencyMap:
    """A map over part of the padded volume, cut where that reaches beyond the volume itself."""
    low = [s - lo for s, (lo, _) in zip(start, plan.padding, strict=True)]
    first = [max(a, 0) for a in low]
    last = [min(a + n, size) for a, n, size in zip(low, values.shape, plan.shape, strict=False)]
    inside = tuple(slice(f - a, e - a) for f, e, a in zip(first, last, low, strict=True))
    return SaliencyMap(values[inside], (first[0], first[1], first[2]))


def _stream(
    linearised: "_Linearised",
    group: WindowGroup,
    box: Box,
    aggregator: Aggregator,
    chunk: int | None,
    memory: int | None,
) -> Iterator[tuple[Array, np.ndarray, np.ndarray]]:
    """Chunks of rows over the group's box, `(K, *box, C)`, with their row numbers and weights."""
    plan = linearised.plan
    offsets = plan.starts[group.windows] - np.array(box.start, np.int32)
    channels = linearised.channels
    if aggregator.linear:
        # the sum of the rows is one pull-back of the summed cotangents
        if memory is not None:
            chunk_size(linearised.window(int(group.windows[0])), plan.window, 1, memory)
        rows = None
        for window, local, share, offset in zip(group.windows, group.local, group.share, offsets, strict=True):
            cotangent = np.zeros(plan.window, np.float32)
            cotangent[tuple(local.T)] = share
            rows = _add(rows, _pull_one(linearised.window(int(window)), cotangent)[None], offset, box.shape)
        assert rows is not None
        yield rows, group.rows[:1], np.array([len(group.rows)], np.float32)
        return
    for part, starts, sides in linearised.tiles(group):
        pulls = [linearised.tile(int(w), start) for w, start in zip(part.windows, starts, strict=True)]
        places = part.local - starts[:, None]
        box_bytes = 4 * channels * math.prod(box.shape) if len(pulls) > 1 else 0
        size = chunk_size(pulls[0], sides, chunk, memory, box_bytes)
        size = min(size, 1 << (len(part.rows) - 1).bit_length())
        for first in range(0, len(part.rows), size):
            held = slice(first, first + size)
            weight = np.ones(len(part.rows[held]), np.float32)
            rows = None
            for pull, place, share, offset in zip(pulls, places, part.share, offsets, strict=True):
                piece = _pull_rows(pull, _fill(place[held], size), _fill(share[held], size), sides)
                rows = _add(rows, piece, offset, box.shape)
            assert rows is not None
            yield rows, _fill(part.rows[held], size), _fill(weight, size)


def _fill(array: np.ndarray, size: int) -> np.ndarray:
    """Zeros behind the last rows, so that every chunk has the one compiled shape; a row with share 0 is a zero row."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))


def chunk_size(pull: Any, window: tuple[int, ...], chunk: int | None, memory: int | None, extra: int = 0) -> int:
    """Rows to pull back together: `chunk` if given, else what is fast here and fits into `memory` bytes.

    `extra` bytes a row are needed besides the pull-back.

    Raises InputError where `memory` holds fewer than the rows asked for.
    """
    needed = row_bytes(pull, window) + extra
    if memory is not None and memory < needed * (chunk or 1):
        rows = f"a chunk of {chunk} rows" if chunk else "one row"
        raise InputError(
            f"--memory {memory / 2**20:.3g} MiB is too little: {rows} of this network takes "
            f"{needed * (chunk or 1) / 2**20:.3g} MiB; "
            f"give more memory{' or a smaller --chunk' if chunk else ''}"
        )
    if chunk is not None:
        return chunk
    budget = _CPU_WORKING_SET if jax.default_backend() == "cpu" else _device_budget()
    if memory is not None:
        budget = min(budget, memory)
    return max(1, min(_MAX_CHUNK, budget // max(needed, 1)))


def row_bytes(pull: Any, window: tuple[int, ...]) -> int:
    """Bytes of temporaries and output that one row takes, as XLA plans them."""
    leaves, treedef = jax.tree.flatten(pull)
    return _row_bytes(treedef, tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves), window)


@lru_cache(maxsize=32)
def _row_bytes(treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], window: tuple[int, ...]) -> int:
    place = jax.ShapeDtypeStruct((1, len(window)), jnp.int32)
    share = jax.ShapeDtypeStruct((1,), jnp.float32)
    compiled = _pull_rows.lower(jax.tree.unflatten(treedef, leaves), place, share, window).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def _device_budget() -> int:
    return max(_total_memory() // 2, 2**30)


def _total_memory() -> int:
    """Bytes of the device; on CPU, of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


class _Linearised:
    """Pull-backs of windows of one volume, the last few kept: of the whole window, or of a tile of its logits."""

    def __init__(
        self, predictor: StitchedPredictor, plan: WindowPlan, padded: Array, memory: int | None = None
    ) -> None:
        self.plan = plan
        self.channels = padded.shape[-1]
        self._predictor, self._padded = predictor, padded
        self._kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._budget = memory if memory is not None else _total_memory() // _LINEARISED_SHARE

    def window(self, window: int) -> Any:
        p, start = self._predictor, self.plan.starts[window]
        return self._keep(
            (window,), lambda: linearise_window(p.logits_fn, self._padded, start, p.window, p.target_class)
        )

    def tile(self, window: int, start: np.ndarray) -> Any:
        """The pull-back of the tile that begins at `start` within a window; of the window, if the network has no tiles."""
        p, corner = self._predictor, self.plan.starts[window]
        if p.local_fn is None:
            return self.window(window)
        function = p.local_fn.function
        return self._keep(
            (window, *start.tolist()),
            lambda: _linearise_tile(function, self._padded, corner, start, p.window, p.target_class),
        )

    def tiles(self, group: WindowGroup) -> Iterator[tuple[WindowGroup, np.ndarray, tuple[int, ...]]]:
        """A group in parts, each of which lies in one tile of every window: the part, `(m, 3)` tile starts, and tile sides."""
        local_fn = self._predictor.local_fn
        if local_fn is None:
            yield group, np.zeros((len(group.windows), 3), np.int32), self.plan.window
            return
        align, tile = np.array(local_fn.alignment, np.int32), np.array(local_fn.tile, np.int32)

        def starts(part: WindowGroup) -> np.ndarray:
            return np.minimum(part.local.min(1) // align * align, np.array(self.plan.window, np.int32) - tile)

        parts = [group]
        if (group.local.max(1) >= starts(group) + tile).any():
            # a block as large as the alignment fits into a tile of twice that, however the windows cut it
            blocks, block_of = np.unique(group.local[0] // align, axis=0, return_inverse=True)
            held = [np.flatnonzero(block_of.reshape(-1) == number) for number in range(len(blocks))]
            parts = [WindowGroup(group.windows, group.rows[h], group.local[:, h], group.share[:, h]) for h in held]
        for part in parts:
            yield part, starts(part), local_fn.tile

    def _keep(self, key: tuple[int, ...], make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            while self._kept and (len(self._kept) >= _LINEARISED or self._full()):
                self._kept.popitem(last=False)
            self._kept[key] = make()
        self._kept.move_to_end(key)
        return self._kept[key]

    def _full(self) -> bool:
        """Whether one more would outgrow the budget, all being as large as the last."""
        newest = next(reversed(self._kept.values()))
        return (len(self._kept) + 1) * sum(leaf.nbytes for leaf in jax.tree.leaves(newest)) > self._budget


@partial(jax.jit, static_argnums=(3, 4))
def linearise_window(
    logits_fn: LogitsFn, padded: Array, start: Array, window: tuple[int, ...], target_class: int
) -> Any:
    x = cut(padded, start, window)
    _, pull = jax.vjp(lambda x: class_logit(logits_fn(x[None]), window, target_class), x)
    return pull


@partial(jax.jit, static_argnums=(4, 5))
def _linearise_tile(
    function: Any, padded: Array, start: Array, tile_start: Array, window: tuple[int, ...], target_class: int
) -> Any:
    x = cut(padded, start, window)
    _, pull = jax.vjp(lambda x: function(x[None], tile_start)[0, ..., target_class], x)
    return pull


@partial(jax.jit, static_argnums=3)
def _pull_rows(pull: Any, local: Array, share: Array, window: tuple[int, ...]) -> Array:
    def row(place: Array, value: Array) -> Array:
        cotangent = jnp.zeros(window, jnp.float32).at[place[0], place[1], place[2]].set(value)
        return pull(cotangent)[0]

    return jax.vmap(row)(local, share)


@jax.jit
def _pull_one(pull: Any, cotangent: Array) -> Array:
    return pull(cotangent)[0]


def _add(rows: Array | None, piece: Array, offset: np.ndarray, box: tuple[int, ...]) -> Array:
    """Add a window's piece of some rows at its offset in the box; a piece that is the whole box starts the sum."""
    if rows is None:
        if piece.shape[1:4] == box:
            return piece
        rows = jnp.zeros((piece.shape[0], *box, piece.shape[-1]), jnp.float32)
    return _add_at(rows, piece, offset)


@partial(jax.jit, donate_argnums=0)
def _add_at(rows: Array, part: Array, offset: Array) -> Array:
    corner = jnp.pad(offset, (1, 1))
    return jax.lax.dynamic_update_slice(rows, jax.lax.dynamic_slice(rows, corner, part.shape) + part, corner)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update(aggregator: Aggregator, state: Any, rows: Array, index: Array, weight: Array, inner: Array) -> Any:
    """Update the part of the state that lies in the rows' box; beyond it the rows are zero.

    Leaves of an aggregator's state are scalars or have the map's shape, in which case the box is cut out of them.
    """
    corner = jnp.pad(inner, (0, 1))
    part = jax.tree.map(lambda a: jax.lax.dynamic_slice(a, corner, rows.shape[1:]) if a.ndim else a, state)
    part = aggregator.update(part, rows, index, weight)
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, corner) if a.ndim else b, state, part)
