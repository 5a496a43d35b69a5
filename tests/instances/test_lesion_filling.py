"""Filling does not depend on an image's scale: what holds for raw intensities holds for z-scores."""

import numpy as np
import pytest
from scipy import ndimage

from xaiseg.errors import InputError
from xaiseg.instances.lesion_filling import fill

SHAPE = (28, 30, 26)


@pytest.fixture(scope="module")
def scan():
    """White matter with a course and noise, a lesion, fluid beside it, background; the lesion's mask, the white matter."""
    rng = np.random.default_rng(0)
    x = np.indices(SHAPE)[0][..., None]
    image = 100 + x + 4 * rng.standard_normal((*SHAPE, 2))
    distance = np.linalg.norm(np.indices(SHAPE).transpose(1, 2, 3, 0) - (12, 14, 13), axis=-1)
    lesion = distance <= 3
    image[lesion] += (60, -40)
    fluid = np.zeros(SHAPE, bool)
    fluid[17:20, 10:18, 10:16] = True
    image[fluid] -= 120
    image[:, :3] = 0
    white = ndimage.minimum_filter((image != 0).all(-1), 3) & ~ndimage.binary_dilation(lesion | fluid, iterations=2)
    return image.astype(np.float32), lesion, fluid, white


def test_z_scores_are_filled_as_raw_intensities_are(scan):
    image, lesion, _, white = scan
    brain = (image != 0).all(-1)
    mean, spread = image[brain].mean(0), image[brain].std(0)
    standard = np.where(brain[..., None], (image - mean) / spread, 0).astype(np.float32)
    raw, scored = (fill(np.random.default_rng(3), one, lesion, white) for one in (image, standard))
    assert (raw != image).any(-1).sum() > lesion.sum()
    # float32 of intensities of order 100 in spreads of 12
    np.testing.assert_allclose(scored[brain], ((raw - mean) / spread)[brain], atol=2e-4)
    assert (scored[~brain] == 0).all()


def test_what_is_filled_looks_like_the_white_matter_around(scan):
    image, lesion, fluid, white = scan
    out = fill(np.random.default_rng(3), image, lesion, white)
    course = np.indices(SHAPE)[0][lesion]
    residual = out[lesion] - 100 - course[:, None]
    assert np.abs(residual.mean(0)).max() < 1.5  # 4 / √(number of voxels) for the noise, as much for the course
    np.testing.assert_allclose(residual.std(0), 4, rtol=0.3)
    assert (out[fluid] == image[fluid]).all()
    far = ndimage.distance_transform_edt(~lesion) > 6
    assert (out[far] == image[far]).all()


def test_nothing_to_fill_from(scan):
    image, lesion, _, white = scan
    with pytest.raises(InputError, match="no voxel of white matter"):
        fill(np.random.default_rng(0), image, lesion, np.zeros_like(white))
    with pytest.raises(InputError, match="the channels are T2w, PD"):
        fill(np.random.default_rng(0), image, lesion, white, ("T2w", "PD"))
