"""The sampler: pure, on the right places, and faithful to the voxels it copies."""

from dataclasses import replace

import numpy as np
import pytest

from training.config import Config
from training.patches import sample
from training.volumes import Volume, make_volume

PLAIN = {"flips": 0.0, "quarter_turns": 0.0, "affine": 0.0, "intensity": 0.0}


def volume(shape: tuple[int, int, int] = (20, 22, 24), lesion: bool = True) -> Volume:
    """Channel 0 holds each voxel's number from 1, so that a patch tells where it was cut; channel 1 its negative."""
    number = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    reference = np.zeros(shape, bool)
    reference[9:11, 10:12, 11:13] = lesion
    return make_volume("ramp", np.stack([number, -number], axis=-1), reference)


def test_a_batch_depends_on_seed_and_step_only(tiny: Config) -> None:
    volumes = [volume(), volume((9, 9, 9), lesion=False)]
    expected = sample(tiny, volumes, 7)
    sample(tiny, volumes, 3)
    for a, b in zip(sample(tiny, volumes, 7), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(sample(tiny, volumes, 8)[0], expected[0])
    assert not np.array_equal(sample(replace(tiny, seed=1), volumes, 7)[0], expected[0])
    assert not np.array_equal(expected[0][0], expected[0][1])
    assert expected[0].shape == (2, 8, 8, 8, 2)
    assert expected[1].shape == (2, 8, 8, 8)
    assert {a.dtype for a in expected} == {np.dtype(np.float32)}


@pytest.mark.parametrize("fraction", [0.0, 0.8, 1.0])
def test_positive_fraction(tiny: Config, fraction: float) -> None:
    shape = (64, 64, 64)
    reference = np.zeros(shape, bool)
    reference[32, 32, 32] = True
    one_voxel = make_volume("one", np.ones((*shape, 2), np.float32), reference)
    config = replace(tiny, batch=500, positive_fraction=fraction, **PLAIN)
    _, references = sample(config, [one_voxel], 0)
    # A patch cut elsewhere holds the lesion by chance in 8³ of 64³ places: 1 of 500. Binomial: 3 standard deviations are 0.054.
    assert abs(references.any(axis=(1, 2, 3)).mean() - fraction) <= 0.06


def test_patches_around_a_lesion_lie_off_centre_by_a_sixth_at_most(tiny: Config) -> None:
    shape = (64, 64, 64)
    reference = np.zeros(shape, bool)
    reference[32, 32, 32] = True
    one_voxel = make_volume("one", np.ones((*shape, 2), np.float32), reference)
    config = replace(tiny, patch=(12, 12, 12), batch=300, positive_fraction=1.0, **PLAIN)
    _, references = sample(config, [one_voxel], 0)
    assert sorted(set(np.argwhere(references)[:, 1].tolist())) == [4, 5, 6, 7, 8]


def test_negative_patches_lie_in_the_brain(tiny: Config) -> None:
    image = np.zeros((64, 64, 64, 2), np.float32)
    image[30, 31, 32] = 1.0
    point = make_volume("point", image, np.zeros((64, 64, 64), bool))
    images, _ = sample(replace(tiny, batch=20, **PLAIN), [point], 0)
    assert images.any(axis=(1, 2, 3, 4)).all()


def test_a_plain_patch_is_a_crop_within_the_volume(tiny: Config) -> None:
    ramp = volume()
    images, references = sample(replace(tiny, batch=50, positive_fraction=0.3, **PLAIN), [ramp], 0)
    for image, reference in zip(images, references, strict=True):
        start = np.unravel_index(int(image[0, 0, 0, 0]) - 1, ramp.reference.shape)
        where = tuple(slice(s, s + 8) for s in start)
        np.testing.assert_array_equal(image, ramp.image[where])
        np.testing.assert_array_equal(reference, ramp.reference[where])


def test_a_small_volume_is_padded_as_the_prediction_pads_it(tiny: Config) -> None:
    small = volume((5, 8, 7), lesion=False)
    images, _ = sample(replace(tiny, **PLAIN), [small], 0)
    np.testing.assert_array_equal(images[0], np.pad(small.image, [(1, 2), (0, 0), (0, 1), (0, 0)]))


@pytest.mark.parametrize("kind", ["flips", "quarter_turns"])
def test_turns_keep_image_and_reference_together(tiny: Config, kind: str) -> None:
    ramp = volume()
    config = replace(tiny, batch=16, positive_fraction=1.0, **(PLAIN | {kind: 1.0}))
    images, references = sample(config, [ramp], 0)
    plain, _ = sample(replace(config, **PLAIN), [ramp], 0)
    assert not np.array_equal(images, plain)
    for image, reference in zip(images, references, strict=True):
        numbers = image[..., 0].astype(int) - 1
        np.testing.assert_array_equal(reference > 0, ramp.reference.ravel()[numbers])


def test_intensity_is_one_affine_change_of_all_channels(tiny: Config) -> None:
    config = replace(tiny, batch=200, positive_fraction=1.0, **(PLAIN | {"intensity": 1.0}))
    rng = np.random.default_rng(0)
    noise = make_volume("noise", rng.normal(size=(8, 8, 8, 2)).astype(np.float32), np.zeros((8, 8, 8), bool))
    images, _ = sample(config, [noise], 0)
    slopes, shifts = zip(*(np.polyfit(noise.image.ravel(), image.ravel(), 1) for image in images), strict=True)
    residual = np.abs(images[0] - (slopes[0] * noise.image + shifts[0])).max()
    assert residual < 1e-5
    assert 0.9 <= min(slopes) < 0.92 < 1.08 < max(slopes) <= 1.1
    assert -0.11 <= min(shifts) < -0.09 < 0.09 < max(shifts) <= 0.11


def test_affine_moves_little_and_keeps_the_mask_on_the_lesion(tiny: Config) -> None:
    shape = (32, 32, 32)
    reference = np.zeros(shape, bool)
    reference[12:21, 13:20, 14:22] = True
    bright = make_volume("bright", np.stack([reference, reference], -1).astype(np.float32), reference)
    config = replace(tiny, patch=shape, batch=8, **(PLAIN | {"affine": 1.0}))
    images, references = sample(config, [bright], 0)
    for image, mask in zip(images, references > 0, strict=True):
        assert not np.array_equal(mask, reference)
        assert 0.9**3 * 0.95 < reference.sum() / mask.sum() < 1.1**3 * 1.05  # 5 %: voxels of the border
        # Linear and nearest interpolation of one mask differ by less than half.
        assert ((image[..., 0] > 0.51) <= mask).mean() > 0.995
