"""The shapes of the parts. Everything in `saliency` is written against these Protocols, never against a network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax import Array

LogitsFn = Callable[[Array], Array]
"""Pure function from a batch of windows `(N, *window, C)` to logits `(N, *window, classes)`.

A `jax.tree_util.Partial` whose leaves are the parameters is best: they are then arguments of the compiled program, not constants.
"""

TappedFn = Callable[[Array, Mapping[str, Array]], tuple[Array, dict[str, Array]]]
"""Pure function `(x, offsets) -> (logits, taps)`: the network with its named activations and an additive offset at each."""


class LocalFn(NamedTuple):
    """Logits of a tile of the window from that part of the window which they depend on, for networks that look no further.

    function: pure `(field, start, sides) -> logits` from the tile's field `(N, *field, C)` to `(N, *tile, classes)`, equal to
      that part of the logits of a window with `sides` `(3,)` in which the tile begins at `start` `(3,)`. Both may be traced.
    tile: its sides in voxels. alignment: `start` and `sides` must be multiples of it.
    before, after: by how many voxels the field reaches beyond the tile. What of it lies beyond the window is ignored.
    """

    function: Callable[[Array, Array, Array], Array]
    tile: tuple[int, ...]
    alignment: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def field(self) -> tuple[int, ...]:
        """Sides of the field in voxels."""
        return tuple(b + n + a for b, n, a in zip(self.before, self.tile, self.after, strict=True))


class Instance(NamedTuple):
    """One lesion: its label and its voxels `(n, 3)` int32, in C order of the volume; row `i` of its Jacobian is voxel `i`."""

    label: int
    voxels: np.ndarray


class SaliencyMap(NamedTuple):
    """A map cropped to what it was computed in. Everywhere outside it is exactly zero.

    values: `(x, y, z, C)` float32, or one channel per tap for a class-activation map; on the device where it was computed, until
      `np.asarray` brings it to the host.
    start: the crop's first voxel in the volume.
    standard_error: of `values` over the noise samples, same shape; None where there is one sample or none.
    """

    values: Array | np.ndarray
    start: tuple[int, int, int]
    standard_error: Array | np.ndarray | None = None


class Course(NamedTuple):
    """How the peak of a map settled: after each sample, per channel, the largest value of the statistic and its standard error.

    The standard error is that at the voxel of the peak. NaN stands where there is none yet, or none is known (merged samples).
    """

    peak: tuple[tuple[float, ...], ...]
    standard_error: tuple[tuple[float, ...], ...]


class Info(NamedTuple):
    """What an explanation took.

    rows: passes back through one window, per sample; forward passes for methods without gradients.
    windows: windows that hold voxels of the instance.
    samples: noise samples averaged.
    extra: figures of the method, by name.
    course: of the peak over the samples, where there are several.
    """

    rows: int
    windows: int
    samples: int = 1
    extra: Mapping[str, float] = {}
    course: Course | None = None


Progress = Callable[[int], Any]
"""Called with the number of rows just finished."""


class Explainer(Protocol):
    """`(key, predictor, image, instances) -> (maps, infos)`: pure; one map and one info per instance, in order.

    image: `(X, Y, Z, C)`, normalised as the network expects. key: already folded with the case, so that all instances of a
    scan see the same noise. `progress` is told of finished rows.
    """

    def __call__(
        self,
        key: Array,
        predictor: Any,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]: ...


class Aggregator(NamedTuple):
    """A reduction over Jacobian rows as they stream by, in the manner of optax: pure functions, whatever the rows' order.

    init: `(shape) -> state`. Leaves of the state are scalars, or have `shape` behind leading axes of their own.
    update: `(state, rows, index, weight) -> state`, for the part of the map in which these rows may differ from zero: rows
      `(K, *shape)`, `index` `(K,)` their numbers within the instance, and `weight` `(K,)` how many rows each entry stands for: 1,
      or another number for a sum of rows (linear aggregators only), or 0 for an entry that is none: it is zero and must not count.
    merge: `(state, state) -> state` of two disjoint sets of rows.
    finalize: `(state) -> map` of `shape`.
    linear: the result depends on the rows through their sum only, so rows may be added up before they are pulled back.
    """

    init: Callable[[tuple[int, ...]], Any]
    update: Callable[[Any, Array, Array, Array], Any]
    merge: Callable[[Any, Any], Any]
    finalize: Callable[[Any], Array]
    linear: bool = False
