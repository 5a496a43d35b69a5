"""Standardisation over the non-zero voxels."""

import numpy as np
import pytest

from xaiseg.errors import InputError
from xaiseg.imaging.normalise import zscore_nonzero


def brain() -> np.ndarray:
    """Background of zeros, a bright brain far from zero, some negative voxels."""
    rng = np.random.default_rng(0)
    volume = np.zeros((12, 13, 14), np.float32)
    volume[2:10, 3:11, 2:12] = rng.normal(3000, 5, (8, 8, 10))
    volume[2, 3, 2:5] = -0.5
    return volume


def test_against_numpy() -> None:
    volume = brain()
    out = zscore_nonzero(volume, "scan.nii.gz")
    assert out.dtype == np.float32
    values = volume[volume != 0].astype(np.longdouble)
    mean = values.sum() / values.size
    sd = np.sqrt(((values - mean) ** 2).sum() / values.size)
    # float32 rounding of the result, at most 25 in size here
    np.testing.assert_allclose(out[volume != 0], ((values - mean) / sd).astype(np.float64), rtol=2e-7, atol=1e-9)
    assert not out[volume == 0].any()


@pytest.mark.parity
def test_against_monai() -> None:
    transforms = pytest.importorskip("monai.transforms")
    volume = brain()
    oracle = transforms.NormalizeIntensity(nonzero=True)(volume.copy())
    # MONAI sums in float32: 1e-7 of a mean of 3000 over a standard deviation of about 200
    np.testing.assert_allclose(zscore_nonzero(volume, "scan"), np.asarray(oracle), rtol=1e-5, atol=1e-5)


def test_constant_image() -> None:
    volume = np.zeros((7, 6, 5))
    volume[1:6] = 0.1
    assert volume[1:6].std() > 0  # the rounded mean of equal values is not their value
    with pytest.raises(InputError, match=r"mask\.nii\.gz: every non-zero voxel is 0\.1"):
        zscore_nonzero(volume, "mask.nii.gz")


def test_empty_image() -> None:
    with pytest.raises(InputError, match=r"void\.nii\.gz: all voxels are zero"):
        zscore_nonzero(np.zeros((4, 4, 4), np.float32), "void.nii.gz")
