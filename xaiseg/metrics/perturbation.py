"""Deletion and insertion: does the score of an instance follow what a map calls important?"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
from jax import Array

from xaiseg._types import Instance, SaliencyMap
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor
from xaiseg.metrics.instance_score import generator, in_volume, instance_scores
from xaiseg.metrics.replacement import Replacement, by_baseline
from xaiseg.saliency.baselines import zero

RankBy = Literal["signed", "absolute"]

# A lesion is a small part of what its map covers: steps are dense where they matter.
FRACTIONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class PerturbationCurve(NamedTuple):
    """The score of an instance while more and more of the image is replaced, or brought back.

    clean: `S_i(x)`. fractions: `(k,)` of the region's elements. scores: `(k,)`, `S_i(x^(k))`. control: `(orders, k)`, scores of
      random orders.
    area: of `S_i(x^(k)) / S_i(x)` over the fraction, by trapezoids; NaN where `S_i(x)` is not positive and a ratio means nothing.
    drop: of `S_i(x) - S_i(x^(k))`, in logits: defined for every lesion.
    control_areas, control_drops: `(orders,)`, of random orders.
    """

    clean: float
    fractions: np.ndarray
    scores: np.ndarray
    control: np.ndarray
    area: float
    control_areas: np.ndarray
    drop: float
    control_drops: np.ndarray


def deletion(
    key: Array,
    predictor: StitchedPredictor,
    image: Array,
    instance: Instance,
    maps: Sequence[SaliencyMap],
    *,
    replacement: Replacement | None = None,
    region: np.ndarray | None = None,
    fractions: Sequence[float] = FRACTIONS,
    rank_by: RankBy = "signed",
    orders: int = 5,
    chunk: int | None = None,
) -> list[PerturbationCurve]:
    """The score while elements are replaced in the order of each map, the highest first.

    Samek et al. 2017; Petsiuk et al. (RISE) 2018. The smaller the area, below that of random orders, the better. Elements are
    channels of voxels; a map of one channel ranks whole voxels. Equal values are taken in random order.

    maps: of one instance, by different explainers: they share the region and the random orders, so that areas compare.
    replacement: what is put there, `by_baseline(zero())` by default. region: mask `(X, Y, Z)` of the voxels that are replaced at
    all, by default those where any of the maps is not zero. fractions: of the region's elements, rising, from 0 to 1.
    rank_by: the map itself, `signed`, or its `absolute` value. orders: random orders. chunk: see `instance_scores`.

    Raises InputError for an empty region or one of another shape, or a map with values that are not finite; ValueError for other
    arguments out of range.
    """
    return _curves(key, predictor, image, instance, maps, False, replacement, region, fractions, rank_by, orders, chunk)


def insertion(
    key: Array,
    predictor: StitchedPredictor,
    image: Array,
    instance: Instance,
    maps: Sequence[SaliencyMap],
    *,
    replacement: Replacement | None = None,
    region: np.ndarray | None = None,
    fractions: Sequence[float] = FRACTIONS,
    rank_by: RankBy = "signed",
    orders: int = 5,
    chunk: int | None = None,
) -> list[PerturbationCurve]:
    """As `deletion`, but all of the region is replaced at first, and brought back in the order of each map.

    The larger the area, above that of random orders, the better.
    """
    return _curves(key, predictor, image, instance, maps, True, replacement, region, fractions, rank_by, orders, chunk)


def ranks(rng: np.random.Generator, values: np.ndarray | None, region: np.ndarray) -> np.ndarray:
    """The place of each element in the order of descending `values` `(X, Y, Z, C)`, ties by lot; a random order for None.

    Elements outside of the region `(X, Y, Z, C)` have the number of those in it.
    """
    count = int(region.sum())
    lot = rng.permutation(count)
    order = lot if values is None else np.lexsort((lot, -values[region]))
    place = np.empty(count, np.int32)
    place[order] = np.arange(count, dtype=np.int32)
    found = np.full(region.shape, count, np.int32)
    found[region] = place
    return found


def _curves(
    key: Array,
    predictor: StitchedPredictor,
    image: Array,
    instance: Instance,
    maps: Sequence[SaliencyMap],
    inserting: bool,
    replacement: Replacement | None,
    region: np.ndarray | None,
    fractions: Sequence[float],
    rank_by: RankBy,
    orders: int,
    chunk: int | None,
) -> list[PerturbationCurve]:
    steps = np.asarray(fractions, np.float64)
    if steps.ndim != 1 or len(steps) < 2 or (np.diff(steps) <= 0).any() or (steps[0], steps[-1]) != (0, 1):
        raise ValueError(f"fractions are {steps.tolist()}, expected rising numbers from 0 to 1")
    if rank_by not in get_args(RankBy):
        raise ValueError(f"rank_by is {rank_by!r}, expected {' or '.join(get_args(RankBy))}")
    if orders < 1:
        raise ValueError(f"orders is {orders}, expected at least 1: areas mean little without a control")
    order_key, fill_key = jax.random.split(key)
    volumes = [in_volume(m, image.shape) for m in maps]
    if not all(np.isfinite(v).all() for v in volumes):
        raise InputError(f"a map of instance {instance.label} has values that are not finite, so it orders nothing")
    elements = _elements(volumes, region, image.shape, instance)
    keyed = [np.abs(v) if rank_by == "absolute" else v for v in volumes]
    every = [*keyed, *[None] * orders]
    replace = (replacement or by_baseline(zero()))(fill_key, image)
    counts = np.round(steps[1:-1] * elements.sum()).astype(int)

    def images() -> Iterator[Array]:
        # the ends are those of every order
        yield image
        yield replace(elements)
        for number, values in enumerate(every):
            # one lot for the ties of all maps; the random orders differ
            rank = ranks(generator(order_key, max(number - len(maps) + 1, 0)), values, elements)
            for count in counts:
                yield replace((rank >= count) & elements if inserting else rank < count)

    clean, without, *between = instance_scores(predictor, images(), instance, chunk=chunk).tolist()
    curves = np.empty((len(every), len(steps)))
    curves[:, 0], curves[:, -1] = (without, clean) if inserting else (clean, without)
    curves[:, 1:-1] = np.reshape(between, (len(every), len(counts)))
    drops = np.asarray(np.trapezoid(clean - curves, steps, axis=1))
    areas = 1 - drops / clean if clean > 0 else np.full(len(every), np.nan)
    own, control = slice(0, len(maps)), slice(len(maps), None)
    return [
        PerturbationCurve(
            clean, steps, curve, curves[control], float(area), areas[control], float(drop), drops[control]
        )
        for curve, area, drop in zip(curves[own], areas[own], drops[own], strict=True)
    ]


def _elements(
    volumes: Sequence[np.ndarray], region: np.ndarray | None, shape: Sequence[int], instance: Instance
) -> np.ndarray:
    if region is not None and region.shape != tuple(shape[:3]):
        raise InputError(f"the region has shape {region.shape}, expected that of the volume, {tuple(shape[:3])}")
    voxels = np.any([(v != 0).any(-1) for v in volumes], axis=0) if region is None else np.asarray(region) != 0
    if not np.any(voxels):
        raise InputError(
            f"instance {instance.label}: there is no voxel to replace; its maps are zero, or the region is empty"
        )
    return np.broadcast_to(voxels[..., None], tuple(shape)).copy()
