"""Averaging over noise: which noise, how much of it, and the mean and standard error against an explicit loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Info, Instance, SaliencyMap
from xaiseg.inference import StitchedPredictor
from xaiseg.saliency import noisy_mean, smoothgrad
from xaiseg.saliency.noise import noise_sigma

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


def explain(base, samples, instances=LESIONS, noise=0.05, image=IMAGE, key=KEY):
    return noisy_mean(base, samples=samples, noise=noise)(key, None, image, instances)


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


def test_mean_and_standard_error_are_those_of_an_explicit_loop():
    maps, infos = explain(Recorder(), 7)
    for lesion, found in zip(LESIONS, maps, strict=True):
        samples = []
        for n in range(7):
            noise = jax.random.normal(jax.random.fold_in(KEY, n), IMAGE.shape)
            samples.append((np.asarray(IMAGE + SIGMA * noise, np.float64) ** 2)[lesion.label :])
        # float32 moments, values up to about 1000
        np.testing.assert_allclose(found.values, np.mean(samples, 0), rtol=1e-5, atol=1e-5)
        expected = np.std(samples, 0, ddof=1) / np.sqrt(7)
        np.testing.assert_allclose(found.standard_error, expected, rtol=1e-3, atol=1e-4)
        assert found.start == (lesion.label, 0, 0)
        assert found.values.dtype == found.standard_error.dtype == np.float32
    assert infos == [Info(rows=3, windows=2, samples=7)] * 3


def test_a_sample_does_not_depend_on_how_many_follow():
    few, many = Recorder(), Recorder()
    explain(few, 2)
    explain(many, 5)
    np.testing.assert_array_equal(few.images, many.images[:2])


def test_lesions_explained_apart_see_the_same_noise():
    together, _ = explain(Recorder(), 3)
    for number in (2, 0, 1):
        (alone,), _ = explain(Recorder(), 3, [LESIONS[number]])
        np.testing.assert_array_equal(alone.values, together[number].values)
        np.testing.assert_array_equal(alone.standard_error, together[number].standard_error)


def test_another_key_is_other_noise():
    a, b = Recorder(), Recorder()
    explain(a, 1)
    explain(b, 1, key=jax.random.fold_in(KEY, 0))
    assert not np.array_equal(a.images[0], b.images[0])


def test_without_noise_the_image_is_explained_once():
    base = Recorder()
    maps, infos = explain(base, 50, noise=0)
    np.testing.assert_array_equal(base.images, [IMAGE])
    assert all(m.standard_error is None for m in maps)
    assert infos[0].samples == 1


def test_one_noisy_sample_has_no_standard_error():
    maps, _ = explain(Recorder(), 1)
    assert all(m.standard_error is None for m in maps)


@pytest.mark.parametrize(("samples", "noise"), [(0, 0.05), (1, -0.1)])
def test_what_cannot_be_sampled(samples, noise):
    with pytest.raises(ValueError, match="samples must be at least 1 and noise at least 0"):
        noisy_mean(Recorder(), samples=samples, noise=noise)


def test_smoothgrad_is_the_mean_gradient_over_noise():
    """For y = x³/3 of one voxel the row is x² there: its mean over the same noise."""
    predictor = StitchedPredictor(lambda x: x**3 / 3, (5, 4, 3))
    (found,), (info,) = smoothgrad(samples=4)(KEY, predictor, IMAGE, LESIONS[:1])
    noisy = [IMAGE + SIGMA * jax.random.normal(jax.random.fold_in(KEY, n), IMAGE.shape) for n in range(4)]
    expected = np.zeros(IMAGE.shape)
    expected[1, 1, 1, 1] = np.mean([np.asarray(x, np.float64)[1, 1, 1, 1] ** 2 for x in noisy])
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)
    assert info == Info(rows=1, windows=1, samples=4)


def test_an_unknown_aggregate_is_refused():
    with pytest.raises(ValueError, match="aggregate is 'median', known are signed_max, mean"):
        smoothgrad(aggregate="median")
