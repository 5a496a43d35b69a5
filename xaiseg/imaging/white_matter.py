"""Where white matter looks normal, from FLAIR and T1w alone: places for synthetic lesions, and what fills real ones.

Tissue is told by T1w intensity and by FLAIR, after the white matter's own slow variation (bias field, coil) is taken out. No
atlas, no registration, no other program.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from xaiseg.errors import InputError

_CLASSES = 3  # fluid, grey, white
_ODDS = 20.0  # of white to grey matter: a missed place costs nothing, one in grey matter a wrong example
_SMOOTH = 0.8  # σ of the blur before intensities are judged: it halves the noise and leaves structures of three voxels
_MARGIN = 2  # around a lesion: its penumbra
_BORDER = 3  # from the background: brain extraction leaves meninges and a dark rim there
_SPREAD = 3.0  # standard deviations of white matter, on FLAIR and upwards on T1w, that are still normal
_DENSITY = 0.45  # of the 5³ voxels around it that must be white with it: at less it is a thin gyral blade or a speck
_BIAS_STEP, _BIAS_SIGMA = 4, 6.0  # the slow variation is seen on every 4th voxel with a σ of 24 voxels
_FLUID_DEPTH = 15  # from the background: fluid deeper than this is in ventricles, nearer to it in sulci
_FLUID_DROP = 4.0  # standard deviations of white matter that fluid is darker on FLAIR
_NEAR = 5  # from the wall of a ventricle
_FEW = 100  # voxels that no white matter can be told from


class WhiteMatter(NamedTuple):
    """mask: `(X, Y, Z)` bool, normal-appearing white matter. near_ventricles: those of its voxels within 5 of a ventricle."""

    mask: np.ndarray
    near_ventricles: np.ndarray


def channel_of(channels: Sequence[str], name: str) -> int:
    """The place of a channel by its name, upper or lower case. Raises InputError where it is not among them."""
    found = [channel.lower() for channel in channels]
    if name.lower() not in found:
        raise InputError(
            f"white matter: the channels are {', '.join(channels) or 'none'}, expected FLAIR and T1w among them: "
            "give scans that have both"
        )
    return found.index(name.lower())


def white_matter(image: np.ndarray, reference: np.ndarray, channels: Sequence[str] = ("FLAIR", "T1w")) -> WhiteMatter:
    """Normal-appearing white matter of a brain-extracted scan; all lengths are in voxels.

    White matter is the brightest of three Gaussian classes of T1w, within three robust standard deviations of its median on
    FLAIR, with neighbours of its kind, 3 voxels or more inside the brain and 3 or more from lesions.

    image: `(X, Y, Z, C)`, any affine scale per channel, 0 outside the brain. A crop will do: its faces are no border of the
    brain.
    reference: `(X, Y, Z)` lesions.

    Limits: deep grey matter and brain stem are partly taken for white; lesions that the reference misses are left out only where
    they are bright on FLAIR. Raises InputError where FLAIR or T1w is missing or fewer than 100 voxels of white matter are found.
    """
    flair, t1w = channel_of(channels, "FLAIR"), channel_of(channels, "T1w")
    brain = (image[..., flair] != 0) & (image[..., t1w] != 0)
    if brain.sum() < _FEW:
        raise _none_found(int(brain.sum()), "brain")
    box = ndimage.find_objects(brain.view(np.uint8))[0]
    brain = brain[box]
    tissue = brain & ~_dilated(reference[box], _MARGIN)
    if tissue.sum() < _FEW:
        raise _none_found(int(tissue.sum()), "brain outside lesions")
    share = ndimage.gaussian_filter(brain.astype(np.float32), _SMOOTH)
    t1, fl = (
        np.divide(
            ndimage.gaussian_filter(image[box][..., c].astype(np.float32), _SMOOTH), share, out=share * 0, where=brain
        )
        for c in (t1w, flair)
    )
    mask = tissue
    # the first round finds the bias field, the second the tissue without it
    for final in (False, True):
        fluid_below, white_above = _borders(t1[tissue])
        mask = tissue & (t1 > white_above)
        if mask.sum() < _FEW:
            raise _none_found(int(mask.sum()), "white matter on T1w")
        mask &= _within(t1, mask, upper_only=True) & _within(fl, mask)
        if not final:
            t1 -= _slow_variation(t1, mask)
            fl -= _slow_variation(fl, mask)
    density = ndimage.uniform_filter(mask.astype(np.float32), 5)
    # a majority vote closes the holes that noise leaves
    mask = tissue & (density > _DENSITY) & (ndimage.uniform_filter(mask.astype(np.float32), 3) > 0.5)
    mask &= ndimage.minimum_filter(brain.view(np.uint8), 2 * _BORDER + 1).view(bool)
    if mask.sum() < _FEW:
        raise _none_found(int(mask.sum()), "white matter")
    fluid = (t1 < fluid_below) & (fl < _dark(fl, mask)) & _deep(brain)
    core = ndimage.minimum_filter(fluid.view(np.uint8), 3)
    near = mask & _dilated(core, 1 + _NEAR)
    whole, whole_near = np.zeros(image.shape[:3], bool), np.zeros(image.shape[:3], bool)
    whole[box], whole_near[box] = mask, near
    return WhiteMatter(whole, whole_near)


def _none_found(count: int, what: str) -> InputError:
    return InputError(
        f"white matter: {count} voxels of {what} were found, expected at least {_FEW}: give a brain-extracted scan whose "
        "T1w is brightest in white matter"
    )


def _dilated(mask: np.ndarray, reach: int) -> np.ndarray:
    """All voxels within `reach` along every axis: a cube, for speed."""
    return ndimage.maximum_filter(mask.astype(np.uint8), 2 * reach + 1, mode="constant").view(bool)


def _within(values: np.ndarray, mask: np.ndarray, upper_only: bool = False) -> np.ndarray:
    """Where values are within `_SPREAD` robust standard deviations of their median over the mask."""
    middle, spread = robust(values[mask])
    upper = values < middle + _SPREAD * spread
    return upper if upper_only else upper & (values > middle - _SPREAD * spread)


def robust(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and 1.4826 times the median absolute deviation, a Gaussian's standard deviation, over the first axis."""
    middle = np.median(values, axis=0)
    return middle, 1.4826 * np.median(np.abs(values - middle), axis=0)


def _dark(flair: np.ndarray, mask: np.ndarray) -> float:
    """What only suppressed fluid is darker than: `_FLUID_DROP` spreads below white matter."""
    middle, spread = robust(flair[mask])
    return float(middle - _FLUID_DROP * spread)


def _slow_variation(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The local mean over the mask minus its median, on the grid of `values`; half-way to none where the mask is rare."""
    thin = (slice(None, None, _BIAS_STEP),) * 3
    some = mask[thin].astype(np.float32)
    middle = np.median(values[mask])
    weight = ndimage.gaussian_filter(some, _BIAS_SIGMA, mode="constant")
    total = ndimage.gaussian_filter(some * (values[thin] - middle), _BIAS_SIGMA, mode="constant")
    return upsampled(total / (weight + 0.01), values.shape, _BIAS_STEP)


def upsampled(values: np.ndarray, shape: Sequence[int], step: int) -> np.ndarray:
    """What was taken at every `step`-th voxel of the first three axes, on a whole grid of this shape, linearly."""
    for axis, n in enumerate(shape[:3] if step > 1 else ()):
        places = np.minimum(np.arange(n) / step, values.shape[axis] - 1)
        low = places.astype(int)
        high = np.minimum(low + 1, values.shape[axis] - 1)
        part = (places - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        values = values.take(low, axis) * (1 - part) + values.take(high, axis) * part
    return values


def _deep(brain: np.ndarray) -> np.ndarray:
    """Voxels farther than `_FLUID_DEPTH` from the background, by every 4th voxel; the array's faces are no background."""
    step = 4
    some = brain[::step, ::step, ::step]
    if some.all():
        return np.ones_like(brain)
    deep = ndimage.distance_transform_edt(some, sampling=step) > _FLUID_DEPTH
    for axis, n in enumerate(brain.shape):
        deep = deep.repeat(step, axis).take(np.arange(n), axis)
    return deep


def _borders(intensities: np.ndarray) -> tuple[float, float]:
    """Where grey matter is as likely as fluid, and white matter `_ODDS` times as likely as grey: three Gaussians fitted by EM to
    a histogram.

    Grey and white matter share one spread, so that neither becomes a broad class under the other, and vessels and remains of the
    skull above the 99th percentile have no say.
    """
    low, high = np.quantile(intensities, [0.01, 0.99])
    counts, edges = np.histogram(intensities, 256, (low, high))
    x = (edges[1:] + edges[:-1]) / 2
    cumulative = counts.cumsum() / counts.sum()
    means = np.interp((np.arange(_CLASSES) + 0.5) / _CLASSES, cumulative, x)
    spreads = np.full(_CLASSES, (high - low) / 8)
    weights = np.full(_CLASSES, 1 / _CLASSES)
    for _ in range(200):
        densities = weights / spreads * np.exp(-0.5 * ((x[:, None] - means) / spreads) ** 2) + 1e-300
        shares = counts[:, None] * densities / densities.sum(1, keepdims=True)
        total = shares.sum(0) + 1e-9
        moved = (shares * x[:, None]).sum(0) / total
        settled = np.abs(moved - means).max() < 1e-4 * (high - low)
        means, weights = moved, total / total.sum()
        squares = (shares * (x[:, None] - means) ** 2).sum(0)
        tissue = np.argsort(means)[1:]
        squares[tissue], total[tissue] = squares[tissue].sum(), total[tissue].sum()
        spreads = np.maximum(np.sqrt(squares / total), (high - low) / 128)  # no class narrower than two bins
        if settled:
            break
    order = np.argsort(means)
    return _crossing(x, densities, means, order[0], order[1], 1.0), _crossing(
        x, densities, means, order[1], order[2], _ODDS
    )


def _crossing(x: np.ndarray, densities: np.ndarray, means: np.ndarray, below: int, above: int, odds: float) -> float:
    between = (x > means[below]) & (x < means[above])
    passed = between & (densities[:, above] >= odds * densities[:, below])
    return float(x[passed].min()) if passed.any() else float((means[below] + means[above]) / 2)
