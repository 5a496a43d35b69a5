"""Which passes the rows of a scan's instances take: the voxels of all of them, sorted by the parts of the network they need.

A blended logit is a fixed combination of logits of the windows that hold its voxel. Where the network has local logits, it is a
tile of each window that counts. Such a window, or tile of one, is a *view*: it is linearised once, and all rows that need it go
through.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from xaiseg._types import Instance, LocalFn
from xaiseg.inference import Box, WindowPlan

# Boxes that hold several views have sides in these steps, so that programs are compiled for few of them.
_STEP = 32

View = tuple[int, int, int, int]
"""A window's number in the plan, and where the tile begins in it; zeros where the view is the window."""


class Portion(NamedTuple):
    """Voxels of any instances whose logits come from the same views: `m` views, `n` rows.

    instance: `(n,)` numbers in the list of instances. row: `(n,)` row numbers within the instance.
    place: `(m, n, 3)` in each view. share: `(m, n)` float32, of the blended logit.
    values: `(n, classes)`, the derivatives of the target by the blended logits, where they are known already.
    """

    views: tuple[View, ...]
    instance: np.ndarray
    row: np.ndarray
    place: np.ndarray
    share: np.ndarray
    values: np.ndarray | None = None

    def part(self, held: slice | np.ndarray) -> "Portion":
        values = None if self.values is None else self.values[held]
        return Portion(
            self.views, self.instance[held], self.row[held], self.place[:, held], self.share[:, held], values
        )


class Held(NamedTuple):
    """The voxels of an instance that a view holds: numbers `(n,)`, places in the view `(n, 3)`, shares of the logits `(n,)`."""

    row: np.ndarray
    place: np.ndarray
    share: np.ndarray


class Geometry(NamedTuple):
    """Where views lie in the padded volume. sides: of a view's logits. field: of the input that they depend on, which begins
    `before` them and ends `after` them; both equal the window without local logits."""

    plan: WindowPlan
    sides: tuple[int, ...]
    field: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, plan: WindowPlan, local_fn: LocalFn | None) -> "Geometry":
        if local_fn is None:
            return cls(plan, plan.window, plan.window, (0, 0, 0), (0, 0, 0))
        return cls(plan, local_fn.tile, local_fn.field, local_fn.before, local_fn.after)

    def corner(self, view: View) -> np.ndarray:
        """The first voxel of a view's field, which may lie outside of the padded volume."""
        return self.place(view) - np.array(self.before, np.int32)

    def place(self, view: View) -> np.ndarray:
        """The first voxel of a view's logits in the padded volume, which is that of its field in the volume `with_reach`."""
        return self.plan.starts[view[0]] + np.array(view[1:], np.int32)

    def with_reach(self, padded: Array) -> Array:
        """The padded volume with zeros around it, so that every view's field lies within."""
        return jnp.pad(padded, (*zip(self.before, self.after, strict=True), (0, 0)))

    def box(self, views: Sequence[View]) -> Box:
        """What the rows of a portion with these views cover; somewhat more where there are several."""
        return _roomy(self.extent(views)) if len(views) > 1 else self.extent(views)

    def extent(self, views: Sequence[View]) -> Box:
        """What the fields of these views cover."""
        return _hull([Box(tuple(self.corner(v).tolist()), self.field) for v in views])


class Region(NamedTuple):
    """Of one instance: the box that its rows cover, and the sides of an array that begins there and has room for all of them."""

    box: Box
    room: tuple[int, ...]


def portions(geometry: Geometry, instances: Sequence[Instance]) -> list[Portion]:
    """The rows of all instances, in an order that brings those with common views together, so that few views are needed at once."""
    found: dict[tuple[View, ...], list[Portion]] = {}
    for number, instance in enumerate(instances):
        for views, rows, place, share in _by_views(geometry, instance):
            portion = Portion(views, np.full(len(rows), number), rows, place, share)
            found.setdefault(views, []).append(portion)
    keys = sorted(found)
    return [_joined(found[views]) for _, views in sorted(zip(_linked(keys), keys, strict=True))]


def held_by_view(geometry: Geometry, instance: Instance) -> dict[View, Held]:
    """Each view that an instance needs with the voxels it holds, once, though they may differ in the other views they need."""
    found: dict[View, list[Held]] = {}
    for portion in portions(geometry, [instance]):
        for view, place, share in zip(portion.views, portion.place, portion.share, strict=True):
            found.setdefault(view, []).append(Held(portion.row, place, share))
    return {view: Held(*map(np.concatenate, zip(*parts, strict=True))) for view, parts in found.items()}


def _linked(keys: Sequence[tuple[View, ...]]) -> list[int]:
    """A number for each set of views, the same for those that common views link: beyond them none of its views is needed."""
    first: dict[View, int] = {}
    rows, columns = [], []
    for number, views in enumerate(keys):
        for view in views:
            rows.append(number)
            columns.append(first.setdefault(view, number))
    links = coo_array((np.ones(len(rows)), (rows, columns)), (len(keys), len(keys)))
    return connected_components(links, directed=False)[1].tolist()


def regions(geometry: Geometry, work: Sequence[Portion], count: int) -> list[Region]:
    """Where the maps of `count` instances lie."""
    views: list[set[View]] = [set() for _ in range(count)]
    boxes: list[list[Box]] = [[] for _ in range(count)]
    for portion in work:
        for number in np.unique(portion.instance).tolist():
            views[number].update(portion.views)
            boxes[number].append(geometry.box(portion.views))
    found = []
    for seen, held in zip(views, boxes, strict=True):
        box, needed = geometry.extent(sorted(seen)), _hull(held)
        found.append(Region(box, needed.shape if needed.shape == geometry.field else _roomy(needed).shape))
    return found


def passes(work: Sequence[Portion], count: int, linear: bool) -> list[tuple[int, int]]:
    """For each of `count` instances: passes back through one view, and windows that hold voxels of it.

    linear: the rows of an instance that go through the same view are added up first.
    """
    rows = [0] * count
    views: list[set[View]] = [set() for _ in range(count)]
    for portion in work:
        for number, times in zip(*np.unique(portion.instance, return_counts=True), strict=True):
            rows[number] += len(portion.views) * int(times)
            views[number].update(portion.views)
    windows = [len({view[0] for view in held}) for held in views]
    return [(len(v) if linear else r, w) for r, v, w in zip(rows, views, windows, strict=True)]


def by_view(work: Sequence[Portion]) -> list[Portion]:
    """The same rows, sorted by single views: for sums of rows, which need not be complete before they are reduced."""
    found: dict[View, list[Portion]] = {}
    for portion in work:
        for i, view in enumerate(portion.views):
            one = portion._replace(views=(view,), place=portion.place[i : i + 1], share=portion.share[i : i + 1])
            found.setdefault(view, []).append(one)
    return [_joined(parts) for _, parts in sorted(found.items())]


def _joined(parts: Sequence[Portion]) -> Portion:
    """Portions with the same views as one."""
    known = [p.values for p in parts if p.values is not None]
    return Portion(
        parts[0].views,
        np.concatenate([p.instance for p in parts]),
        np.concatenate([p.row for p in parts]),
        np.concatenate([p.place for p in parts], axis=1),
        np.concatenate([p.share for p in parts], axis=1),
        np.concatenate(known) if known else None,
    )


def spread(work: Sequence[Portion], devices: int, split: bool = True) -> list[list[Portion]]:
    """The work of each device: about as many passes, a view rarely on two. Large portions are split, unless they are sums."""
    if devices == 1:
        return [list(work)]
    most = max(8, -(-sum(len(p.row) for p in work) // (4 * devices)))
    pieces = list(work)
    if split:
        pieces = [p.part(slice(i, i + most)) for p in work for i in range(0, len(p.row), most)]
    shares: list[list[Portion]] = [[] for _ in range(devices)]
    load = [0] * devices
    # a linearisation costs about as much as a few rows
    for piece in sorted(pieces, key=lambda p: -len(p.views) * (len(p.row) + 4)):
        lightest = load.index(min(load))
        shares[lightest].append(piece)
        load[lightest] += len(piece.views) * (len(piece.row) + 4)
    return [sorted(share, key=lambda p: p.views) for share in shares]


def _by_views(
    geometry: Geometry, instance: Instance
) -> Iterator[tuple[tuple[View, ...], np.ndarray, np.ndarray, np.ndarray]]:
    """The voxels of an instance by the views they need: views, row numbers, places `(m, n, 3)`, shares `(m, n)`."""
    plan = geometry.plan
    if not len(instance.voxels):
        raise ValueError(f"instance {instance.label} has no voxels")
    local, share = plan.coverage(instance.voxels)
    tile, last = np.array(geometry.sides, np.int32), np.array(plan.window, np.int32) - geometry.sides
    start = np.where(share[..., None] > 0, np.minimum(local // tile * tile, last), -1)
    _, group_of = np.unique(start.transpose(1, 0, 2).reshape(len(instance.voxels), -1), axis=0, return_inverse=True)
    group_of = group_of.reshape(-1)
    for group in range(group_of.max() + 1):
        rows = np.flatnonzero(group_of == group).astype(np.int32)
        windows = np.flatnonzero(share[:, rows[0]] > 0)
        starts = start[windows, rows[0]]
        views = tuple((int(w), *map(int, s)) for w, s in zip(windows, starts, strict=True))
        place = local[windows][:, rows] - starts[:, None]
        yield views, rows, place.astype(np.int32), share[windows][:, rows]  # type: ignore[misc]


def _hull(boxes: Sequence[Box]) -> Box:
    low = np.min([b.start for b in boxes], axis=0)
    high = np.max([np.array(b.start) + b.shape for b in boxes], axis=0)
    return Box(tuple(low.tolist()), tuple((high - low).tolist()))


def _roomy(box: Box) -> Box:
    return Box(box.start, tuple(-(-n // _STEP) * _STEP for n in box.shape))
