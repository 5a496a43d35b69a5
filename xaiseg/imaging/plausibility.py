"""What can be computed but looks wrong: swapped channels, one image given twice, no brain or more than a brain."""

import re
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from scipy import ndimage

from xaiseg.imaging.case import Case

_FLAIR, _T1W = {"FLAIR"}, {"T1W", "T1"}  # channels, in upper case
# Words of a file's name that speak for a sequence; and what may stand anywhere in a name that is not in doubt.
_WORDS = {"FLAIR": {"FLAIR"}, "T1w": {"T1W", "T1", "MPRAGE"}}
_TRACES = {"FLAIR": re.compile("FLAIR"), "T1w": re.compile(r"T1(?!\d)|MPRAGE")}
_LEAST, _MOST = 0.01, 0.9  # of the voxels are not zero; an ellipsoid fills 0.52 of its box, a slice of one 0.79
_SAME = 1e-4  # standard deviations; one image stored with another scaling differs by its rounding
_SAMPLES = 48  # voxels along an axis
_SMALLEST = 16, 5000  # samples of the brain along an axis and in all, below which there is no telling rim from depth
_DARK = 0.3  # of the brain, in either image: CSF and what it blurs into
_RIM, _DEEP = 0.2, 0.5  # the outer fifth, mostly cortex, and the inner half, mostly white matter
_SWAPPED = -0.4  # standard deviations: real scans and phantoms have 0.6 to 2.2, with channels swapped -2.2 to -0.6


def warnings(case: Case, image: np.ndarray, channels: Sequence[str], zero_is_background: bool = True) -> list[str]:
    """What looks wrong with a scan that can be computed.

    Args:
        image: (X, Y, Z, C), normalised, `Scan.image`.
        channels: of `image`.
        zero_is_background: its zero voxels are the background. So they are for z-scores over the non-zero voxels, but not
            for nnU-Net's preprocessing (`Scan.prepared`): then only names and voxels that are the same are looked at.

    Returns:
        One line each, which names a file; none for a usual scan.
    """
    found = [*_names(case, channels), *_same(case, image, channels)]
    if zero_is_background:
        amounts = list(_amounts(case, image, channels))
        found += amounts or _contrasts(case, image, channels)
    return found


def contrast(flair: np.ndarray, t1w: np.ndarray) -> float | None:
    """How much more a T1w image brightens from the rim of the brain to its depth than a FLAIR image does.

    White matter is brighter than cortex in T1w and not in FLAIR. Both images are sampled on at most 48 voxels along an axis,
    without the voxels that are among the darkest 30 % of the brain in either; rim is the outer fifth of the others, depth the
    inner half, by the distance from the border of the brain relative to its size. The change of an image is the difference of
    the medians of the two, in standard deviations.

    Args:
        flair, t1w: (X, Y, Z), zero outside the brain.

    Returns:
        Change of T1w less that of FLAIR, so that swapped images have the opposite sign; None where the brain is too small.
    """
    steps = tuple(slice(None, None, -(-n // _SAMPLES)) for n in flair.shape)
    pair = np.stack([flair[steps], t1w[steps]], axis=-1)
    inside = (pair != 0).all(axis=-1)
    if inside.sum() < _SMALLEST[1]:
        return None
    box = ndimage.find_objects(inside.astype(np.uint8))[0]
    pair, inside = pair[box], inside[box]
    if min(inside.shape) < _SMALLEST[0]:
        return None
    # Relative to the brain's size along each axis: slices may be thick, and the spacing is not known here.
    depth = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=[1 / n for n in inside.shape])[1:-1, 1:-1, 1:-1]
    values, depth = pair[inside], depth[inside]
    bright = (values > np.quantile(values, _DARK, axis=0)).all(axis=-1)
    values, depth = values[bright], depth[bright]
    order = np.argsort(depth, kind="stable")
    rim, deep = values[order[: int(_RIM * order.size)]], values[order[int(_DEEP * order.size) :]]
    spread = values.std(axis=0)
    if not len(rim) or not spread.all():
        return None
    change = (np.median(deep, axis=0) - np.median(rim, axis=0)) / spread
    return float(change[1] - change[0])


def _names(case: Case, channels: Sequence[str]) -> Iterator[str]:
    for channel in channels:
        if not (own := _sequence(channel)):
            continue
        other = "T1w" if own == "FLAIR" else "FLAIR"
        name = case.images[channel].name.upper()
        words = set(re.split(r"[\W_]+", name))
        if words & _WORDS[other] and not _TRACES[own].search(name):
            yield (
                f"{case.images[channel]}: named like a {other} image, given for channel {channel}; "
                f"expected a {own} image: check that the channels are not swapped"
            )


def _same(case: Case, image: np.ndarray, channels: Sequence[str]) -> Iterator[str]:
    sample = _sampled(image)
    for (i, first), (j, second) in combinations(enumerate(channels), 2):
        # A look at few voxels first, since nearly all pairs differ in them.
        if all(np.abs(a[..., i] - a[..., j]).max() <= _SAME for a in (sample, image)):
            yield (
                f"{case.images[second]}: the same voxels as {case.images[first]}, given for the channels {second} and {first}; "
                "expected an image for each: check the files"
            )


def _amounts(case: Case, image: np.ndarray, channels: Sequence[str]) -> Iterator[str]:
    shares = np.count_nonzero(_sampled(image), axis=(0, 1, 2)) / _sampled(image)[..., 0].size
    for channel, share in zip(channels, shares, strict=True):
        if share < _LEAST:
            found, remedy = "a brain", "check that it is the right file"
        elif share > _MOST:
            found, remedy = "zeros around a brain", "extract the brain, as for the images that the model was trained on"
        else:
            continue
        yield f"{case.images[channel]}: {share:.1%} of the voxels are not zero; expected {found}: {remedy}"


def _contrasts(case: Case, image: np.ndarray, channels: Sequence[str]) -> list[str]:
    place = {_sequence(channel): index for index, channel in enumerate(channels)}
    if "FLAIR" not in place or "T1w" not in place:
        return []
    found = contrast(image[..., place["FLAIR"]], image[..., place["T1w"]])
    if found is None or found > _SWAPPED:
        return []
    flair, t1w = (case.images[channels[place[sequence]]] for sequence in ("FLAIR", "T1w"))
    return [
        f"{flair}: looks like T1w, and {t1w} like FLAIR: from rim to depth, the first brightens by {-found:.1f} standard "
        "deviations more; expected less: check that the channels are not swapped"
    ]


def _sequence(channel: str) -> str | None:
    upper = channel.upper()
    return "FLAIR" if upper in _FLAIR else "T1w" if upper in _T1W else None


def _sampled(image: np.ndarray) -> np.ndarray:
    return image[tuple(slice(None, None, -(-n // _SAMPLES)) for n in image.shape[:3])]
