"""Explanations under noise: the mean, mean square or variance of any explainer over noisy copies of the image."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from xaiseg._types import Course, Explainer, Info, Instance, Progress, SaliencyMap
from xaiseg.inference.devices import device_of
from xaiseg.saliency.convergence import relative_error
from xaiseg.saliency.shards import in_order, one_at_a_time

STATISTICS = ("mean", "squared", "variance")


def noisy(
    base: Explainer,
    *,
    samples: int,
    noise: float,
    statistic: str = "mean",
    reference_channel: int = 0,
    tolerance: float | None = None,
    min_samples: int = 8,
    first: int = 0,
) -> Explainer:
    """A statistic of the maps `m_n` that `base` gives of `x + σ·ε_n`, `ε_n ~ N(0, 1)` for each voxel and channel.

    `σ = noise · (max - min)` of the image's `reference_channel` (the paper: FLAIR), one σ for all channels. Sample `n`, from
    `first` to `first + samples - 1`, uses `fold_in(key, n)`: instances explained together or apart see the same noise, and a
    later call can go on where one ended (`merge_samples`). Without noise all samples are one: it is computed once and has no
    standard error.

    statistic: over the `N` samples at each voxel and channel; maps carry its standard error, None for one sample:

    - `mean`, SmoothGrad (Smilkov et al. 2017): `m̄ = Σ m_n / N`, signed. `s / √N`, with `s² = Σ (m_n - m̄)² / (N - 1)`.
    - `squared`, SmoothGrad² (Hooker et al. 2019): `Σ m_n² / N`. As above, of the squares.
    - `variance`, VarGrad (Adebayo et al. 2018): `s²`. `√((m₄ - s⁴·(N - 3)/(N - 1)) / N)`, with the fourth central moment
      `m₄ = N/(N - 1)² · Σ (m_n - m̄)⁴`, unbiased for normal values (the plain mean of few fourth powers is far too small).

    Moments are updated on the device as samples arrive (Welford 1962, Pébay 2008); no sample is kept.

    tolerance: after each sample from `min_samples` on, instances leave whose `relative_error` is at most this: where at each
      channel's peak (its largest value, or its smallest where none is positive) the standard error is at most `tolerance` times
      the largest |peak| of the channels. The others go on, up to `samples`. How many an instance takes depends on itself alone.
      `Info.extra["converged"]` is 1 if the tolerance was met, else 0.

    `Info.samples` is the number that an instance took, and `Info.course`, where it is two or more, its peaks and their errors
    after each. The sample shards of the predictor work in threads, each on devices of its own; samples are folded in their
    order, so that a result depends neither on timing nor on how many shards there are. What shards compute of an instance
    beyond its last sample is discarded, though `progress` is told of it.

    Raises ValueError for arguments out of range (a variance takes noise and two samples, a tolerance two), and, when called,
    where the base changes a map's place or shape from sample to sample.

    >>> import jax, numpy as np
    >>> from xaiseg._types import Info, Instance, SaliencyMap
    >>> def square(key, predictor, image, instances, *, progress=None):
    ...     return [SaliencyMap(image**2, (0, 0, 0)) for _ in instances], [Info(rows=1, windows=1) for _ in instances]
    >>> image = jax.numpy.zeros((2, 2, 2, 1)).at[0].set(1.0)
    >>> explain = noisy(square, samples=100, noise=0.5, tolerance=0.1)
    >>> (found,), (info,) = explain(jax.random.key(0), None, image, [Instance(1, np.zeros((1, 3), np.int32))])
    >>> found.values.shape, found.standard_error.shape, info.samples < 100, info.extra
    ((2, 2, 2, 1), (2, 2, 2, 1), True, {'converged': 1.0})
    """
    if samples < 1 or not noise >= 0:
        raise ValueError(f"samples must be at least 1 and noise at least 0, not {samples} and {noise}")
    if first < 0:
        raise ValueError(f"first must be at least 0, not {first}")
    if statistic not in STATISTICS:
        raise ValueError(f"statistic is {statistic!r}, known are {', '.join(STATISTICS)}")
    if statistic == "variance" and (samples < 2 or noise == 0):
        raise ValueError(f"a variance takes at least 2 samples and some noise, not {samples} and {noise}")
    if tolerance is not None and not (tolerance > 0 and min_samples >= 2):
        raise ValueError(
            f"tolerance must be positive and min_samples at least 2, since one sample has no standard error, "
            f"not {tolerance} and {min_samples}"
        )

    def explain(
        key: Array,
        predictor: Any,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        if noise == 0:
            maps, infos = base(key, predictor, image, instances, progress=progress)
            return [m._replace(values=jnp.square(m.values)) if statistic == "squared" else m for m in maps], infos
        sigma = noise_sigma(image, noise, reference_channel)
        tell = one_at_a_time(progress)
        runs = [Run() for _ in instances]
        active = list(range(len(runs)))  # replaced by a shorter one, never changed: threads read it

        def sample(shard: Any, n: int) -> dict[int, tuple[SaliencyMap, Info]]:
            chosen = active
            device = None if shard is None else device_of(shard)
            key_n, *clean = jax.device_put((jax.random.fold_in(key, n), image, sigma), device)
            image_n = add_noise(key_n, *clean)
            maps, infos = base(key, shard, image_n, [instances[i] for i in chosen], progress=tell)
            return dict(zip(chosen, zip(maps, infos, strict=True), strict=True))

        numbers = takewhile(lambda _: active, range(first, first + samples))
        with closing(in_order(predictor, numbers, sample)) as results:
            for found in results:
                for i in active:
                    runs[i].add(*found.pop(i), statistic)
                if tolerance is not None and active and len(runs[active[0]].points) >= min_samples:
                    latest = jax.device_get([runs[i].points[-1] for i in active])
                    for i, (peak, error) in zip(active, latest, strict=True):
                        runs[i].converged = relative_error(peak.tolist(), error.tolist()) <= tolerance
                    active = [i for i in active if not runs[i].converged]
        maps, infos = [], []
        for run in runs:
            saliency, info = run.finish()
            maps.append(saliency)
            extra = {} if tolerance is None else {"converged": float(run.converged)}
            infos.append(info._replace(extra={**info.extra, **extra}))
        return maps, infos

    return explain


def merge_samples(
    maps: Sequence[SaliencyMap], infos: Sequence[Info], more_maps: Sequence[SaliencyMap], more_infos: Sequence[Info]
) -> tuple[list[SaliencyMap], list[Info]]:
    """Maps and infos of the union of two sets of samples: of `first=0, samples=20` and `first=20, samples=30`, all fifty.

    For `statistic="mean"` or `"squared"`, of the same explainer, key, image and instances in the same order. With
    `M₂ = SE²·N(N - 1)`, the sum of squared deviations, and `δ = m̄_b - m̄_a` (Chan, Golub, LeVeque 1979),

        `N = N_a + N_b`,  `m̄ = m̄_a + δ·N_b/N`,  `M₂ = M₂a + M₂b + δ²·N_a·N_b/N`,

    exact but for rounding. That the sets are disjoint cannot be seen from the maps: it is up to the caller.

    The course holds what is known of the union: the first set's own, then NaN, since the peak of a mean does not follow from
    the peaks of its parts, and at the end the peaks of the merged map. Other figures of the method are those of `more_infos`;
    `converged`, a statement about one set, is dropped.

    Raises ValueError where the lists differ in length or maps in place or shape, where a map is a variance, or where one of
    several samples lacks its standard error or course.

    >>> from xaiseg._types import Info, SaliencyMap
    >>> one, two = (SaliencyMap(jnp.full((1, 1, 1, 1), v), (0, 0, 0)) for v in (1.0, 3.0))
    >>> (both,), (info,) = merge_samples([one], [Info(1, 1)], [two], [Info(1, 1)])
    >>> both.values.item(), both.standard_error.item(), info.samples
    (2.0, 1.0, 2)
    """
    if not len(maps) == len(infos) == len(more_maps) == len(more_infos):
        lengths = ", ".join(str(len(x)) for x in (maps, infos, more_maps, more_infos))
        raise ValueError(f"expected maps and infos of the same instances, twice, not lists of {lengths}")
    merged, merged_infos = [], []
    for a, info, b, more in zip(maps, infos, more_maps, more_infos, strict=True):
        _check_place(a.start, a.values.shape, b)
        for saliency, i in ((a, info), (b, more)):
            if i.samples > 1 and (i.course is None or saliency.standard_error is None):
                raise ValueError(f"a map of {i.samples} samples lacks its standard error or its course")
            if i.course is not None and math.isnan(i.course.peak[0][0]):
                # only a variance has no value after one sample
                raise ValueError("variances cannot be merged: their maps do not carry the mean")
        here = jnp.asarray(a.values).sharding
        values, error, point = _merge(
            (a.values, a.standard_error, float(info.samples)),
            (jax.device_put(b.values, here), jax.device_put(b.standard_error, here), float(more.samples)),
        )
        merged.append(SaliencyMap(values, a.start, error))
        before = info.course or _course([_peaks(jnp.asarray(a.values), jnp.full_like(a.values, jnp.nan))])
        unknown = [(math.nan,) * a.values.shape[-1]] * (more.samples - 1)
        after = _course([point])
        course = Course(
            (*before.peak, *unknown, *after.peak), (*before.standard_error, *unknown, *after.standard_error)
        )
        extra = {name: value for name, value in more.extra.items() if name != "converged"}
        merged_infos.append(more._replace(samples=info.samples + more.samples, extra=extra, course=course))
    return merged, merged_infos


def noise_sigma(image: Array, noise: float, reference_channel: int = 0) -> Array:
    """`σ = noise · (max - min)` of one channel of `image` `(X, Y, Z, C)`, in units of normalised intensity.

    >>> float(noise_sigma(jnp.array([-1.0, 3.0]).reshape(2, 1, 1, 1), 0.25))
    1.0
    """
    if reference_channel not in range(image.shape[-1]):
        raise ValueError(
            f"reference_channel is {reference_channel}, but the image has {image.shape[-1]} channels, from 0"
        )
    channel = image[..., reference_channel]
    return noise * (channel.max() - channel.min())


@jax.jit
def add_noise(key: Array, image: Array, sigma: Array) -> Array:
    """`x + σ·ε`, `ε ~ N(0, 1)` for each voxel and channel."""
    return image + sigma * jax.random.normal(key, image.shape, image.dtype)


class _Moments(NamedTuple):
    """Mean and sums of powers of deviations from it, `Σ (m_n - m̄)^k`, of a map's shape; third and fourth for the variance only."""

    mean: Array
    m2: Array
    m3: Array | None = None
    m4: Array | None = None


@dataclass
class Run:
    """One instance and what its samples have come to. points: `(2, C)` each, on the device: peaks and errors after each sample."""

    moments: _Moments | None = None
    points: list[Array] = field(default_factory=list)
    start: tuple[int, int, int] = (0, 0, 0)
    info: Info | None = None
    converged: bool = False

    def add(self, saliency: SaliencyMap, info: Info, statistic: str) -> None:
        values = jnp.asarray(saliency.values)
        if statistic == "squared":
            # in a program of its own: fused with a difference, a square may be rounded otherwise, and nothing be left of zero
            values = jnp.square(values)
        if self.moments is None:
            self.start = saliency.start
            orders = 4 if statistic == "variance" else 2
            self.moments = _Moments(*(jnp.zeros_like(values, device=values.sharding) for _ in range(orders)))
        _check_place(self.start, self.moments.mean.shape, saliency)
        # to where the first sample was computed, whichever shard this one comes from
        values = jax.device_put(values, self.moments.mean.sharding)
        self.moments, point = _fold(self.moments, values, len(self.points) + 1.0)
        self.points.append(point)
        self.info = info

    def finish(self) -> tuple[SaliencyMap, Info]:
        moments, self.moments = self.moments, None  # memory of one instance at a time is used twice
        assert moments is not None
        assert self.info is not None
        n = len(self.points)
        if n == 1:
            return SaliencyMap(moments.mean, self.start), self.info._replace(samples=1)
        values, error = _statistic(moments, float(n))
        return SaliencyMap(values, self.start, error), self.info._replace(samples=n, course=_course(self.points))


def _check_place(start: tuple[int, int, int], shape: tuple[int, ...], other: SaliencyMap) -> None:
    if (start, shape) != (other.start, other.values.shape):
        raise ValueError(
            f"maps of one instance begin at {start} with shape {shape} and at {other.start} with {other.values.shape}: "
            "all its samples must be of one crop"
        )


@partial(jax.jit, donate_argnames="moments")
def _fold(moments: _Moments, value: Array, n: Array) -> tuple[_Moments, Array]:
    """Moments with one more value, which makes `n`, and the peaks of the statistic with their errors."""
    mean, m2, m3, m4 = moments
    delta = value - mean
    step = delta / n
    gain = delta * (value - (mean + step))
    if m3 is not None and m4 is not None:
        m4 = m4 + step * (step * (gain * (n * n - 3 * n + 3) + 6 * m2) - 4 * m3)
        m3 = m3 + step * (gain * (n - 2) - 3 * m2)
    moments = _Moments(mean + step, m2 + gain, m3, m4)
    return moments, _peaks(*_statistic(moments, n))


@jax.jit
def _statistic(moments: _Moments, n: Array) -> tuple[Array, Array]:
    mean, m2, _, m4 = moments
    if m4 is None:
        return mean, jnp.sqrt(m2 / (n * (n - 1)))
    variance = m2 / (n - 1)
    # never negative but for rounding
    spread = jnp.maximum(m4 * (n / jnp.square(n - 1)) - jnp.square(variance) * ((n - 3) / (n - 1)), 0.0)
    return variance, jnp.sqrt(spread / n)


def _peaks(values: Array, error: Array) -> Array:
    """The largest value of each channel, the first of equals, and its error: `(2, C)`; the smallest where none is positive."""
    flat = values.reshape(-1, values.shape[-1])
    at = jnp.where(flat.max(0) > 0, jnp.argmax(flat, axis=0), jnp.argmin(flat, axis=0))[None]
    return jnp.concatenate([jnp.take_along_axis(x, at, axis=0) for x in (flat, error.reshape(flat.shape))])


def _course(points: Sequence[Array]) -> Course:
    # math.nan itself, so that courses with the same numbers are equal
    rows = [
        [[math.nan if math.isnan(x) else x for x in row] for row in point.tolist()] for point in jax.device_get(points)
    ]
    return Course(tuple(tuple(peak) for peak, _ in rows), tuple(tuple(error) for _, error in rows))


@jax.jit
def _merge(a: tuple[Array, Array | None, Array], b: tuple[Array, Array | None, Array]) -> tuple[Array, Array, Array]:
    """Mean and its error of two sets, each with mean, error and number, and the peaks."""
    (mean, m2, n), (more, more_m2, m) = ((v, 0.0 if e is None else e * e * (k * (k - 1)), k) for v, e, k in (a, b))
    delta = more - mean
    moments = _Moments(mean + delta * (m / (n + m)), m2 + more_m2 + delta * delta * (n * m / (n + m)))
    value, error = _statistic(moments, n + m)
    return value, error, _peaks(value, error)
