"""Path attributions: closed forms, brute force in float64, completeness, the documented keys, and what is refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Course, Info, Instance, SaliencyMap
from xaiseg.inference import StitchedPredictor
from xaiseg.inference.devices import device_mesh
from xaiseg.saliency.baselines import blur, given, zero
from xaiseg.saliency.noise import noise_sigma, noisy
from xaiseg.saliency.paths import (
    completeness_gap,
    expected_gradients,
    integrated_gradients,
    path_nodes,
    smooth_integrated_gradients,
    times_input,
)
from xaiseg.saliency.rows import input_gradient

KEY = jax.random.key(5)
SHAPE = (6, 4, 5)
IMAGE = jax.random.normal(jax.random.key(1), (*SHAPE, 2))
REFERENCE = 0.3 * jax.random.normal(jax.random.key(2), (*SHAPE, 2))
LESION = Instance(1, np.array([[1, 2, 1], [2, 2, 1], [2, 2, 2], [5, 0, 3]], np.int32))
CORNER = Instance(2, np.array([[5, 3, 4]], np.int32))


def smooth(x):
    """A network that is smooth everywhere and couples neighbours, (N, *window, 2) -> (N, *window, 2)."""
    mixed = x[..., 0] * jnp.roll(x[..., 1], 1, 1) + jnp.roll(x[..., 1], -1, 3)
    return jnp.stack([x[..., 0], jnp.tanh(mixed) + jnp.sin(jnp.roll(mixed, 1, 2)) * x[..., 1]], -1)


def squares(x):
    """Homogeneous of degree two: its gradient is linear along any path from zero."""
    return jnp.stack([x[..., 0], 2 * x[..., 0] ** 2 - 3 * x[..., 0] * x[..., 1]], -1)


PREDICTOR = StitchedPredictor(smooth, (4, 4, 4))


@partial(jax.jit, static_argnums=0)
def slope(function, voxels, x):
    """The gradient of an instance's summed logit, through the whole stitched volume at once."""
    predictor = StitchedPredictor(function, (4, 4, 4), scan=True)
    return jax.grad(lambda x: predictor(x)[..., 1][tuple(voxels.T)].sum())(x)


def gradient(key, predictor, image, instances, *, progress=None):
    """The gradient of each instance's summed logit through the whole volume, cropped from its label on."""
    maps, infos = [], []
    for instance in instances:
        values = slope(predictor.logits_fn.func, instance.voxels, image)
        maps.append(SaliencyMap(values[instance.label :, 1:], (instance.label, 1, 0)))
        infos.append(Info(rows=3, windows=2, extra={"level": float(image.mean())}))
        if progress is not None:
            progress(3)
    return maps, infos


def whole(found):
    volume = np.zeros((*SHAPE, 2), np.float32)
    where = tuple(slice(s, s + n) for s, n in zip(found.start, found.values.shape, strict=False))
    volume[where] = found.values
    return volume


def cropped(volume, instance):
    """What `gradient` covers of a volume."""
    kept = np.zeros_like(volume)
    kept[instance.label :, 1:] = volume[instance.label :, 1:]
    return kept


def brute_force(instance, image, reference, steps):
    """A plain float64 loop: Gauss-Legendre on (-1, 1), one gradient of the whole stitched prediction per step."""
    with jax.enable_x64(True):
        x, start = (jnp.asarray(np.asarray(a, np.float64)) for a in (image, reference))
        total = np.zeros(x.shape)
        for node, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
            point = (start + x) / 2 + node * (x - start) / 2
            total += weight / 2 * np.asarray(slope(smooth, instance.voxels, point))
        return total * np.asarray(x - start)


def test_gauss_legendre_integrates_polynomials_and_nodes_are_numpys():
    places, weights = path_nodes(5)
    t, w = np.polynomial.legendre.leggauss(5)
    np.testing.assert_allclose(places * 2 - 1, t, atol=1e-15)
    np.testing.assert_allclose(weights * 2, w, atol=1e-15)
    for degree in range(10):
        assert (weights * places**degree).sum() == pytest.approx(1 / (degree + 1), abs=1e-14)
    assert abs((weights * places**10).sum() - 1 / 11) > 1e-7


@pytest.mark.parametrize("quadrature", ["gauss_legendre", "midpoint"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_nodes_are_inside_rising_symmetric_and_weigh_one(steps, quadrature):
    places, weights = path_nodes(steps, quadrature)
    assert places.shape == weights.shape == (steps,)
    assert (np.diff(places) > 0).all()
    assert places.min() > 0
    assert places.max() < 1
    assert weights.min() > 0
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(places + places[::-1], 1)


@pytest.mark.parametrize("quadrature", ["gauss_legendre", "midpoint"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_quadratic_function_is_exact_in_one_step(steps, quadrature):
    predictor = StitchedPredictor(squares, (4, 4, 4))
    explain = integrated_gradients(gradient, steps=steps, quadrature=quadrature)
    (found,), _ = explain(KEY, predictor, IMAGE, [LESION])
    # x ∂f/∂x and y ∂f/∂y halved: 2x² - 3xy/2 and -3xy/2
    x, y = np.moveaxis(np.asarray(IMAGE, np.float64), -1, 0)
    expected = np.zeros((*SHAPE, 2))
    places = tuple(LESION.voxels.T)
    expected[places] = np.stack([2 * x**2 - 1.5 * x * y, -1.5 * x * y], -1)[places]
    np.testing.assert_allclose(whole(found), cropped(expected, LESION), atol=1e-5)


@pytest.mark.parametrize("instance", [LESION, CORNER])
def test_integrated_gradients_are_brute_force(instance):
    explain = integrated_gradients(gradient, baseline=given(REFERENCE), steps=6)
    (found,), _ = explain(KEY, PREDICTOR, IMAGE, [instance])
    expected = brute_force(instance, IMAGE, REFERENCE, 6)
    # float32 against float64; the largest value is about 3
    np.testing.assert_allclose(whole(found), cropped(expected, instance), atol=1e-5)
    assert found.values.dtype == jnp.float32
    assert found.standard_error is None


def test_the_default_base_is_the_gradient_of_the_sum():
    explain = integrated_gradients(baseline=given(REFERENCE), steps=6)
    (found,), (info,) = explain(KEY, PREDICTOR, IMAGE, [LESION])
    np.testing.assert_allclose(whole(found), brute_force(LESION, IMAGE, REFERENCE, 6), atol=1e-5)
    _, (once,) = input_gradient()(KEY, PREDICTOR, IMAGE, [LESION])
    assert (info.rows, info.windows) == (6 * once.rows, once.windows)
    assert info.windows > 1


def test_completeness_comes_with_steps():
    gaps = {}
    for quadrature in ("gauss_legendre", "midpoint"):
        for steps in (4, 8, 16):
            explain = integrated_gradients(baseline=given(REFERENCE), steps=steps, quadrature=quadrature)
            (found,), _ = explain(KEY, PREDICTOR, IMAGE, [LESION])
            gaps[quadrature, steps] = completeness_gap(PREDICTOR, IMAGE, REFERENCE, LESION, found)
    # an error of order 1 / steps²
    assert gaps["midpoint", 8] == pytest.approx(gaps["midpoint", 4] / 4, rel=0.2)
    assert gaps["midpoint", 16] == pytest.approx(gaps["midpoint", 8] / 4, rel=0.1)
    assert gaps["midpoint", 16] > 1e-4
    assert gaps["gauss_legendre", 4] < gaps["midpoint", 4] / 5
    # float32 is all that is left
    assert gaps["gauss_legendre", 16] < 1e-5


def test_no_way_no_attribution():
    (found,), _ = integrated_gradients(gradient, baseline=given(IMAGE), steps=3)(KEY, PREDICTOR, IMAGE, [LESION])
    assert not np.asarray(found.values).any()
    assert completeness_gap(PREDICTOR, IMAGE, IMAGE, LESION, found) == 0
    assert completeness_gap(PREDICTOR, IMAGE, IMAGE, LESION, found._replace(values=found.values + 1)) == np.inf


def test_the_gap_is_that_of_the_target():
    """Of probabilities the integral of the logit is far off; the integral of their own gradient is not."""

    def of_probability(key, predictor, image, instances, *, progress=None):
        def probability(x):
            return predictor.probability(predictor(x))[tuple(LESION.voxels.T)].sum()

        return [SaliencyMap(jax.grad(probability)(image), (0, 0, 0))], [Info(rows=1, windows=1)]

    path = {"baseline": given(REFERENCE), "steps": 12}
    (found,), _ = integrated_gradients(of_probability, **path)(KEY, PREDICTOR, IMAGE, [LESION])
    gap = partial(completeness_gap, PREDICTOR, IMAGE, REFERENCE, LESION)
    assert gap(found, target="probability") < 1e-4
    assert gap(found) > 0.1
    with pytest.raises(ValueError, match="target is 'loss'"):
        gap(found, target="loss")


def test_info_counts_the_passes_of_all_steps_and_averages_figures():
    seen: list[int] = []
    explain = integrated_gradients(gradient, baseline=given(REFERENCE), steps=5)
    _, infos = explain(KEY, PREDICTOR, IMAGE, [LESION, CORNER], progress=seen.append)
    assert [(i.rows, i.windows, i.samples) for i in infos] == [(15, 2, 1)] * 2
    assert sum(seen) == 30
    # the mean of the image is linear along the path
    assert infos[0].extra["level"] == pytest.approx(float((IMAGE.mean() + REFERENCE.mean()) / 2), abs=1e-6)


def test_noise_inside_a_path_is_counted_in_rows():
    seen: list[int] = []
    explain = integrated_gradients(noisy(gradient, samples=2, noise=0.1), steps=3)
    (found,), (info,) = explain(KEY, PREDICTOR, IMAGE, [LESION], progress=seen.append)
    assert (info.rows, info.samples, sum(seen)) == (18, 1, 18)
    assert found.standard_error is None


def test_smooth_integrated_gradients_are_the_mean_of_paths_from_the_clean_reference():
    baseline, options = blur(1.0), {"steps": 3, "quadrature": "midpoint"}
    explain = smooth_integrated_gradients(gradient, samples=4, noise=0.1, baseline=baseline, **options)
    (found,), (info,) = explain(KEY, PREDICTOR, IMAGE, [LESION])
    paths = []
    for n in range(4):
        copy = IMAGE + noise_sigma(IMAGE, 0.1) * jax.random.normal(jax.random.fold_in(KEY, n), IMAGE.shape)
        path = integrated_gradients(gradient, baseline=given(baseline(IMAGE)), **options)
        paths.append(np.asarray(path(KEY, PREDICTOR, copy, [LESION])[0][0].values, np.float64))
    np.testing.assert_allclose(found.values, np.mean(paths, 0), atol=1e-5)
    np.testing.assert_allclose(found.standard_error, np.std(paths, 0, ddof=1) / 2, atol=1e-5)
    assert (info.rows, info.samples) == (9, 4)


def test_without_noise_it_is_the_path_itself():
    (smoothed,), _ = smooth_integrated_gradients(gradient, samples=4, noise=0, steps=3)(KEY, PREDICTOR, IMAGE, [LESION])
    (plain,), _ = integrated_gradients(gradient, steps=3)(KEY, PREDICTOR, IMAGE, [LESION])
    np.testing.assert_array_equal(smoothed.values, plain.values)


def draws(references, samples, instance):
    """The documented keys, in a float64 loop."""
    for n in range(samples):
        key = jax.random.fold_in(KEY, n)
        number = int(jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(references)))
        place = float(jax.random.uniform(jax.random.fold_in(key, 1)))
        with jax.enable_x64(True):
            x, start = (jnp.asarray(np.asarray(a, np.float64)) for a in (IMAGE, references[number]))
            pulled = slope(smooth, instance.voxels, start + place * (x - start))
            yield number, np.asarray(pulled * (x - start))


REFERENCES = [REFERENCE, -REFERENCE, jnp.zeros_like(IMAGE)]


@pytest.mark.parametrize("instance", [LESION, CORNER])
def test_expected_gradients_are_an_explicit_loop(instance):
    explain = expected_gradients(gradient, references=REFERENCES, samples=7)
    (found,), (info,) = explain(KEY, PREDICTOR, IMAGE, [instance])
    numbers, products = zip(*draws(REFERENCES, 7, instance), strict=True)
    assert set(numbers) == {0, 1, 2}
    np.testing.assert_allclose(whole(found), cropped(np.mean(products, 0), instance), atol=1e-5)
    error = cropped(np.std(products, 0, ddof=1) / np.sqrt(7), instance)
    np.testing.assert_allclose(whole(found._replace(values=found.standard_error)), error, atol=1e-5)
    assert (info.rows, info.windows, info.samples) == (3, 2, 7)
    assert info.course.peak[-1] == pytest.approx(np.asarray(found.values).max((0, 1, 2)).tolist())
    assert len(info.course.peak) == 7


def test_expected_gradients_of_one_reference_tend_to_integrated_gradients():
    (sampled,), _ = expected_gradients(gradient, references=[REFERENCE], samples=200)(KEY, PREDICTOR, IMAGE, [CORNER])
    (exact,), _ = integrated_gradients(gradient, baseline=given(REFERENCE), steps=12)(KEY, PREDICTOR, IMAGE, [CORNER])
    standard = np.asarray(sampled.standard_error)
    varies = standard > 1e-6
    assert varies.sum() >= 4
    # within four standard errors, each of several voxels
    deviation = np.abs(np.asarray(sampled.values - exact.values))
    assert (deviation[varies] < 4 * standard[varies]).all()
    assert deviation[~varies].max() < 1e-5


def test_the_base_of_expected_gradients_gets_keys_of_its_own():
    keys = []

    def base(key, predictor, image, instances, *, progress=None):
        keys.append(key)
        return gradient(key, predictor, image, instances, progress=progress)

    expected_gradients(base, references=[REFERENCE], samples=3)(KEY, PREDICTOR, IMAGE, [LESION])
    expected = [jax.random.fold_in(jax.random.fold_in(KEY, n), 2) for n in range(3)]
    for found, wanted in zip(keys, expected, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(wanted))


def test_one_draw_has_no_standard_error():
    (found,), (info,) = expected_gradients(gradient, references=[REFERENCE], samples=1)(KEY, PREDICTOR, IMAGE, [LESION])
    assert found.standard_error is None
    assert info.samples == 1


@pytest.mark.parametrize("baseline", [zero(), given(REFERENCE)], ids=["zero", "given"])
def test_times_input_multiplies_map_and_error(baseline):
    def base(key, predictor, image, instances, *, progress=None):
        maps, infos = gradient(key, predictor, image, instances)
        course = Course(((1.0, 1.0),), ((0.1, 0.1),))
        return [m._replace(standard_error=jnp.abs(m.values)) for m in maps], [i._replace(course=course) for i in infos]

    (found,), (info,) = times_input(base, baseline=baseline)(KEY, PREDICTOR, IMAGE, [LESION])
    expected = np.asarray(slope(smooth, LESION.voxels, IMAGE) * (IMAGE - baseline(IMAGE)))
    np.testing.assert_allclose(whole(found), cropped(expected, LESION), atol=1e-6)
    np.testing.assert_allclose(found.standard_error, np.abs(found.values))
    assert info == Info(rows=3, windows=2, extra=info.extra)


def test_of_a_linear_network_input_times_gradient_is_integrated_gradients():
    predictor = StitchedPredictor(lambda x: jnp.stack([x[..., 0], x[..., 0] - 2 * x[..., 1]], -1), (4, 4, 4))
    (product,), _ = times_input(gradient, baseline=given(REFERENCE))(KEY, predictor, IMAGE, [LESION])
    (path,), _ = integrated_gradients(gradient, baseline=given(REFERENCE), steps=3)(KEY, predictor, IMAGE, [LESION])
    np.testing.assert_allclose(path.values, product.values, atol=1e-6)
    assert completeness_gap(predictor, IMAGE, REFERENCE, LESION, cover(product)) < 1e-5


def cover(found):
    """`gradient` leaves out a part of the volume in which a voxelwise network's gradient is zero but for one voxel."""
    assert whole(found)[tuple(LESION.voxels.T)].all(-1).tolist() == [True, True, True, False]
    missing = (np.array([1, -2]) * np.asarray(IMAGE - REFERENCE)[5, 0, 3]).astype(np.float32)
    return found._replace(values=found.values.at[0, 0, 0].add(missing))


ALL = {
    "integrated": partial(integrated_gradients, steps=3),
    "smooth": partial(smooth_integrated_gradients, samples=2, steps=2),
    "expected": partial(expected_gradients, references=REFERENCES, samples=5),
    "times input": times_input,
}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_no_instances_no_passes(make):
    def never(*_, **__):
        raise AssertionError("nothing is to be explained")

    assert make(never)(KEY, PREDICTOR, IMAGE, []) == ([], [])


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_a_map_of_other_channels_is_refused(make):
    def activation(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(jnp.ones((2, 2, 2, 1)), (0, 0, 0))], [Info(rows=1, windows=1)]

    with pytest.raises(ValueError, match="maps have 1 channels and the image 2"):
        make(activation)(KEY, PREDICTOR, IMAGE, [LESION])


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_lesions_together_are_lesions_apart(make):
    explain = make(gradient)
    together, infos = explain(KEY, PREDICTOR, IMAGE, [LESION, CORNER])
    for number, instance in ((1, CORNER), (0, LESION)):
        (alone,), (info,) = explain(KEY, PREDICTOR, IMAGE, [instance])
        np.testing.assert_array_equal(alone.values, together[number].values)
        assert info == infos[number]


@pytest.mark.parametrize("name", ["integrated", "smooth", "expected"])
def test_shards_on_two_devices_give_the_same_map(name):
    """Passes run on both devices, results are added up in order on the first."""
    seen = []

    def placed(key, predictor, image, instances, *, progress=None):
        seen.extend(image.devices() | key.devices())
        return gradient(key, predictor, image, instances, progress=progress)

    explain, two = ALL[name](placed), jax.devices()[:2]
    one, infos = explain(KEY, PREDICTOR, IMAGE, [LESION, CORNER])
    assert set(seen) == {two[0]}
    passed: list[int] = []
    spread = replace(PREDICTOR, mesh=device_mesh(devices=two))
    both, both_infos = explain(KEY, spread, IMAGE, [LESION, CORNER], progress=passed.append)
    assert set(seen) == set(two)
    for a, b in zip(one, both, strict=True):
        np.testing.assert_array_equal(a.values, b.values)
        assert b.values.devices() == {two[0]}
    assert infos == both_infos
    assert sum(passed) == sum(i.rows * i.samples for i in both_infos)


@pytest.mark.parametrize("make", [integrated_gradients, smooth_integrated_gradients])
def test_what_is_no_path(make):
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        make(gradient, steps=0)
    with pytest.raises(ValueError, match="quadrature is 'simpson', known are gauss_legendre, midpoint"):
        make(gradient, quadrature="simpson")
    with pytest.raises(ValueError, match=r"has shape \(2, 2, 2, 2\), the image"):
        make(gradient, baseline=given(np.zeros((2, 2, 2, 2))))(KEY, PREDICTOR, IMAGE, [LESION])


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="there are 0 references"):
        expected_gradients(gradient, references=[])
    with pytest.raises(ValueError, match="and 0 samples"):
        expected_gradients(gradient, references=[REFERENCE], samples=0)
    with pytest.raises(ValueError, match="not finite"):
        expected_gradients(gradient, references=[REFERENCE / 0 * 0])
    # refused whether it is drawn or not
    explain = expected_gradients(gradient, references=[REFERENCE] * 50 + [REFERENCE[1:]], samples=1)
    with pytest.raises(ValueError, match=r"reference 50 has shape \(5, 4, 5, 2\)"):
        explain(KEY, PREDICTOR, IMAGE, [LESION])
