"""Infidelity, faithfulness correlation and max-sensitivity against loops, and on networks where they are known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faithfulness import IMAGE, KEY, LESION, LINEAR, PREDICTOR, REFERENCE, SHAPE, crop, gradient, score
from scipy import stats

from xaiseg import Instance, SaliencyMap, input_gradient, noisy, smoothgrad
from xaiseg._types import Info
from xaiseg.metrics.sensitivity import faithfulness_correlation, infidelity, max_sensitivity
from xaiseg.saliency.baselines import given

MAP = SaliencyMap(jax.random.normal(jax.random.key(8), (4, 3, 5, 2)), (1, 0, 2))
RANGE = float(IMAGE[..., 0].max() - IMAGE[..., 0].min())


def volume_of(saliency):
    whole = np.zeros((*SHAPE, 2))
    whole[tuple(slice(s, s + n) for s, n in zip(saliency.start, saliency.values.shape, strict=False))] = saliency.values
    return whole


def squares(key, predictor, image, instances, *, progress=None):
    """An explainer that compiles nothing: the squared image from each instance's first voxel on."""
    starts = [tuple(np.minimum(i.voxels[0], 2).tolist()) for i in instances]
    maps = [SaliencyMap(image[tuple(slice(s, s + 3) for s in start)] ** 2, start) for start in starts]
    return maps, [Info(1, 1) for _ in instances]


def test_infidelity_is_a_loop_over_noise():
    """β by numpy's least squares, which shares nothing with its closed form."""
    found, other = infidelity(KEY, PREDICTOR, IMAGE, LESION, [MAP, gradient(PREDICTOR)], samples=6, noise=0.1, chunk=4)
    whole, products, changes = volume_of(MAP), [], []
    for n in range(6):
        noise = 0.1 * RANGE * np.asarray(jax.random.normal(jax.random.fold_in(KEY, n), IMAGE.shape), np.float64)
        products.append((noise * whole).sum())
        changes.append(score(PREDICTOR, IMAGE) - score(PREDICTOR, np.asarray(IMAGE) - noise))
    (beta,), (rest,), *_ = np.linalg.lstsq(np.array(products)[:, None], np.array(changes))
    assert found.beta == pytest.approx(beta, rel=1e-4)
    assert found.value == pytest.approx(rest / 6, rel=1e-4)
    assert found.relative == pytest.approx(rest / np.square(changes).sum(), rel=1e-4)
    assert other.relative < found.relative


def test_the_gradient_of_a_linear_network_has_no_infidelity_whatever_its_scale():
    exact = gradient(LINEAR)
    maps = [exact, exact._replace(values=-7 * exact.values), MAP]
    found = infidelity(KEY, LINEAR, IMAGE, LESION, maps, samples=20, noise=0.1)
    # float32 differences of scores of order 1
    assert found[0].value < 1e-12
    assert found[0].beta == pytest.approx(1, abs=1e-5)
    assert found[1].value < 1e-12
    assert found[1].beta == pytest.approx(-1 / 7, abs=1e-5)
    assert found[2].relative > 0.5


def test_a_map_of_nothing_explains_nothing():
    zero, lost = infidelity(
        KEY, LINEAR, IMAGE, LESION, [MAP._replace(values=MAP.values * 0), MAP._replace(values=MAP.values * jnp.nan)]
    )
    assert (zero.beta, zero.relative) == (0, 1)
    assert np.isnan(lost).all()


def test_faithfulness_correlation_is_a_loop_over_subsets():
    """The subsets are drawn by the same generator; sums, images and r are written out, r by scipy."""
    region = np.zeros(SHAPE, bool)
    region[0:5, 0:4, 1:6] = True
    (found,) = faithfulness_correlation(
        KEY, PREDICTOR, IMAGE, LESION, [MAP],
        baseline=given(REFERENCE), region=region, samples=9, fraction=0.3, patch=(2, 1, 3), chunk=4,
    )  # fmt: skip
    whole, image, reference = volume_of(MAP), np.asarray(IMAGE), np.asarray(REFERENCE)
    patches = {}
    for voxel in map(tuple, np.argwhere(region).tolist()):
        patches.setdefault((voxel[0] // 2, voxel[1], voxel[2] // 3), []).append(voxel)
    names = sorted(patches)
    assert len(names) == 3 * 4 * 2
    sums, attributions, changes = [], [], []
    for n in range(9):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.fold_in(KEY, n))).ravel())
        voxels = [v for p in rng.permutation(24)[:7].tolist() for v in patches[names[p]]]
        changed = image.copy()
        for voxel in voxels:
            changed[voxel] = reference[voxel]
        sums.append(sum(whole[v].sum() for v in voxels))
        attributions.append(sum((whole[v] * (image[v] - reference[v])).sum() for v in voxels))
        changes.append(score(PREDICTOR, image) - score(PREDICTOR, changed))
    assert found.of_map == pytest.approx(stats.pearsonr(sums, changes).statistic, abs=1e-5)
    assert found.of_attribution == pytest.approx(stats.pearsonr(attributions, changes).statistic, abs=1e-5)


def test_the_attribution_of_a_linear_network_is_perfectly_correlated():
    exact, random = faithfulness_correlation(
        KEY, LINEAR, IMAGE, LESION, [gradient(LINEAR), MAP], baseline=given(REFERENCE), samples=40
    )
    assert exact.of_attribution == pytest.approx(1, abs=1e-5)
    assert exact.of_map < 0.95  # a gradient is not an attribution
    assert abs(random.of_attribution) < 0.6  # three and a half standard errors of 40 samples


def test_a_crop_is_the_whole_map():
    """A map that is zero beyond its crop is that crop."""
    start, shape = (1, 0, 2), (4, 3, 5)
    whole = SaliencyMap(jnp.asarray(volume_of(MAP), jnp.float32), (0, 0, 0))
    part = crop(whole, start, shape)
    for a, b in (
        infidelity(KEY, PREDICTOR, IMAGE, LESION, [whole, part], samples=3),
        faithfulness_correlation(KEY, PREDICTOR, IMAGE, LESION, [whole, part], samples=5),
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("chunk", [2, 100])
def test_the_chunk_changes_nothing(chunk):
    for measure in (infidelity, faithfulness_correlation):
        (one,) = measure(KEY, PREDICTOR, IMAGE, LESION, [MAP], samples=7, chunk=1)
        (many,) = measure(KEY, PREDICTOR, IMAGE, LESION, [MAP], samples=7, chunk=chunk)
        np.testing.assert_allclose(many, one, rtol=1e-4)


def test_max_sensitivity_is_a_loop_with_the_same_key():
    lesions = [LESION, Instance(2, np.array([[4, 3, 1]], np.int32))]
    explain = noisy(squares, samples=2, noise=0.1)
    found = max_sensitivity(KEY, explain, PREDICTOR, IMAGE, lesions, samples=3, radius=0.05)
    own, drawn = jax.random.split(KEY)
    clean, _ = explain(own, PREDICTOR, IMAGE, lesions)
    expected = [0.0, 0.0]
    for n in range(3):
        step = 0.05 * RANGE * jax.random.uniform(jax.random.fold_in(drawn, n), IMAGE.shape, minval=-1.0, maxval=1.0)
        assert np.abs(step).max() == pytest.approx(0.05 * RANGE, rel=0.02)
        moved, _ = explain(own, PREDICTOR, IMAGE + step, lesions)
        for i in range(2):
            a, b = (np.asarray(m[i].values, np.float64).ravel() for m in (moved, clean))
            expected[i] = max(expected[i], np.sqrt(((a - b) ** 2).sum()) / np.sqrt((b**2).sum()))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_gradient_of_a_linear_network_is_not_sensitive():
    """Nor is SmoothGrad, whose noise is that of the clean image. Bits: the noise's σ follows the image's range."""
    for explain in (input_gradient(), smoothgrad(samples=2, noise=0.1, aggregate="mean")):
        assert max_sensitivity(KEY, explain, LINEAR, IMAGE, [LESION], samples=2, radius=0.1) < 1e-6


def test_max_sensitivity_of_maps_without_a_norm():
    def zero(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(image * 0, (0, 0, 0)) for _ in instances], [Info(1, 1) for _ in instances]

    def lost(key, predictor, image, instances, *, progress=None):
        broken = image if (image == IMAGE).all() else image * jnp.nan
        return [SaliencyMap(broken, (0, 0, 0)) for _ in instances], [Info(1, 1) for _ in instances]

    assert np.isnan(max_sensitivity(KEY, zero, LINEAR, IMAGE, [LESION], samples=1))
    assert np.isnan(max_sensitivity(KEY, lost, LINEAR, IMAGE, [LESION], samples=2))


def test_arguments_out_of_range_are_refused():
    common = (PREDICTOR, IMAGE, LESION, [MAP])
    with pytest.raises(ValueError, match="noise above 0"):
        infidelity(KEY, *common, noise=0)
    with pytest.raises(ValueError, match="fraction between 0 and 1"):
        faithfulness_correlation(KEY, *common, fraction=1)
    with pytest.raises(ValueError, match="is empty"):
        faithfulness_correlation(KEY, *common, region=np.zeros(SHAPE, bool))
    with pytest.raises(ValueError, match="patch is 0 voxels"):
        faithfulness_correlation(KEY, *common, patch=0)
    with pytest.raises(ValueError, match="radius above 0"):
        max_sensitivity(KEY, input_gradient(), PREDICTOR, IMAGE, [LESION], radius=0)
    with pytest.raises(ValueError, match="target_class is 3"):
        infidelity(KEY, replace(PREDICTOR, target_class=3), IMAGE, LESION, [MAP])
