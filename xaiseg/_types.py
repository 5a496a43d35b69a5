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
    """Logits of a tile of the window, for networks that compute them without evaluating the rest of their decoder.

    function: pure `(x, start) -> logits` from windows `(N, *window, C)` to `(N, *tile, classes)`, equal to that part of the logits.
    tile: its sides in voxels. alignment: `start` must be a multiple of it.
    """

    function: Callable[[Array, Array], Array]
    tile: tuple[int, ...]
    alignment: tuple[int, ...]


class Instance(NamedTuple):
    """One lesion: its label and its voxels `(n, 3)` int32, in C order of the volume; row `i` of its Jacobian is voxel `i`."""

    label: int
    voxels: np.ndarray


class SaliencyMap(NamedTuple):
    """A map cropped to the windows it was computed in. Everywhere outside it is exactly zero.

    values: `(x, y, z, C)` float32, or one channel for a class-activation map.
    start: the crop's first voxel in the volume.
    standard_error: of `values` over the noise samples, same shape; None where there is one sample or none.
    """

    values: np.ndarray
    start: tuple[int, int, int]
    standard_error: np.ndarray | None = None


class Info(NamedTuple):
    """What an explanation took.

    rows: Jacobian rows per sample (backward passes through one window).
    windows: windows that hold voxels of the instance.
    samples: noise samples averaged.
    extra: figures of the method, by name.
    """

    rows: int
    windows: int
    samples: int = 1
    extra: Mapping[str, float] = {}


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
    """A reduction over Jacobian rows as they stream by, in the manner of optax: three pure functions.

    init: `(shape) -> state`.
    update: `(state, rows, index, weight) -> state` with rows `(K, *shape)`, `index` `(K,)` the row numbers within the instance and
      `weight` `(K,)` how many rows each entry stands for: 1, or 0 for padding, or more for a sum of rows (linear aggregators only).
    finalize: `(state) -> map` of `shape`.
    linear: the result depends on the rows through their sum only, so rows may be added up before they are pulled back.
    """

    init: Callable[[tuple[int, ...]], Any]
    update: Callable[[Any, Array, Array, Array], Any]
    finalize: Callable[[Any], Array]
    linear: bool = False
