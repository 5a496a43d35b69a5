"""Attributions along a path from a reference image, and gradient times input: wrappers over any explainer.

A gradient says how the target changes per unit of intensity. Times the intensity by which a voxel differs from a reference image
`x'`, it says how much of the target `S(x) - S(x')` the voxel accounts for: that is an attribution. Along the straight path from
`x'` to `x` the attributions add up to exactly that difference (completeness).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.polynomial.legendre import leggauss

from xaiseg._types import Course, Explainer, Info, Instance, Progress, SaliencyMap
from xaiseg.inference.devices import device_of
from xaiseg.saliency.baselines import Baseline, given, reference_image, zero
from xaiseg.saliency.noise import Run, noisy
from xaiseg.saliency.rows import input_gradient
from xaiseg.saliency.shards import in_order, one_at_a_time
from xaiseg.saliency.targets import Target, head

Quadrature = Literal["gauss_legendre", "midpoint"]


def integrated_gradients(
    base: Explainer | None = None,
    *,
    baseline: Baseline | None = None,
    steps: int = 50,
    quadrature: Quadrature = "gauss_legendre",
) -> Explainer:
    """`M = (x - x') ⊙ Σ_k w_k · base(x' + α_k (x - x'))`, the path integral by quadrature (Sundararajan et al. 2017, eq. 1).

    base: what is integrated, a map of the image's channels; by default `input_gradient()`, the gradient of the target summed
      over the instance, `S(x) = Σ_{v∈Ω} t(y(x)[v])`.
    baseline: gives the reference image `x'`, `zero()` by default. steps: points on the path. quadrature: their places, see
      `path_nodes`.

    Completeness, `Σ_{v,c} M = S(x) - S(x')`, holds for a base that is the gradient of a scalar (a sum or mean of rows) up to the
    quadrature's error, which `completeness_gap` measures; a signed maximum has none. The instance is that of the clean
    image all along the path. Maps are `(x, y, z, C)`, signed, in units of the target (logits, summed over the instance).
    Every step is given the same key. Maps have no standard error of their own, also over a base that has one: noise goes around it,
    as in `smooth_integrated_gradients`. `Info.rows` counts the passes of all steps; `Info.extra` are the base's figures,
    averaged with the weights `w_k`. With several shards of a predictor the steps are spread over them and added up in order.

    Raises ValueError for fewer than one step or an unknown quadrature; when called, for a reference of another shape, or a
    base whose maps have other channels than the image, such as a class-activation map.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, StitchedPredictor
    >>> predictor = StitchedPredictor(lambda x: x**3, (2, 2, 2), target_class=0)
    >>> lesion = Instance(1, np.array([[0, 0, 1]], np.int32))
    >>> explain = integrated_gradients(steps=2)
    >>> maps, infos = explain(jax.random.key(0), predictor, jnp.full((2, 2, 2, 1), 2.0), [lesion])
    >>> f"{float(maps[0].values.sum()):.4f}"  # 2³ - 0³
    '8.0000'
    """
    places, weights = path_nodes(steps, quadrature)

    def explain(
        key: Array,
        predictor: Any,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        if not instances:
            return [], []
        reference = reference_image(baseline or zero(), image)
        gradient, report = base or input_gradient(), one_at_a_time(progress)

        def step(shard: Any, k: int) -> tuple[list[SaliencyMap], list[Info]]:
            its_key, point = _on(shard, key, _between(reference, image, places[k]))
            return gradient(its_key, shard, point, instances, progress=report)

        sums: list[Array] = []
        passes: list[list[Info]] = []
        for k, (maps, infos) in enumerate(in_order(predictor, range(steps), step)):
            if k == 0:
                for found in maps:
                    _check_channels(found, image)
                sums = [jnp.asarray(m.values) * weights[0].astype(m.values.dtype) for m in maps]
            else:
                sums = [_add(total, m.values, weights[k]) for total, m in zip(sums, maps, strict=True)]
            passes.append(infos)
        attributions = [
            SaliencyMap(_times_difference(total, image, reference, m.start), m.start)
            for total, m in zip(sums, maps, strict=True)
        ]
        return attributions, [_along_path(infos, weights) for infos in zip(*passes, strict=True)]

    return explain


def smooth_integrated_gradients(
    base: Explainer | None = None,
    *,
    samples: int = 50,
    noise: float = 0.05,
    baseline: Baseline | None = None,
    steps: int = 50,
    quadrature: Quadrature = "gauss_legendre",
    statistic: str = "mean",
    reference_channel: int = 0,
    tolerance: float | None = None,
    min_samples: int = 8,
) -> Explainer:
    """`noisy(integrated_gradients(base, ...), ...)`: the paths from one reference to noisy copies of the image, averaged.

    The reference `x'` is that of the clean image and the same for all copies: a brain cannot be told from a noisy background.
    See `integrated_gradients` and `noisy` for the options. Takes `samples · steps` gradients.

    Raises ValueError as both do.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, StitchedPredictor
    >>> predictor = StitchedPredictor(lambda x: x**2, (2, 2, 2), target_class=0)
    >>> lesion, image = Instance(1, np.array([[0, 0, 1]], np.int32)), jnp.zeros((2, 2, 2, 1)).at[0, 0, 1].set(3.0)
    >>> explain = smooth_integrated_gradients(samples=400, noise=0.1, steps=2)
    >>> maps, infos = explain(jax.random.key(0), predictor, image, [lesion])
    >>> f"{float(maps[0].values[0, 0, 1, 0]):.1f}"  # E[(x + ε)²], with σ = 0.3
    '9.1'
    """

    def wrapped(reference: Baseline | None) -> Explainer:
        path = integrated_gradients(base, baseline=reference, steps=steps, quadrature=quadrature)
        return noisy(
            path,
            samples=samples,
            noise=noise,
            statistic=statistic,
            reference_channel=reference_channel,
            tolerance=tolerance,
            min_samples=min_samples,
        )

    # what is wrong with the options is said now, not when the first scan is explained
    wrapped(baseline)

    def explain(
        key: Array,
        predictor: Any,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        if not instances:
            return [], []
        of_the_clean_image = given(reference_image(baseline or zero(), image))
        return wrapped(of_the_clean_image)(key, predictor, image, instances, progress=progress)

    return explain


def expected_gradients(
    base: Explainer | None = None,
    *,
    references: Sequence[Array | np.ndarray],
    samples: int = 50,
) -> Explainer:
    """`M = 1/N Σ_n (x - x'_n) ⊙ base(x'_n + α_n (x - x'_n))`, `x'_n` one of the references, `α_n ~ U(0, 1)` (Erion et al. 2021).

    Integrated gradients averaged over references, by Monte Carlo over both at once. Draw `n` has the key `k = fold_in(key, n)`: its
    reference is `randint(fold_in(k, 0), (), 0, len(references))`, its `α` is `uniform(fold_in(k, 1))`, and the base is given
    `fold_in(k, 2)`; all instances share the draws.

    base: as in `integrated_gradients`. references: images `(X, Y, Z, C)` on the grid of the explained one, e.g. of healthy
      subjects; they are kept in the host's memory. samples: draws.
    Maps are `(x, y, z, C)`, signed, in units of the target, with the standard error over the draws at each voxel where there are at
    least two. In expectation `Σ M = S(x) - mean S(x')`. `Info.samples` are the draws, `Info.course` how the peak settled over them.

    Raises ValueError for no references, some that are not finite, or fewer than one draw; when called, for a reference of another
    shape, or a base whose maps have other channels than the image.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, StitchedPredictor
    >>> predictor = StitchedPredictor(lambda x: 3 * x, (2, 2, 2), target_class=0)
    >>> lesion = Instance(1, np.array([[0, 0, 1]], np.int32))
    >>> explain = expected_gradients(references=[jnp.ones((2, 2, 2, 1))], samples=3)
    >>> maps, infos = explain(jax.random.key(0), predictor, jnp.full((2, 2, 2, 1), 2.0), [lesion])
    >>> float(maps[0].values.sum()), float(maps[0].standard_error.max())
    (3.0, 0.0)
    """
    if len(references) == 0 or samples < 1:
        raise ValueError(f"there are {len(references)} references and {samples} samples, expected at least one of both")
    kept, shapes = [given(reference) for reference in references], [np.shape(reference) for reference in references]

    def explain(
        key: Array,
        predictor: Any,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        if not instances:
            return [], []
        gradient, report = base or input_gradient(), one_at_a_time(progress)
        # those that are not drawn too: an error must not depend on the key
        for number, shape in enumerate(shapes):
            if shape != image.shape:
                raise ValueError(f"reference {number} has shape {shape}, the image {image.shape}: give one on its grid")

        def draw(shard: Any, n: int) -> tuple[list[SaliencyMap], list[Info]]:
            k = jax.random.fold_in(key, n)
            number = int(jax.random.randint(jax.random.fold_in(k, 0), (), 0, len(kept)))
            reference = kept[number](image)
            place = jax.random.uniform(jax.random.fold_in(k, 1), (), image.dtype)
            its_key, point = _on(shard, jax.random.fold_in(k, 2), _between(reference, image, place))
            maps, infos = gradient(its_key, shard, point, instances, progress=report)
            for found in maps:
                _check_channels(found, image)
            return [m._replace(values=_times_difference(m.values, image, reference, m.start)) for m in maps], infos

        runs = [Run() for _ in instances]
        passes: list[list[Info]] = []
        for maps, infos in in_order(predictor, range(samples), draw):
            for run, found, info in zip(runs, maps, infos, strict=True):
                run.add(found, info, "mean")
            passes.append(infos)
        averaged = [run.finish() for run in runs]
        counted = [
            _over_draws(infos, info.course)
            for infos, (_, info) in zip(zip(*passes, strict=True), averaged, strict=True)
        ]
        return [mean for mean, _ in averaged], counted

    return explain


def times_input(base: Explainer, *, baseline: Baseline | None = None) -> Explainer:
    """`M = (x - x') ⊙ base(x)`: gradient times input (Shrikumar et al. 2017), the first-order attribution of a gradient.

    baseline: gives the reference image `x'`; by default zero, so that `M = x ⊙ base(x)`. The standard error is scaled alike.
    For a network that is linear in the image it equals `integrated_gradients`. Around a noisy base, `times_input(noisy(base))`,
    it multiplies by the clean image; `noisy(times_input(base))` by the noisy ones, which adds their noise to the map.

    Raises ValueError when called, for a reference of another shape, or a base whose maps have other channels than the image.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, StitchedPredictor, jacobian_rows, mean
    >>> predictor = StitchedPredictor(lambda x: x**2, (2, 2, 2), target_class=0)
    >>> lesion = Instance(1, np.array([[0, 0, 1]], np.int32))
    >>> explain = times_input(jacobian_rows(mean()))
    >>> maps, infos = explain(jax.random.key(0), predictor, jnp.full((2, 2, 2, 1), 3.0), [lesion])
    >>> float(maps[0].values[0, 0, 1, 0])
    18.0
    """

    def explain(
        key: Array,
        predictor: Any,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        if not instances:
            return [], []
        reference = reference_image(baseline or zero(), image)
        maps, infos = base(key, predictor, image, instances, progress=progress)
        products = []
        for found in maps:
            _check_channels(found, image)
            values = _times_difference(found.values, image, reference, found.start)
            error = found.standard_error
            if error is not None:
                error = jnp.abs(_times_difference(error, image, reference, found.start))
            products.append(SaliencyMap(values, found.start, error))
        # how the base's peak settled says nothing of the product's
        return products, [info._replace(course=None) for info in infos]

    return explain


def completeness_gap(
    predictor: Any,
    image: Array,
    baseline_image: Array,
    instance: Instance,
    saliency_map: SaliencyMap,
    *,
    target: Target | str = "logit",
) -> float:
    """`|ΣM - (S(x) - S(x'))| / |S(x) - S(x')|`, `S(x) = Σ_{v∈Ω} t(y(x)[v])`: how far a map is from adding up.

    Dimensionless. For a map of the mean over the instance, first multiply it by `|Ω|`. The network is run over all windows of both
    images. Where the target does not differ at all, the gap is 0 if the map's sum is 0 too, else infinite.
    Raises ValueError for an unknown target, see `Target`.

    >>> import jax.numpy as jnp, numpy as np
    >>> from xaiseg import Instance, SaliencyMap, StitchedPredictor
    >>> predictor = StitchedPredictor(lambda x: x**2, (2, 2, 2), target_class=0)
    >>> image, lesion = jnp.full((2, 2, 2, 1), 3.0), Instance(1, np.array([[0, 0, 1]], np.int32))
    >>> half = SaliencyMap(jnp.full((1, 1, 1, 1), 4.5), (0, 0, 1))
    >>> completeness_gap(predictor, image, jnp.zeros_like(image), lesion, half)
    0.5
    """
    score = [_score(predictor, x, instance, target) for x in (image, baseline_image)]
    difference = score[0] - score[1]
    gap = abs(float(np.asarray(saliency_map.values, np.float64).sum()) - difference)
    if difference == 0:
        return 0.0 if gap == 0 else float("inf")
    return gap / abs(difference)


def path_nodes(steps: int, quadrature: Quadrature = "gauss_legendre") -> tuple[np.ndarray, np.ndarray]:
    """Places `α_k` on `(0, 1)` in rising order and weights `w_k` that add up to 1, each `(steps,)` float64.

    `gauss_legendre` is exact for polynomials of degree `2·steps - 1` in `α` and converges fastest where the gradient is smooth
    along the path; that of a piecewise linear network jumps, and there `midpoint`, the middles of equal parts, is as good.
    Raises ValueError for fewer than one step or an unknown quadrature.

    >>> places, weights = path_nodes(2, "midpoint")
    >>> places.tolist(), weights.tolist()
    ([0.25, 0.75], [0.5, 0.5])
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if quadrature == "midpoint":
        return (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)
    if quadrature == "gauss_legendre":
        places, weights = leggauss(steps)
        return (places + 1) / 2, weights / 2
    raise ValueError(f"quadrature is {quadrature!r}, known are {', '.join(get_args(Quadrature))}")


def _score(predictor: Any, image: Array, instance: Instance, target: Target | str) -> float:
    logits = predictor(image)
    chosen = head(target, predictor.target_class, predictor.output_activation, logits.shape[-1])
    values = chosen(chosen.choose(logits[tuple(instance.voxels.T)]))
    return float(np.asarray(values, np.float64).sum())


def _check_channels(found: SaliencyMap, image: Array) -> None:
    if found.values.shape[-1] != image.shape[-1]:
        raise ValueError(
            f"maps have {found.values.shape[-1]} channels and the image {image.shape[-1]}: only a map with respect to the image, "
            "not a class-activation map, can be multiplied by it"
        )


def _on(shard: Any, key: Array, image: Array) -> tuple[Array, Array]:
    return jax.device_put((key, image), None if shard is None else device_of(shard))


@jax.jit
def _between(reference: Array, image: Array, place: Array | float) -> Array:
    return reference + jnp.asarray(place, image.dtype) * (image - reference)


def _add(total: Array, values: Array | np.ndarray, weight: np.ndarray) -> Array:
    """One step more, where the first was computed: shards lie apart."""
    return _add_weighted(total, jax.device_put(values, total.sharding), weight)


@partial(jax.jit, donate_argnums=0)
def _add_weighted(total: Array, values: Array, weight: Array | np.ndarray) -> Array:
    return total + jnp.asarray(weight, values.dtype) * values


def _times_difference(values: Array | np.ndarray, image: Array, reference: Array, start: Sequence[int]) -> Array:
    """`values ⊙ (x - x')` in their crop, where the values lie."""
    values = jnp.asarray(values)
    difference = _difference(image, reference, np.array(start, np.int32), values.shape)
    return values * jax.device_put(difference, values.sharding).astype(values.dtype)


@partial(jax.jit, static_argnums=3)
def _difference(image: Array, reference: Array, start: Array | np.ndarray, shape: tuple[int, ...]) -> Array:
    corner = jnp.pad(jnp.asarray(start), (0, 1))
    return jax.lax.dynamic_slice(image, corner, shape) - jax.lax.dynamic_slice(reference, corner, shape)


def _along_path(infos: Sequence[Info], weights: np.ndarray) -> Info:
    extra = {
        name: float(sum(w * i.extra[name] for w, i in zip(weights, infos, strict=True))) for name in infos[0].extra
    }
    return Info(rows=sum(i.rows * i.samples for i in infos), windows=infos[0].windows, extra=extra)


def _over_draws(infos: Sequence[Info], course: Course | None) -> Info:
    path = _along_path(infos, np.full(len(infos), 1 / len(infos)))
    return path._replace(rows=path.rows // len(infos), samples=len(infos), course=course)
