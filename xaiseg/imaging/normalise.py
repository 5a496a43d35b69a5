"""Intensity normalisation."""

import numpy as np

from xaiseg.errors import InputError


def zscore_nonzero(volume: np.ndarray, name: str) -> np.ndarray:
    """Standardise the non-zero voxels of a brain-extracted image; zero voxels, the background, stay zero.

    The same as MONAI's `NormalizeIntensity(nonzero=True)`: population standard deviation, over all voxels that differ
    from zero, negative ones included. Sums are taken in float64.

    Args:
        volume: (X, Y, Z), any real dtype.
        name: what messages call the image, its path.

    Returns:
        (X, Y, Z) float32.

    Raises:
        InputError: no voxel differs from zero, or all that do have one value.
    """
    inside = volume != 0
    values = volume[inside].astype(np.float64)
    if values.size == 0:
        raise InputError(f"{name}: all voxels are zero; expected an image with a brain in it, give the right file")
    # Not std == 0: the rounded mean of equal values need not equal them.
    if values.min() == values.max():
        raise InputError(
            f"{name}: every non-zero voxel is {values[0]:g}, so intensities cannot be standardised; "
            "expected an image, not a mask: give the right file"
        )
    out = np.zeros(volume.shape, np.float32)
    out[inside] = (values - values.mean()) / values.std()
    return out
