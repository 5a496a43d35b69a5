"""Reference images: closed forms, the phantom's own tissue, and what cannot be a reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from xaiseg.imaging.normalise import zscore_nonzero
from xaiseg.imaging.phantom import phantom
from xaiseg.saliency.baselines import (
    BASELINES,
    blur,
    given,
    normal_appearing_white_matter,
    reference_image,
    zero,
)

IMAGE = jax.random.normal(jax.random.key(0), (6, 5, 7, 2)).at[0].set(0.0)


@pytest.fixture(scope="module")
def brain():
    """A phantom's FLAIR and T1w, z-scored over non-zero voxels, and the phantom."""
    drawn = phantom(3, (56, 68, 56), 3.0, lesions=12)
    return np.stack([zscore_nonzero(drawn.flair, "flair"), zscore_nonzero(drawn.t1w, "t1w")], -1), drawn


def constant(reference):
    """The constants of the channels, from a reference that has no other values but zeros."""
    values = np.unique(np.asarray(reference).reshape(-1, reference.shape[-1]), axis=0)
    assert len(values) == 2
    return next(v for v in values if v.any())


@pytest.mark.parametrize("name", BASELINES)
def test_every_named_baseline_keeps_shape_dtype_and_device(name):
    reference = BASELINES[name]()(jax.device_put(IMAGE, jax.devices()[1]))
    assert (reference.shape, reference.dtype) == (IMAGE.shape, IMAGE.dtype)
    assert reference.devices() == {jax.devices()[1]}
    assert np.isfinite(reference).all()


@pytest.mark.parametrize("name", BASELINES)
def test_the_image_is_left_alone_and_gives_the_same_twice(name):
    before = np.array(IMAGE)
    baseline = BASELINES[name]()
    np.testing.assert_array_equal(baseline(IMAGE), baseline(IMAGE))
    np.testing.assert_array_equal(IMAGE, before)


def test_zero_is_zero():
    np.testing.assert_array_equal(zero()(IMAGE), np.zeros(IMAGE.shape))


def test_blur_is_the_sampled_gaussian_of_each_channel():
    sigma = np.array([0.8, 1.1, 1.5])
    axes = [stats.norm.pdf(np.arange(13) - 6, scale=s) for s in sigma]
    expected = np.einsum("i,j,k->ijk", *(a / a.sum() for a in axes))
    image = jnp.zeros((13, 13, 13, 2)).at[6, 6, 6].set(jnp.array([1.0, -2.0]))
    found = blur(sigma.tolist())(image)
    # the kernel ends at 4σ, beyond which it is 3e-4 of its middle
    np.testing.assert_allclose(found, expected[..., None] * [1, -2], atol=1e-3 * expected.max())
    np.testing.assert_allclose(found.sum((0, 1, 2)), [1, -2], rtol=1e-3)


def test_blur_repeats_the_outermost_voxels():
    ramp = jnp.zeros((6, 1, 1, 1)).at[:, 0, 0, 0].set(jnp.arange(6.0))
    padded = ndimage.gaussian_filter1d(np.pad(np.arange(6.0), 20, mode="edge"), 1.5)[20:-20]
    np.testing.assert_allclose(blur(1.5)(ramp)[:, 0, 0, 0], padded, rtol=1e-6)
    np.testing.assert_allclose(blur(3.0)(jnp.full((3, 3, 3, 1), 2.0)), np.full((3, 3, 3, 1), 2.0), rtol=1e-6)


def test_an_axis_without_blur_keeps_its_slices_apart():
    image = jnp.zeros((5, 5, 3, 1)).at[2, 2, 1].set(1.0)
    assert np.flatnonzero(np.asarray(blur((1.0, 1.0, 0.0))(image)).sum((0, 1, 3))).tolist() == [1]


def test_a_ball_loses_half_its_contrast_at_the_documented_sigma():
    radius = 8.0
    distance = np.linalg.norm(np.indices((49, 49, 49)) - 24, axis=0)
    ball = jnp.asarray((distance < radius)[..., None], jnp.float32)
    # a ball of voxels is not quite a ball
    assert float(blur(0.65 * radius)(ball)[24, 24, 24, 0]) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("sigma", [0, -1, (1, 2), (0, 0, 0), (1, -1, 1), float("nan")])
def test_what_is_no_sigma(sigma):
    with pytest.raises(ValueError, match="sigma_voxels is"):
        blur(sigma)


def test_given_is_what_was_given_even_if_it_changes_later():
    array = np.full(IMAGE.shape, 2.0)
    baseline = given(array)
    array[:] = 7
    found = baseline(IMAGE)
    assert found.dtype == IMAGE.dtype
    np.testing.assert_array_equal(found, np.full(IMAGE.shape, 2.0))


def test_given_on_another_grid_or_not_finite():
    with pytest.raises(ValueError, match=r"has shape \(6, 5, 7, 1\), the image \(6, 5, 7, 2\)"):
        given(np.zeros((6, 5, 7, 1)))(IMAGE)
    with pytest.raises(ValueError, match="not finite"):
        given(np.full(IMAGE.shape, np.nan))


def test_white_matter_of_the_phantom_is_the_phantoms_own(brain):
    image, drawn = brain
    found = normal_appearing_white_matter(exclude=drawn.lesions)(jnp.asarray(image))
    white = image[(drawn.tissue == 3) & (drawn.lesions == 0)]
    # in units of the image's standard deviation; the tissue's own is about 0.3
    np.testing.assert_allclose(constant(found), np.median(white, axis=0), atol=0.1)
    outside = (image == 0).all(-1)
    np.testing.assert_array_equal((np.asarray(found) == 0).all(-1), outside)


def test_lesions_hardly_move_the_median(brain):
    """The reference does not depend on the instances; that they are in it may be neglected."""
    image, drawn = brain
    white = (drawn.tissue == 3) & (drawn.lesions == 0)
    load = (drawn.lesions > 0).sum() / white.sum()
    assert 0.001 < load < 0.05
    apart = constant(normal_appearing_white_matter(exclude=drawn.lesions)(jnp.asarray(image)))
    together = constant(normal_appearing_white_matter()(jnp.asarray(image)))
    np.testing.assert_allclose(together, apart, atol=0.07 * image[white].std(0).max())


def test_what_is_excluded_counts_with_a_margin_of_two_voxels():
    """Half of the brightest class is a lesion with a rim: without exclusion it moves the constant, with it it does not."""
    rng = np.random.default_rng(0)
    t1w = np.repeat([-1.0, 0.0, 1.0], [400, 400, 800])[:, None] + rng.normal(0, 0.05, (1600, 1))
    volume = np.zeros((20, 20, 20, 2), np.float32)
    volume[2:18, 5:15, 5:15, 1] = t1w.reshape(16, 10, 10)
    volume[2:18, 5:15, 5:15, 0] = 0.5
    lesion = np.zeros((20, 20, 20), bool)
    lesion[14:18, 5:15, 5:15] = True
    # 12 and 13 are its rim: of eight layers of white matter, six are bright in FLAIR
    volume[12:18, 5:15, 5:15, 0] = 3
    image = jnp.asarray(volume)
    assert constant(normal_appearing_white_matter()(image))[0] == 3
    assert constant(normal_appearing_white_matter(exclude=lesion)(image))[0] == 0.5
    assert constant(normal_appearing_white_matter(exclude=lesion * 4)(image))[0] == 0.5


def test_bright_outliers_make_no_class_of_their_own(brain):
    image, _ = brain
    vessels = image.copy()
    inside = np.argwhere((image != 0).all(-1))
    chosen = np.random.default_rng(1).choice(len(inside), len(inside) // 200, replace=False)
    vessels[(*inside[chosen].T, 1)] = 40
    plain = constant(normal_appearing_white_matter()(jnp.asarray(image)))
    np.testing.assert_allclose(constant(normal_appearing_white_matter()(jnp.asarray(vessels))), plain, atol=0.03)


def test_t1w_may_be_another_channel(brain):
    image, _ = brain
    swapped = normal_appearing_white_matter(t1w_channel=0)(jnp.asarray(image[..., ::-1]))
    np.testing.assert_array_equal(swapped[..., ::-1], normal_appearing_white_matter()(jnp.asarray(image)))


def test_tissue_is_what_all_channels_show(brain):
    """FLAIR that ends early: its zeros are no tissue, but the brain is filled as far as any channel goes."""
    image, _ = brain
    cut = image.copy()
    cut[:, :, :28, 0] = 0
    cut[..., 0] += np.where(cut[..., 0] != 0, 2, 0)  # zero is far from the tissue
    found = normal_appearing_white_matter()(jnp.asarray(cut))
    assert constant(found)[0] > 1.5
    np.testing.assert_array_equal((np.asarray(found) != 0).any(-1), (cut != 0).any(-1))


def test_a_noisy_background_needs_a_mask(brain):
    image, _ = brain
    noisy = image + np.float32(0.01)
    with pytest.raises(ValueError, match="no voxel of the image is exactly 0 in all channels"):
        normal_appearing_white_matter()(jnp.asarray(noisy))
    mask = (image != 0).any(-1)
    found = normal_appearing_white_matter(brain=mask)(jnp.asarray(noisy))
    plain = normal_appearing_white_matter()(jnp.asarray(image))
    np.testing.assert_allclose(found[mask], plain[mask] + 0.01, atol=1e-5)
    assert not np.asarray(found)[~mask].any()


def test_images_without_white_matter():
    with pytest.raises(ValueError, match="t1w_channel is 1, but the image has 1 channels"):
        normal_appearing_white_matter()(IMAGE[..., :1])
    with pytest.raises(ValueError, match="t1w_channel is -1"):
        normal_appearing_white_matter(t1w_channel=-1)(IMAGE)
    for nothing in (jnp.zeros((4, 4, 4, 2)), jnp.zeros((4, 4, 4, 2)).at[1:].set(1.0)):
        with pytest.raises(ValueError, match="fewer than 3 intensities"):
            normal_appearing_white_matter()(nothing)
    with pytest.raises(ValueError, match=r"exclude has shape \(2, 2, 2\)"):
        normal_appearing_white_matter(exclude=np.zeros((2, 2, 2)))(IMAGE)
    with pytest.raises(ValueError, match=r"brain has shape \(2, 2, 2\)"):
        normal_appearing_white_matter(brain=np.ones((2, 2, 2)))(IMAGE)


def test_a_baseline_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"of an image \(6, 5, 7, 2\) has shape \(6, 5, 7, 1\)"):
        reference_image(lambda image: image[..., :1], IMAGE)
