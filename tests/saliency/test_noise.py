"""Statistics over noise: which noise, how much of it, moments against explicit loops, stopping, shards, merging."""

import math
import threading
import time
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Info, Instance, SaliencyMap
from xaiseg.inference import StitchedPredictor
from xaiseg.inference.devices import device_mesh, device_of
from xaiseg.saliency import shards, smoothgrad
from xaiseg.saliency.noise import STATISTICS, _fold, merge_samples, noise_sigma, noisy

KEY = jax.random.key(7)
IMAGE = jax.random.normal(jax.random.key(1), (5, 4, 3, 2)) * jnp.array([1.0, 10.0]).reshape(1, 1, 1, 2)
LESIONS = [Instance(label, np.array([[label, 1, 1]], np.int32)) for label in (1, 2, 3)]
SIGMA = 0.05 * float(IMAGE[..., 0].max() - IMAGE[..., 0].min())


class Recorder:
    """A base explainer whose map is the image's square around the instance; it keeps the images that it was given."""

    def __init__(self):
        self.images: list[np.ndarray] = []

    def __call__(self, key, predictor, image, instances, *, progress=None):
        self.images.append(np.asarray(image))
        maps = [SaliencyMap(np.asarray(image)[i.label :] ** 2, (i.label, 0, 0)) for i in instances]
        return maps, [Info(rows=3, windows=2) for _ in instances]


def explain(base, samples, instances=LESIONS, noise=0.05, image=IMAGE, key=KEY, **options):
    return noisy(base, samples=samples, noise=noise, **options)(key, None, image, instances)


def noisy_squares(label, samples, first=0):
    """The maps that `Recorder` gives of an instance, `(samples, x, y, z, C)` in float64."""
    noise = [jax.random.normal(jax.random.fold_in(KEY, first + n), IMAGE.shape) for n in range(samples)]
    return np.stack([(np.asarray(IMAGE + SIGMA * e, np.float64) ** 2)[label:] for e in noise])


def statistic_of(maps, statistic):
    """Its value and standard error, in float64; NaN where a number is not defined."""
    n = len(maps)
    if statistic == "squared":
        maps = maps**2
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.sum((maps - maps.mean(0)) ** 2, 0) / np.float64(n - 1)
        if statistic != "variance":
            return maps.mean(0), np.sqrt(variance / n)
        fourth = np.sum((maps - maps.mean(0)) ** 4, 0) * n / np.float64(n - 1) ** 2
        return variance, np.sqrt((fourth - variance**2 * (n - 3) / np.float64(n - 1)) / n)


def equal(a, b):
    assert a.start == b.start
    np.testing.assert_array_equal(a.values, b.values)
    np.testing.assert_array_equal(a.standard_error, b.standard_error)


def test_sigma_is_a_fraction_of_the_range_of_flair():
    image = jnp.zeros((2, 2, 2, 2)).at[0, 0, 0].set(jnp.array([-1.0, 100.0])).at[1, 1, 1, 0].set(3.0)
    assert float(noise_sigma(image, 0.05)) == pytest.approx(0.2)
    assert float(noise_sigma(image, 0.05, reference_channel=1)) == pytest.approx(5.0)


def test_noise_is_normal_independent_and_of_that_sigma():
    image = jnp.zeros((40, 40, 20, 2)).at[0, 0, 0, 0].set(2.0)
    base = Recorder()
    explain(base, 2, image=image)
    a, b = (recorded - np.asarray(image) for recorded in base.images)
    for channel in range(2):
        # 32000 values: the sd of a sample sd is 0.4 %, of a mean 0.56 % of σ, of a correlation 0.56 %; bounds at four of them
        assert a[..., channel].std() == pytest.approx(0.1, rel=0.016)
        assert abs(a[..., channel].mean()) < 0.1 * 0.0225
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.0225
    assert abs(np.corrcoef(a[..., 0].ravel(), a[..., 1].ravel())[0, 1]) < 0.0225


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistic_and_standard_error_are_those_of_an_explicit_loop(statistic):
    maps, infos = explain(Recorder(), 7, statistic=statistic)
    for lesion, found, info in zip(LESIONS, maps, infos, strict=True):
        value, error = statistic_of(noisy_squares(lesion.label, 7), statistic)
        # float32 moments; the scale of the largest, as differences from a mean of the squares of values up to 30 are taken
        np.testing.assert_allclose(found.values, value, rtol=1e-4, atol=1e-5 * value.max())
        np.testing.assert_allclose(found.standard_error, error, rtol=1e-3, atol=1e-4 * error.max())
        assert found.start == (lesion.label, 0, 0)
        assert found.values.dtype == found.standard_error.dtype == np.float32
        assert isinstance(found.values, jax.Array)
        assert info._replace(course=None) == Info(rows=3, windows=2, samples=7)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_course_is_the_peak_after_each_sample(statistic):
    _, infos = explain(Recorder(), 6, statistic=statistic)
    for lesion, info in zip(LESIONS, infos, strict=True):
        samples = noisy_squares(lesion.label, 6)
        for n in range(6):
            value, error = (x.reshape(-1, 2) for x in statistic_of(samples[: n + 1], statistic))
            at = value.argmax(0), [0, 1]
            np.testing.assert_allclose(info.course.peak[n], value[at], rtol=1e-3)
            np.testing.assert_allclose(info.course.standard_error[n], error[at], rtol=5e-3)
        assert all(isinstance(x, float) for row in (*info.course.peak, *info.course.standard_error) for x in row)
        assert all(map(math.isnan, info.course.standard_error[0]))


def test_courses_of_the_same_samples_are_equal():
    assert explain(Recorder(), 3)[1] == explain(Recorder(), 3)[1]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_standard_error_is_how_far_statistics_of_other_noise_lie_apart(statistic):
    """Every voxel of a flat image is the same experiment with noise of its own."""
    image = jnp.full((40, 40, 20, 1), 1.0).at[0, 0, 0, 0].set(2.0)

    def itself(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(image[1:], (1, 0, 0))], [Info(1, 1)]

    (found,), _ = explain(itself, 20, LESIONS[:1], noise=0.3, image=image, statistic=statistic)
    # 31200 voxels: the sd of a sample sd is 0.4 %; the error of the variance is biased by -2.3 % for 20 normal values
    spread, error = (float(x) for x in (found.values.std(), jnp.sqrt(jnp.square(found.standard_error).mean())))
    assert error == pytest.approx(spread, rel=0.04 if statistic == "variance" else 0.02)


def test_moments_of_values_far_from_zero_are_not_lost_to_rounding():
    """The variance of 1000 ± 0.5: sums of squares in float32 would leave no digit of it."""
    image = jnp.full((3, 3, 3, 1), 1000.0).at[0, 0, 0, 0].set(1001.0)

    def itself(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(image, (0, 0, 0))], [Info(1, 1)]

    (found,), _ = explain(itself, 30, LESIONS[:1], noise=0.5, image=image, statistic="variance")
    noise = [jax.random.normal(jax.random.fold_in(KEY, n), image.shape) for n in range(30)]
    value, error = statistic_of(np.stack([np.asarray(image + 0.5 * e, np.float64) for e in noise]), "variance")
    np.testing.assert_allclose(found.values, value, rtol=1e-3)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-2)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_map_that_noise_does_not_change_has_no_error(statistic):
    def constant(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(jnp.full((2, 2, 2, 1), 0.1), (0, 0, 0))], [Info(1, 1)]

    (found,), (info,) = explain(constant, 5, LESIONS[:1], statistic=statistic)
    assert np.ptp(found.values) == 0
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-8)
    assert info.course.standard_error[-1] == pytest.approx((0,), abs=1e-8)


def test_a_sample_does_not_depend_on_how_many_follow():
    few, many = Recorder(), Recorder()
    explain(few, 2)
    explain(many, 5)
    np.testing.assert_array_equal(few.images, many.images[:2])


def test_samples_begin_at_the_first():
    late, all_ = Recorder(), Recorder()
    (found, *_), _ = explain(late, 3, first=2)
    explain(all_, 5)
    np.testing.assert_array_equal(late.images, all_.images[2:])
    np.testing.assert_allclose(found.values, noisy_squares(1, 3, first=2).mean(0), rtol=1e-5, atol=1e-5)


def test_lesions_explained_apart_see_the_same_noise():
    together, _ = explain(Recorder(), 3)
    for number in (2, 0, 1):
        (alone,), _ = explain(Recorder(), 3, [LESIONS[number]])
        equal(alone, together[number])


def test_another_key_is_other_noise():
    a, b = Recorder(), Recorder()
    explain(a, 1)
    explain(b, 1, key=jax.random.fold_in(KEY, 0))
    assert not np.array_equal(a.images[0], b.images[0])


@pytest.mark.parametrize("statistic", ["mean", "squared"])
def test_without_noise_the_image_is_explained_once(statistic):
    base = Recorder()
    maps, infos = explain(base, 50, noise=0, statistic=statistic)
    np.testing.assert_array_equal(base.images, [IMAGE])
    assert all(m.standard_error is None for m in maps)
    np.testing.assert_allclose(maps[0].values, IMAGE[1:] ** (2 if statistic == "mean" else 4), rtol=1e-6)
    assert infos[0].samples == 1


@pytest.mark.parametrize("statistic", ["mean", "squared"])
def test_one_noisy_sample_has_no_standard_error_and_no_course(statistic):
    maps, infos = explain(Recorder(), 1, statistic=statistic)
    np.testing.assert_allclose(maps[0].values, noisy_squares(1, 1)[0] ** (1 if statistic == "mean" else 2), rtol=1e-5)
    assert all(m.standard_error is None for m in maps)
    assert infos == [Info(rows=3, windows=2)] * 3


def test_no_instances_no_maps():
    assert explain(Recorder(), 3, []) == ([], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1 and noise at least 0"),
        ({"noise": -0.1}, "samples must be at least 1 and noise at least 0"),
        ({"first": -1}, "first must be at least 0, not -1"),
        ({"statistic": "median"}, "statistic is 'median', known are mean, squared, variance"),
        ({"statistic": "variance", "samples": 1}, "at least 2 samples and some noise, not 1"),
        ({"statistic": "variance", "noise": 0}, "at least 2 samples and some noise, not 9 and 0"),
        ({"tolerance": 0.0}, "tolerance must be positive and min_samples at least 2"),
        ({"tolerance": 0.1, "min_samples": 1}, "tolerance must be positive and min_samples at least 2"),
    ],
)
def test_what_cannot_be_sampled(options, message):
    with pytest.raises(ValueError, match=message):
        noisy(Recorder(), **{"samples": 9, "noise": 0.05} | options)


def test_a_map_that_changes_its_place_is_refused():
    starts = iter([(0, 0, 0), (0, 0, 1)])

    def wanders(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(image, next(starts))], [Info(1, 1)]

    with pytest.raises(ValueError, match=r"begin at \(0, 0, 0\) with shape \(5, 4, 3, 2\) and at \(0, 0, 1\)"):
        explain(wanders, 2, LESIONS[:1])


def test_no_sample_is_kept_and_one_program_folds_them_all():
    kept: list[weakref.ref] = []

    def itself(key, predictor, image, instances, *, progress=None):
        # those of the sample before may wait for the fold that was just begun
        assert sum(r() is not None for r in kept) <= len(instances)
        maps = [SaliencyMap(image * i.label, (0, 0, 0)) for i in instances]
        kept.extend(weakref.ref(m.values) for m in maps)
        return maps, [Info(1, 1)] * len(instances)

    before = _fold._cache_size()
    explain(itself, 12, image=jnp.ones((6, 5, 7, 1)).at[0, 0, 0].set(2.0))
    assert len(kept) == 36
    assert _fold._cache_size() == before + 1


# Stopping at a tolerance


def per_channel(a, b):
    return jnp.array([a, b]).reshape(1, 1, 1, 2)


class Rough:
    """A base whose maps are `1 + label · ε` in one channel and `0.2 + ε` in the other: the higher the label, the rougher."""

    def __init__(self):
        self.asked: list[list[int]] = []

    def __call__(self, key, predictor, image, instances, *, progress=None):
        self.asked.append([i.label for i in instances])
        time.sleep(0.002 * getattr(predictor, "slow", 0))
        if predictor is not None:
            assert image.devices() == {device_of(predictor)}
        if progress is not None:
            progress(1)
        maps = [
            SaliencyMap(per_channel(1.0, 0.2) + image[1:] * per_channel(float(i.label), 1.0), (1, 0, 0))
            for i in instances
        ]
        return maps, [Info(rows=1, windows=1, extra={"own": 2.0})] * len(instances)


FLAT = jnp.zeros((4, 3, 3, 2)).at[0, 0, 0, 0].set(1.0)  # σ is the noise; the voxel that sets it lies outside the maps
ROUGH = [Instance(label, LESIONS[0].voxels) for label in (1, 2, 5)]


def samples_needed(label, tolerance, most, least, statistic="mean"):
    """By brute force: all samples, the statistic of the first n for each n, in float64."""
    noise = [np.asarray(jax.random.normal(jax.random.fold_in(KEY, n), FLAT.shape), np.float64) for n in range(most)]
    maps = np.stack([np.array([1.0, 0.2]) + 0.1 * e[1:] * [label, 1.0] for e in noise])
    for n in range(least, most + 1):
        value, error = (x.reshape(-1, 2) for x in statistic_of(maps[:n], statistic))
        at = value.argmax(0), [0, 1]
        if (error[at] <= tolerance * np.abs(value[at]).max()).all():
            return n, True
    return most, False


@pytest.mark.parametrize(("statistic", "tolerance"), [("mean", 0.05), ("squared", 0.1), ("variance", 0.3)])
def test_each_instance_stops_where_a_brute_force_loop_does(statistic, tolerance):
    base = Rough()
    options = {"noise": 0.1, "image": FLAT, "statistic": statistic}
    maps, infos = explain(base, 40, ROUGH, tolerance=tolerance, min_samples=4, **options)
    expected = [samples_needed(i.label, tolerance, 40, 4, statistic) for i in ROUGH]
    assert [(info.samples, info.extra) for info in infos] == [
        (n, {"own": 2.0, "converged": float(met)}) for n, met in expected
    ]
    counts = [n for n, _ in expected]
    assert len(set(counts)) > 1
    assert max(counts) > 4
    # who has finished is no longer asked for
    assert base.asked == [
        [i.label for i, n in zip(ROUGH, counts, strict=True) if n > done] for done in range(max(counts))
    ]
    for instance, n, found, info in zip(ROUGH, counts, maps, infos, strict=True):
        (fixed,), (fixed_info,) = explain(Rough(), n, [instance], **options)
        equal(found, fixed)
        assert info.course == fixed_info.course


def test_what_does_not_converge_takes_all_samples_and_says_so():
    _, infos = explain(Rough(), 12, ROUGH, noise=0.1, image=FLAT, tolerance=0.04)
    assert [(i.samples, i.extra["converged"]) for i in infos] == [
        (n, float(met)) for n, met in (samples_needed(i.label, 0.04, 12, 8) for i in ROUGH)
    ]
    assert infos[0].extra["converged"] == 1
    assert infos[-1].samples == 12
    assert infos[-1].extra["converged"] == 0


def test_fewer_samples_than_the_least_have_not_converged():
    _, (info,) = explain(Rough(), 5, ROUGH[:1], noise=0.1, image=FLAT, tolerance=10.0, min_samples=6)
    assert (info.samples, info.extra["converged"]) == (5, 0)


def test_when_an_instance_stops_does_not_depend_on_its_company():
    together, infos = explain(Rough(), 40, ROUGH, noise=0.1, image=FLAT, tolerance=0.05)
    for number in (2, 0, 1):
        (alone,), (info,) = explain(Rough(), 40, [ROUGH[number]], noise=0.1, image=FLAT, tolerance=0.05)
        equal(alone, together[number])
        assert info == infos[number]


def test_a_map_of_zeros_has_converged():
    def nothing(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(jnp.zeros((2, 2, 2, 1)), (0, 0, 0))], [Info(1, 1)]

    _, (info,) = explain(nothing, 40, LESIONS[:1], tolerance=0.05)
    assert (info.samples, info.extra) == (8, {"converged": 1.0})


# Shards


def sharded(monkeypatch, count):
    """A predictor of so many shards on the two devices, the first of which is the slowest."""
    devices = jax.devices()
    each = [
        SimpleNamespace(mesh=device_mesh(devices=[devices[s % 2]]), slow=3 * (s == 0) + s % 2) for s in range(count)
    ]
    monkeypatch.setattr(shards, "sample_shards", lambda predictor: each)
    return each


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_shards_change_nothing(monkeypatch, count, statistic):
    options = {"noise": 0.1, "image": FLAT, "statistic": statistic, "first": 3}
    one, one_infos = explain(Rough(), 9, ROUGH, **options)
    each = sharded(monkeypatch, count)
    maps, infos = explain(Rough(), 9, ROUGH, **options)
    for a, b in zip(one, maps, strict=True):
        equal(a, b)
        assert b.values.devices() == b.standard_error.devices() == {device_of(each[0])}
    assert one_infos == infos


@pytest.mark.parametrize("count", [2, 3])
def test_shards_do_not_change_where_instances_stop(monkeypatch, count):
    options = {"noise": 0.1, "image": FLAT, "tolerance": 0.05, "min_samples": 3}
    one, one_infos = explain(Rough(), 40, ROUGH, **options)
    sharded(monkeypatch, count)
    base = Rough()
    maps, infos = explain(base, 40, ROUGH, **options)
    for a, b in zip(one, maps, strict=True):
        equal(a, b)
    assert one_infos == infos
    assert not [t for t in threading.enumerate() if t.name.startswith("shard")]
    assert len(base.asked) <= max(i.samples for i in infos) + count


def test_samples_of_a_predictor_with_a_mesh_are_spread_over_its_devices():
    predictor = StitchedPredictor(lambda x: x, (4, 3, 3), mesh=device_mesh(2))
    used = []

    def base(key, shard, image, instances, *, progress=None):
        used.append(device_of(shard))
        return Rough()(key, shard, image, instances)

    maps, _ = noisy(base, samples=5, noise=0.1)(KEY, predictor, FLAT, ROUGH)
    assert sorted(d.id for d in used) == [0, 0, 0, 1, 1]
    for a, b in zip(explain(Rough(), 5, ROUGH, noise=0.1, image=FLAT)[0], maps, strict=True):
        equal(a, b)


def test_progress_of_shards_is_told_one_at_a_time(monkeypatch):
    sharded(monkeypatch, 2)
    inside, total = 0, 0

    def progress(rows):
        nonlocal inside, total
        inside += 1
        assert inside == 1
        time.sleep(0.001)
        total += rows
        inside -= 1

    noisy(Rough(), samples=8, noise=0.1)(KEY, None, FLAT, ROUGH, progress=progress)
    assert total == 8


@pytest.mark.parametrize("count", [1, 2])
def test_errors_of_the_base_come_through_and_leave_no_thread(monkeypatch, count):
    sharded(monkeypatch, count)
    images: list[int] = []

    def fails(key, predictor, image, instances, *, progress=None):
        images.append(1)
        if len(images) > 3:
            raise KeyError("no such tap")
        return Rough()(key, predictor, image, instances)

    with pytest.raises(KeyError, match="no such tap"):
        explain(fails, 20, ROUGH, image=FLAT)
    assert len(images) <= 4 + count
    assert not [t for t in threading.enumerate() if t.name.startswith("shard")]


# Merging


@pytest.mark.parametrize("statistic", ["mean", "squared"])
@pytest.mark.parametrize(("few", "more"), [(3, 5), (1, 4), (4, 1), (1, 1)])
def test_merged_samples_are_those_of_one_run(statistic, few, more):
    maps, infos = merge_samples(
        *explain(Recorder(), few, statistic=statistic),
        *explain(Recorder(), more, statistic=statistic, first=few),
    )
    whole, whole_infos = explain(Recorder(), few + more, statistic=statistic)
    for a, b, info, expected in zip(maps, whole, infos, whole_infos, strict=True):
        assert a.start == b.start
        # the same moments in another order of float32 additions
        np.testing.assert_allclose(a.values, b.values, rtol=1e-5)
        np.testing.assert_allclose(a.standard_error, b.standard_error, rtol=1e-3, atol=1e-5)
        assert info._replace(course=None) == expected._replace(course=None)
        for found, true in zip(info.course, expected.course, strict=True):
            assert len(found) == few + more
            np.testing.assert_array_equal(found[:few], true[:few])
            assert np.isnan(found[few:-1]).all()
            np.testing.assert_allclose(found[-1], true[-1], rtol=1e-3)


def test_merging_is_associative():
    a, b, c = (explain(Recorder(), 3, first=first) for first in (0, 3, 6))
    left, left_infos = merge_samples(*merge_samples(*a, *b), *c)
    right, right_infos = merge_samples(*a, *merge_samples(*b, *c))
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x.values, y.values, rtol=1e-5)
        np.testing.assert_allclose(x.standard_error, y.standard_error, rtol=1e-3, atol=1e-5)
    assert [i.samples for i in left_infos] == [i.samples for i in right_infos] == [9] * 3


def test_merging_drops_whether_one_part_converged():
    a = explain(Rough(), 8, ROUGH, image=FLAT, tolerance=0.1)
    _, infos = merge_samples(*a, *explain(Rough(), 8, ROUGH, image=FLAT, first=8))
    assert infos[0].extra == {"own": 2.0}


def test_what_cannot_be_merged():
    maps, infos = explain(Recorder(), 3)
    with pytest.raises(ValueError, match="not lists of 3, 3, 2, 2"):
        merge_samples(maps, infos, maps[:2], infos[:2])
    with pytest.raises(ValueError, match=r"begin at \(1, 0, 0\) .* and at \(3, 0, 0\)"):
        merge_samples(maps, infos, maps[::-1], infos[::-1])
    with pytest.raises(ValueError, match="lacks its standard error or its course"):
        merge_samples(maps, infos, [m._replace(standard_error=None) for m in maps], infos)
    variances = explain(Recorder(), 3, statistic="variance")
    with pytest.raises(ValueError, match="variances cannot be merged"):
        merge_samples(*variances, *variances)


# SmoothGrad


def test_smoothgrad_is_the_mean_gradient_over_noise():
    """For y = x³/3 of one voxel the row is x² there: its mean over the same noise."""
    predictor = StitchedPredictor(lambda x: x**3 / 3, (5, 4, 3))
    (found,), (info,) = smoothgrad(samples=4)(KEY, predictor, IMAGE, LESIONS[:1])
    noisy = [IMAGE + SIGMA * jax.random.normal(jax.random.fold_in(KEY, n), IMAGE.shape) for n in range(4)]
    expected = np.zeros(IMAGE.shape)
    expected[1, 1, 1, 1] = np.mean([np.asarray(x, np.float64)[1, 1, 1, 1] ** 2 for x in noisy])
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)
    assert (info.rows, info.windows, info.samples) == (1, 1, 4)


def test_an_unknown_aggregate_is_refused():
    with pytest.raises(ValueError, match="aggregate is 'mode', known are signed_max, mean"):
        smoothgrad(aggregate="mode")


def test_the_peak_of_a_map_without_positive_values_is_its_smallest():
    """An objection, `negative_max`: its largest value is always 0 and known at once."""

    class Negative(Recorder):
        def __call__(self, *arguments, **options):
            maps, infos = super().__call__(*arguments, **options)
            return [m._replace(values=-jnp.asarray(m.values)) for m in maps], infos

    base = noisy(Negative(), samples=4, noise=0.05)
    maps, infos = base(KEY, None, IMAGE, LESIONS)
    for found, info in zip(maps, infos, strict=True):
        np.testing.assert_allclose(info.course.peak[-1], np.asarray(found.values).min((0, 1, 2)), rtol=1e-6)
        assert min(info.course.standard_error[-1]) > 0


def test_a_reference_channel_that_is_none():
    with pytest.raises(ValueError, match="reference_channel is 2, but the image has 2 channels"):
        noise_sigma(IMAGE, 0.05, reference_channel=2)
