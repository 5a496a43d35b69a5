"""Jacobian rows of the stitched logits, reduced as they stream by.

The blended logit of a voxel is a fixed linear combination of the logits of the windows that hold it, `y[v] = Σ_w s_w(v) y_w[v]`, so
its row is `Σ_w s_w(v) · ∂y_w[v]/∂x`: a few pull-backs, each through one window, and no other window of the volume matters. The rows
of all instances of a scan are scheduled together: each view is linearised once, chunks of rows of any instances stream through it,
and each instance's running reduction stays on the device.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import Aggregator, Explainer, Info, Instance, Progress, SaliencyMap
from xaiseg.inference import Box, StitchedPredictor, WindowPlan, logits_shape, pad
from xaiseg.inference.devices import device_of, row_shards
from xaiseg.saliency.aggregators import mean, total
from xaiseg.saliency.linearise import (
    Chunk,
    Views,
    box_bytes,
    chunk_sizes,
    held_rows,
    pull_rows,
    row_chunks,
    sum_chunks,
)
from xaiseg.saliency.schedule import Geometry, Portion, Region, by_view, passes, portions, regions, spread
from xaiseg.saliency.shards import one_at_a_time
from xaiseg.saliency.targets import Head, Target, head

# Chunks on their way at once: the next is prepared while one is computed.
_IN_FLIGHT = 2


def jacobian_rows(
    aggregator: Aggregator, *, target: Target | str = "logit", chunk: int | None = None, memory: int | None = None
) -> Explainer:
    """The rows `∂t(y[v])/∂x`, `v ∈ Ω`, of each instance's Jacobian, reduced by `aggregator`.

    target: `t`, see `targets.Target`. chunk: rows pulled back together; by default as many as are fast. memory: bytes that the
    temporaries of a chunk, and besides them the linearised views kept at once, may take; it lowers the chunk. Neither changes the
    result beyond float addition order, and nor does the number of devices of the predictor's mesh.

    Maps `(x, y, z, C)` are signed and unscaled, in Δtarget per unit of the image.
    The explainer raises InputError where one row alone needs more than `memory`, ValueError for a class that does not exist.

    >>> import jax, jax.numpy as jnp, numpy as np, xaiseg
    >>> def logits_fn(x):  # of class 1: three times the first channel, minus the neighbour's second
    ...     return jnp.stack([x[..., 0], 3 * x[..., 0] - jnp.roll(x[..., 1], 1, axis=1)], -1)
    >>> predictor = xaiseg.StitchedPredictor(logits_fn, window=(4, 4, 4))
    >>> lesion = xaiseg.Instance(1, np.array([[1, 1, 1], [2, 1, 1]], np.int32))
    >>> explain = xaiseg.jacobian_rows(xaiseg.signed_max())
    >>> (saliency,), (info,) = explain(jax.random.key(0), predictor, jnp.ones((4, 4, 4, 2)), [lesion])
    >>> saliency.values[:, 1, 1].tolist()
    [[0.0, -1.0], [3.0, -1.0], [3.0, 0.0], [0.0, 0.0]]
    >>> info.rows, info.windows
    (2, 1)
    """

    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")

    def explain(
        key: Array,
        predictor: StitchedPredictor,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        if not instances:
            return [], []
        plan = predictor.plan(image.shape)
        predictor = predictor.fitted(plan)
        geometry = Geometry.of(plan, predictor.local_fn)
        work = portions(geometry, instances)
        where = regions(geometry, work, len(instances))
        job = _Job(aggregator, head_of(predictor, target, image), geometry, where, chunk, memory)
        maps = job.run(row_shards(predictor), work, image, progress)
        infos = [Info(rows=r, windows=w) for r, w in passes(work, len(instances), aggregator.linear)]
        return maps, infos

    return explain


def input_gradient(
    *, reduce: str = "sum", target: Target | str = "logit", chunk: int | None = None, memory: int | None = None
) -> Explainer:
    """The gradient of the target, summed (`reduce="sum"`) or averaged (`"mean"`) over the instance, at the image: one pass a view.

    It is `jacobian_rows` with a linear aggregator. Raises ValueError for another reduction.

    >>> import jax, jax.numpy as jnp, numpy as np, xaiseg
    >>> predictor = xaiseg.StitchedPredictor(lambda x: x**2, window=(2, 2, 2), target_class=0)
    >>> lesion = xaiseg.Instance(1, np.array([[0, 0, 0], [0, 0, 1]], np.int32))
    >>> image = jnp.arange(8.0).reshape(2, 2, 2, 1)
    >>> (saliency,), _ = xaiseg.input_gradient()(jax.random.key(0), predictor, image, [lesion])
    >>> saliency.values[0, 0, :, 0].tolist()
    [0.0, 2.0]
    """
    reductions = {"sum": total, "mean": mean}
    if reduce not in reductions:
        raise ValueError(f"reduce is {reduce!r}, expected sum or mean")
    return jacobian_rows(reductions[reduce](), target=target, chunk=chunk, memory=memory)


def head_of(predictor: StitchedPredictor, target: Target | str, image: Array) -> Head:
    """The target of a predictor's logits. Raises ValueError as `targets.head`."""
    window = jax.ShapeDtypeStruct((1, *predictor.plan(image.shape).window, image.shape[-1]), image.dtype)
    logits = logits_shape(predictor.logits_fn, window)
    return head(target, predictor.target_class, predictor.output_activation, logits.shape[-1])


def crop_to_volume(plan: WindowPlan, values: Array, box: Box) -> SaliencyMap:
    """The map over a box of the padded volume, the first part of `values`, cut where the box reaches beyond the volume itself."""
    low = [s - lo for s, (lo, _) in zip(box.start, plan.padding, strict=True)]
    first = [max(a, 0) for a in low]
    last = [min(a + n, size) for a, n, size in zip(low, box.shape, plan.shape, strict=True)]
    inside = np.array([*(f - a for f, a in zip(first, low, strict=True)), 0], np.int32)
    shape = (*(e - f for f, e in zip(first, last, strict=True)), values.shape[-1])
    cropped = values if shape == values.shape else _crop(values, inside, shape)
    return SaliencyMap(cropped, (first[0], first[1], first[2]))


class _Job:
    """The rows of all instances at one image, on one device or several."""

    def __init__(
        self,
        aggregator: Aggregator,
        head: Head,
        geometry: Geometry,
        where: Sequence[Region],
        chunk: int | None,
        memory: int | None,
    ) -> None:
        self.aggregator, self.head, self.geometry, self.where = aggregator, head, geometry, where
        self.chunk, self.memory = chunk, memory

    def run(
        self, shards: Sequence[StitchedPredictor], work: list[Portion], image: Array, progress: Progress | None
    ) -> list[SaliencyMap]:
        """The map of each instance, on the first device."""
        views = [self._views(shard, image) for shard in shards]
        if self.aggregator.linear:
            # a nonlinear target's derivatives need all views of a voxel; the sums then take one view at a time
            known = [portion._replace(values=views[0].values(portion)) for portion in work]
            work = by_view(known)

        told = one_at_a_time(progress) or (lambda rows: None)
        channels = image.shape[-1]
        if len(shards) == 1:
            found = self._states(device_of(shards[0]), views[0], work, channels, told, self._map)
            return [found[number] for number in range(len(self.where))]

        def one(shard: StitchedPredictor, views: Views, share: list[Portion]) -> dict[int, Any]:
            return self._states(device_of(shard), views, share, channels, told, lambda number, state: state)

        shares = spread(work, len(shards), split=not self.aggregator.linear)
        with ThreadPoolExecutor(len(shards)) as pool:
            states = _merged(self.aggregator, list(pool.map(one, shards, views, shares)), device_of(shards[0]))
        return [self._map(number, states[number]) for number in range(len(self.where))]

    def _map(self, number: int, state: Any) -> SaliencyMap:
        return crop_to_volume(self.geometry.plan, _finalize(self.aggregator, state), self.where[number].box)

    def _views(self, shard: StitchedPredictor, image: Array) -> Views:
        device = device_of(shard)
        image = image if device is None else jax.device_put(image, device)
        return Views(shard, self.geometry, pad(image, self.geometry.plan), self.head, self.memory)

    def _states(
        self,
        device: Any,
        views: Views,
        work: list[Portion],
        channels: int,
        progress: Progress,
        finish: Callable[[int, Any], Any],
    ) -> dict[int, Any]:
        """What `finish` makes of the state of each instance after its last row, so that few states are there at once."""
        found: dict[int, Any] = {}
        flying: deque[tuple[Array, int]] = deque()
        # a view is kept as long as rows need it: then memory grows neither with an instance nor with their number
        last = {view: turn for turn, portion in enumerate(work) for view in portion.views}
        last_of = {number: turn for turn, portion in enumerate(work) for number in np.unique(portion.instance).tolist()}
        for turn, portion in enumerate(work):
            corner = np.array(self.geometry.box(portion.views).start, np.int32)
            for chunk, rows in self._rows(views, portion, channels):
                for number in np.unique(chunk.instance[chunk.weight > 0]).tolist():
                    region = self.where[number]
                    if number not in found:
                        found[number] = _init(self.aggregator, (*region.room, channels), device)
                    weight = np.where(chunk.instance == number, chunk.weight, 0).astype(np.float32)
                    inner = corner - np.array(region.box.start, np.int32)
                    found[number], done = _update(self.aggregator, found[number], rows, chunk.number, weight, inner)
                flying.append((done, chunk.rows * len(portion.views)))
                if len(flying) > _IN_FLIGHT:
                    _land(flying, progress)
            for view in portion.views:
                if last[view] == turn:
                    views.forget(view)
            for number in np.unique(portion.instance).tolist():
                if last_of[number] == turn:
                    found[number] = finish(number, found[number])
        while flying:
            _land(flying, progress)
        return found

    def _rows(self, views: Views, portion: Portion, channels: int) -> Iterator[tuple[Chunk, Array]]:
        """Chunks of a portion's rows over the box of its views, `(K, *box, C)`, each summed over the views."""
        box = self.geometry.box(portion.views)
        several = len(portion.views) > 1
        extra = box_bytes(box.shape, channels) if several else 0
        sizes = chunk_sizes(views[portion.views[0]], self.chunk, self.memory, extra)
        values = views.values(portion)
        make = sum_chunks if self.aggregator.linear else row_chunks
        for block in _blocks(make(portion, values, sizes), held_rows(views, portion, sizes, extra, self.memory)):
            sums: list[Array | None] = [None] * len(block)
            for number, view in enumerate(portion.views):
                linear, offset = views[view], self.geometry.corner(view) - np.array(box.start, np.int32)
                for i, chunk in enumerate(block):
                    piece = pull_rows(linear, chunk, number, self.geometry.sides)
                    sums[i] = _add(sums[i], piece, offset, box.shape)
            for i, chunk in enumerate(block):
                rows, sums[i] = sums[i], None
                assert rows is not None
                yield chunk, rows


def _blocks(chunks: Iterator[Chunk], rows: int) -> Iterator[list[Chunk]]:
    block: list[Chunk] = []
    for chunk in chunks:
        if block and sum(len(c.number) for c in block) + len(chunk.number) > rows:
            yield block
            block = []
        block.append(chunk)
    if block:
        yield block


def _land(flying: deque[tuple[Array, int]], progress: Progress) -> None:
    done, rows = flying.popleft()
    jax.block_until_ready(done)
    progress(rows)


def _merged(aggregator: Aggregator, states: list[dict[int, Any]], device: Any) -> dict[int, Any]:
    merged = states[0]
    for more in states[1:]:
        for number, state in more.items():
            state = jax.device_put(state, device)
            merged[number] = _merge(aggregator, merged[number], state) if number in merged else state
    return merged


def _init(aggregator: Aggregator, shape: tuple[int, ...], device: Any) -> Any:
    # every leaf of its own, or one buffer would be given away twice
    state = jax.tree.map(jnp.copy, _blank(aggregator, shape))
    return state if device is None else jax.device_put(state, device)


@partial(jax.jit, static_argnums=(0, 1))
def _blank(aggregator: Aggregator, shape: tuple[int, ...]) -> Any:
    return aggregator.init(shape)


@partial(jax.jit, static_argnums=0)
def _merge(aggregator: Aggregator, a: Any, b: Any) -> Any:
    return aggregator.merge(a, b)


@partial(jax.jit, static_argnums=0)
def _finalize(aggregator: Aggregator, state: Any) -> Array:
    return aggregator.finalize(state)


@partial(jax.jit, static_argnums=2)
def _crop(values: Array, corner: Array, shape: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_slice(values, corner, shape)


def _add(rows: Array | None, piece: Array, offset: np.ndarray, box: tuple[int, ...]) -> Array:
    """Add a view's piece of some rows at its offset in the box; a piece that is the whole box starts the sum."""
    if rows is None:
        return piece if piece.shape[1:4] == box else _place(piece, offset, box)
    return _add_at(rows, piece, offset)


@partial(jax.jit, static_argnums=2)
def _place(piece: Array, offset: Array, box: tuple[int, ...]) -> Array:
    rows = jnp.zeros((piece.shape[0], *box, piece.shape[-1]), piece.dtype)
    return jax.lax.dynamic_update_slice(rows, piece, jnp.pad(offset, (1, 1)))


@partial(jax.jit, donate_argnums=0)
def _add_at(rows: Array, part: Array, offset: Array) -> Array:
    corner = jnp.pad(offset, (1, 1))
    return jax.lax.dynamic_update_slice(rows, jax.lax.dynamic_slice(rows, corner, part.shape) + part, corner)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update(
    aggregator: Aggregator, state: Any, rows: Array, index: Array, weight: Array, inner: Array
) -> tuple[Any, Array]:
    """Update the part of an instance's state that lies in the rows' box; beyond it its rows are zero.

    Leaves of an aggregator's state are scalars, or have the map's shape last, of which the box is cut out. Rows of other instances
    in the chunk have weight 0. The second result tells when this is done.
    """
    own = jnp.where((weight > 0).reshape(-1, 1, 1, 1, 1), rows, jnp.zeros_like(rows))
    box = rows.shape[1:]

    def corner(leaf: Array) -> Array:
        return jnp.pad(inner, (leaf.ndim - len(box), 1))

    def take(leaf: Array) -> Array:
        return jax.lax.dynamic_slice(leaf, corner(leaf), (*leaf.shape[: -len(box)], *box)) if leaf.ndim else leaf

    def put(leaf: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice(leaf, part, corner(leaf)) if leaf.ndim else part

    part = aggregator.update(jax.tree.map(take, state), own, index, weight)
    return jax.tree.map(put, state, part), weight.sum()
