"""Every gradient-based explainer against central differences in float64, with no automatic differentiation on the other side.

The other side moves one input voxel, one tap activation, or one value between two layers at a time, through the stitched prediction
of overlapping windows. Grad-CAM and its relatives are in `test_cam.py`, whose `Stitched` differences the taps of each window.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Instance
from xaiseg.inference import StitchedPredictor
from xaiseg.saliency import (
    AGGREGATORS,
    Target,
    expected_gradients,
    given,
    guided_backprop,
    input_gradient,
    integrated_gradients,
    jacobian_rows,
    noisy,
    signed_max,
    smooth_integrated_gradients,
    smoothgrad,
    times_input,
)

KEY = jax.random.key(3)
SHAPE, WINDOW = (6, 5, 4), (4, 4, 4)
IMAGE = jax.random.normal(jax.random.key(1), (*SHAPE, 2))
REFERENCE = 0.3 * jax.random.normal(jax.random.key(2), (*SHAPE, 2))
# in one, two and four windows; the last voxel is far from the others
LESION = Instance(1, np.array([[0, 1, 1], [2, 2, 1], [2, 3, 2], [5, 0, 3]], np.int32))
STEP = 1e-4


def smooth(x):
    """Smooth everywhere, coupling neighbours, channels and, as an instance norm does, the whole window, (N, *window, 2)."""
    mixed = x[..., 0] * jnp.roll(x[..., 1], 1, 1) + jnp.roll(x[..., 1], -1, 3)
    energy = (x**2).mean((1, 2, 3, 4), keepdims=True)[..., 0]
    return jnp.stack([jnp.sin(x[..., 0]), jnp.tanh(mixed) * energy + jnp.sin(jnp.roll(mixed, 1, 2)) * x[..., 1]], -1)


PREDICTOR = StitchedPredictor(smooth, WINDOW, overlap=0.5)


def of_class_1(logits):
    return logits[..., 1]


@cache
def compiled(score):
    """All `(y(x + h e_i) - y(x - h e_i)) / 2h`, and the same at twice the step: their combination is of order four."""
    places = tuple(LESION.voxels.T)

    def difference(x, i, step):
        bump = jnp.zeros(x.size).at[i].set(step).reshape(x.shape)
        up, down = PREDICTOR(x + bump), PREDICTOR(x - bump)
        return (score(up[places]) - score(down[places])) / (2 * step)

    def all_of(x):
        one, two = (jax.vmap(partial(difference, x, step=h))(jnp.arange(x.size)) for h in (STEP, 2 * STEP))
        return (4 * one - two) / 3

    return jax.jit(all_of)


def rows(image=IMAGE, score=of_class_1):
    """∂y[v]/∂x of each voxel of the lesion, `(n, *SHAPE, 2)`; its error is of order 1e-12, that of rounding over the step."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(image, np.float64))
        return np.asarray(compiled(score)(x)).T.reshape(-1, *x.shape)


def copies(count, image=IMAGE, noise=0.05):
    """The documented noise: σ is a fraction of FLAIR's range, sample `n` is drawn from `fold_in(key, n)`."""
    sigma = noise * (image[..., 0].max() - image[..., 0].min())
    return [image + sigma * jax.random.normal(jax.random.fold_in(KEY, n), image.shape) for n in range(count)]


def maps_are(explain, expected, error=None, predictor=PREDICTOR, tolerance=1e-5):
    """`tolerance` is a fraction of the largest value: the explainers compute in float32."""
    (found,), _ = explain(KEY, predictor, IMAGE, [LESION])
    for values, wanted in ((found.values, expected), (found.standard_error, error)):
        if wanted is not None:
            volume = np.zeros(wanted.shape)
            volume[tuple(slice(s, s + n) for s, n in zip(found.start, values.shape[:3], strict=True))] = values
            np.testing.assert_allclose(volume, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def largest(rows):
    return np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]


DEFINITIONS = {
    "signed_max": largest,
    "mean": lambda rows: rows.mean(0),
    "sum": lambda rows: rows.sum(0),
    "positive_max": lambda rows: np.maximum(rows, 0).max(0),
    "negative_max": lambda rows: np.minimum(rows, 0).min(0),
    "l2_norm": lambda rows: np.sqrt((rows**2).sum(0)),
}


def test_every_aggregator_has_a_definition():
    assert set(DEFINITIONS) == set(AGGREGATORS) - {"median"}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_rows(name):
    maps_are(jacobian_rows(AGGREGATORS[name](), chunk=3), DEFINITIONS[name](rows()))


def test_the_median_of_rows():
    """To its accuracy of 5 %, as documented; magnitudes below 1e-7 count as zero."""
    (found,), _ = jacobian_rows(AGGREGATORS["median"](), chunk=3)(KEY, PREDICTOR, IMAGE, [LESION])
    where = tuple(slice(s, s + n) for s, n in zip(found.start, found.values.shape[:3], strict=True))
    expected = np.sort(rows(), axis=0)[1]
    outside = expected.copy()
    outside[where] = 0
    assert np.abs(outside).max() < 1e-9
    assert (np.abs(found.values - expected[where]) <= 0.0501 * np.abs(expected[where]) + 2e-7).all()
    assert np.abs(expected).max() > 0.01


def own(logits):
    return jnp.sin(logits[..., 1]) * logits[..., 0]


TARGETS = {
    "probability": lambda y: jax.nn.softmax(y)[..., 1],
    "log_odds": lambda y: y[..., 1] - y[..., 0],
    Target(function=own): own,
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: getattr(t, "name", t))
def test_rows_of_a_target(target):
    maps_are(jacobian_rows(signed_max(), target=target), largest(rows(score=TARGETS[target])))


def test_the_gradient_of_the_sum():
    maps_are(input_gradient(), rows().sum(0))


def test_input_times_gradient():
    maps_are(times_input(input_gradient()), rows().sum(0) * np.asarray(IMAGE, np.float64))


def test_smoothgrad_and_its_standard_error():
    samples = np.stack([largest(rows(copy)) for copy in copies(4)])
    maps_are(smoothgrad(samples=4, chunk=3), samples.mean(0), samples.std(0, ddof=1) / 2)


@pytest.mark.parametrize("statistic", ["mean", "squared", "variance"])
def test_statistics_over_noise(statistic):
    samples = np.stack([rows(copy).sum(0) for copy in copies(4)])
    expected = {"mean": samples.mean(0), "squared": (samples**2).mean(0), "variance": samples.var(0, ddof=1)}
    maps_are(noisy(input_gradient(), samples=4, noise=0.05, statistic=statistic), expected[statistic])


def along_path(image, start, steps):
    """Gauss-Legendre on the straight way from `start` to `image`."""
    x, start = np.asarray(image, np.float64), np.asarray(start, np.float64)
    nodes = zip(*np.polynomial.legendre.leggauss(steps), strict=True)
    return (x - start) * sum(w / 2 * rows((start + x) / 2 + t * (x - start) / 2).sum(0) for t, w in nodes)


def test_integrated_gradients():
    explain = integrated_gradients(input_gradient(), steps=3, baseline=given(REFERENCE))
    maps_are(explain, along_path(IMAGE, REFERENCE, 3))


def test_smooth_integrated_gradients():
    explain = smooth_integrated_gradients(samples=3, noise=0.05, steps=2, baseline=given(REFERENCE))
    paths = np.stack([along_path(copy, REFERENCE, 2) for copy in copies(3)])
    maps_are(explain, paths.mean(0), paths.std(0, ddof=1) / np.sqrt(3))


def test_expected_gradients():
    references = [np.asarray(REFERENCE), -np.asarray(REFERENCE)]
    products = []
    for n in range(4):
        key = jax.random.fold_in(KEY, n)
        reference = references[int(jax.random.randint(jax.random.fold_in(key, 0), (), 0, 2))].astype(np.float64)
        place = float(jax.random.uniform(jax.random.fold_in(key, 1)))
        way = np.asarray(IMAGE, np.float64) - reference
        products.append(way * rows(reference + place * way).sum(0))
    error = np.std(products, 0, ddof=1) / 2
    maps_are(expected_gradients(input_gradient(), references=references, samples=4), np.mean(products, 0), error)


# Guided backpropagation is not the derivative of a function: its rule is applied to the differences of each layer.

FIRST, SECOND = (np.random.default_rng(n).normal(size=(4, w)) for n, w in ((4, 2), (5, 2)))


def mix(weights, x):
    """An affine layer that looks one voxel back along the first axis, (N, *window, 2)."""
    return jnp.concatenate([x, jnp.roll(x, 1, 1)], -1) @ jnp.asarray(weights, x.dtype) + 0.1


LAYERS = (partial(mix, FIRST), jax.nn.relu, partial(mix, SECOND), partial(jax.nn.leaky_relu, negative_slope=0.1))


def rectified(x):
    for layer in LAYERS:
        x = layer(x)
    return x


def guided_rows(predictor):
    """Of each voxel, backwards through the Jacobians of layers in each window; a negative cotangent ends before an activation."""
    plan = predictor.plan(SHAPE)
    total = np.zeros((len(LESION.voxels), *IMAGE.shape))

    @partial(jax.jit, static_argnums=0)
    def jacobian(layer, x):
        """(inputs, outputs); the layers are piecewise linear: exact but for rounding where no kink is within the step."""

        def column(i):
            bump = jnp.zeros(x.size).at[i].set(STEP).reshape(x.shape)
            return ((layer(x + bump) - layer(x - bump)) / (2 * STEP)).reshape(-1)

        return jax.vmap(column)(jnp.arange(x.size))

    with jax.enable_x64(True):
        for start in plan.starts:
            x = jnp.asarray(np.asarray(IMAGE[plan.slices(start)], np.float64))[None]
            jacobians = []
            for layer in LAYERS:
                kinks = np.asarray(x) if layer in LAYERS[1::2] else np.inf
                assert np.abs(kinks).min() > STEP
                jacobians.append(np.asarray(jacobian(layer, x)))
                x = layer(x)
            for n, voxel in enumerate(LESION.voxels):
                place = tuple(voxel - np.array(start))
                if min(place) < 0 or (np.array(place) >= WINDOW).any():
                    continue
                cotangent = np.zeros((*WINDOW, 2))
                cotangent[(*place, 1)] = plan.weight[place] / plan.total_weight[tuple(voxel)]
                cotangent = cotangent.reshape(-1)
                for layer, back in zip(LAYERS[::-1], jacobians[::-1], strict=True):
                    cotangent = back @ (np.maximum(cotangent, 0) if layer in LAYERS[1::2] else cotangent)
                total[n][plan.slices(start)] += cotangent.reshape(*WINDOW, 2)
    return total


def test_guided_backpropagation():
    predictor = StitchedPredictor(rectified, WINDOW, overlap=0.5)
    expected = largest(guided_rows(predictor))
    maps_are(guided_backprop(jacobian_rows(signed_max(), chunk=3)), expected, predictor=predictor)
    (plain,), _ = jacobian_rows(signed_max())(KEY, predictor, IMAGE, [LESION])
    assert np.abs(np.asarray(plain.values)).max() > 0.1
    with pytest.raises(AssertionError):  # it is another map
        maps_are(jacobian_rows(signed_max(), chunk=3), expected, predictor=predictor)
