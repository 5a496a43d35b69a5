"""Lesions put into scans, and taken out of them, where few scans are at hand: more places, shapes and numbers than were seen.

Lesions come from a bank of the training scans' own, turned, scaled and made stronger or weaker, and go where white matter looks
normal. It is a poor man's variety: places are white matter wherever it is, not where disease prefers to be, but for the
ventricles; no lesion is larger than the bank's; neighbours, atrophy and diffuse change do not come along. Mix it with real
scans, and validate on real ones only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from training.lesion_bank import BankLesion, LesionBank
from training.volumes import Volume, make_volume
from xaiseg.errors import InputError
from xaiseg.imaging.white_matter import WhiteMatter, robust, white_matter
from xaiseg.instances import label_components
from xaiseg.instances.lesion_filling import EDGE, drawn, edge_weight, fill, grown, local, numbered, texture_of

UNITS = ("tissue", "image")
_PLACES = 64  # tried at once for one lesion
_DRAWS = 30  # of a lesion from the bank, until one fits somewhere


@dataclass(frozen=True)
class Settings:
    """What is drawn, each time anew. Lengths and sizes are in voxels; a pair is the least and the largest value.

    probability: that a volume is changed at all.
    lesions: how many are put in, log-uniform, so that few are more frequent than many. Fewer where they do not fit.
    size: of a lesion put in.
    scale: of its sides, log-uniform, on all axes alike.
    contrast: factor on the contrast with white matter, one per lesion, uniform.
    unit: what the contrast is kept in from scan to scan: `tissue`, standard deviations of the white matter nearby, or `image`,
      the intensities themselves, which are standard deviations of the whole brain where the scans are z-scored.
    texture: of a lesion, over the tissue's own noise, which stays: standard deviation as a share of the white matter's.
    white_fraction: of a lesion's shape that must lie in white matter; the rest is cut off.
    gap: between a lesion put in and any other.
    periventricular: the share of lesions whose middle lies within 5 of a ventricle, where one is found.
    filled: the share of existing lesions that are filled first; their places are then free.
    """

    probability: float = 0.5
    lesions: tuple[int, int] = (1, 12)
    size: tuple[int, int] = (5, 3000)
    scale: tuple[float, float] = (0.75, 1.25)
    contrast: tuple[float, float] = (0.6, 1.1)
    unit: str = "tissue"
    texture: float = 0.3
    white_fraction: float = 0.9
    gap: int = 3
    periventricular: float = 0.5
    filled: float = 0.2

    def __post_init__(self) -> None:
        """Raises InputError that names the first setting whose value cannot be."""
        shares = ("probability", "white_fraction", "periventricular", "filled")
        rules = [(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1") for name in shares]
        least = {"lesions": 0, "size": 1, "scale": 0.5, "contrast": 0.0}
        for name, low in least.items():
            pair = getattr(self, name)
            rules.append((name, len(pair) == 2 and low <= pair[0] <= pair[1], f"two numbers from {low}, rising"))
        rules += [
            ("unit", self.unit in UNITS, " or ".join(UNITS)),
            ("texture", self.texture >= 0, "0 or more"),
            ("gap", self.gap >= 1, "1 or more, or lesions would merge"),
        ]
        for name, holds, expected in rules:
            if not holds:
                raise InputError(f"synthesis: {name} is {getattr(self, name)}, expected {expected}: correct it")


def synthesise(
    seed: int | Sequence[int],
    volume: Volume,
    bank: LesionBank,
    settings: Settings | None = None,
    white: WhiteMatter | None = None,
) -> Volume:
    """The volume with some of its lesions filled and others put in, as `settings` draw them; the same seed gives the same one.

    seed: for example (seed of the run, index of the item). volume: not changed; it may be memory-mapped. white: of this volume,
    from `white_matter`, to save its computation where a volume is used often.
    A volume that is left as it is comes back itself. Intensities are not normalised anew: what is put in is a small part of a
    brain.

    Raises InputError as `insert` does.
    """
    settings = settings or Settings()
    rng = np.random.default_rng(seed)
    if rng.random() >= settings.probability:
        return volume
    image, reference = np.asarray(volume.image), np.array(volume.reference)
    white = white or white_matter(image, reference, bank.channels)
    labels = numbered(reference)
    chosen = np.concatenate([[False], rng.random(labels.max()) < settings.filled])[labels]
    if chosen.any():
        image = fill(rng, image, chosen, white.mask, bank.channels)
        reference &= ~chosen
        white = white._replace(mask=white.mask | chosen)
    low, high = settings.lesions
    count = min(max(int(np.exp(rng.uniform(np.log(low + 1), np.log(high + 2)))) - 1, low), high)
    image, reference = insert(rng, image, reference, bank, count=count, settings=settings, white=white)
    return make_volume(volume.name, image, reference)


def insert(
    rng: Generator,
    image: np.ndarray,
    reference: np.ndarray,
    bank: LesionBank,
    *,
    count: int | None = None,
    voxels: int | None = None,
    settings: Settings | None = None,
    white: WhiteMatter | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The image and reference with lesions of the bank put into white matter: `(X, Y, Z, C)` float32, `(X, Y, Z)` bool.

    count, voxels: how many lesions, or until how many voxels of them; one of the two. Fewer where no more fit.
    white: where they may go; of this image, from `white_matter`, if it is not given.

    A lesion adds `weight · (factor · contrast · sd + texture)` to the image, `sd` of the white matter nearby (1 by `unit`),
    `weight` 1 in its mask and 0 from 3 voxels beyond it. So the tissue's own noise, bias and edges go on through it. Voxels that
    are 0 stay 0.

    Raises InputError where the bank has no lesion of the size wanted, its channels are not the image's, or white matter is missing.
    """
    settings = settings or Settings()
    if (count is None) == (voxels is None):
        raise ValueError("give either count or voxels")
    if image.shape[-1] != len(bank.channels):
        raise InputError(
            f"synthesis: the image has {image.shape[-1]} channels, the lesion bank {', '.join(bank.channels)}; expected the same: "
            "build the bank from volumes of this training"
        )
    low, high = settings.size
    smallest, largest = (f**3 for f in settings.scale)
    fitting = [b for b in bank.lesions if low / largest <= b.mask.sum() <= high / smallest]
    if not fitting:
        raise InputError(
            f"synthesis: none of the bank's {len(bank.lesions)} lesions has {low} to {high} voxels when scaled, expected "
            "at least one: widen size, or give training cases with such lesions"
        )
    white = white or white_matter(image, reference, bank.channels)
    if not white.mask.any():
        raise InputError(
            "synthesis: the white matter given is empty, expected voxels to put lesions in: give another scan"
        )
    pools = np.flatnonzero(white.near_ventricles), np.flatnonzero(white.mask)
    out, taken = np.array(image, np.float32), np.array(reference, bool)
    done, added = 0, 0
    while (count is not None and done < count) or (voxels is not None and added < voxels):
        placed = _place(rng, fitting, taken, white.mask, pools, settings)
        if placed is None:
            break
        box, mask, contrast = placed
        _blend(rng, out, image, white.mask, box, mask, contrast, settings)
        taken[box] |= mask
        done, added = done + 1, added + int(mask.sum())
    return out, taken


Placed = tuple[tuple[slice, ...], np.ndarray, np.ndarray]


def _place(
    rng: Generator,
    lesions: Sequence[BankLesion],
    taken: np.ndarray,
    white: np.ndarray,
    pools: tuple[np.ndarray, np.ndarray],
    settings: Settings,
) -> Placed | None:
    """A lesion where it fits: the box of its crop, its mask there, its contrast. None if none of those drawn fits anywhere."""
    near = rng.random() < settings.periventricular and len(pools[0]) > 0
    shape = np.array(white.shape)
    for attempt in range(_DRAWS):
        # the last third may go anywhere: not every brain has room at its ventricles
        pool = pools[0] if near and attempt < _DRAWS * 2 // 3 else pools[1]
        lesion = lesions[int(rng.integers(len(lesions)))]
        mask, contrast = _varied(rng, lesion, settings)
        centres = np.stack(np.unravel_index(pool[rng.integers(len(pool), size=_PLACES)], white.shape), -1)
        if not settings.size[0] <= mask.sum() <= settings.size[1]:
            continue
        if settings.unit == "image":
            contrast = contrast * lesion.spread
        voxels = np.argwhere(mask)
        middle = voxels[np.argmin(((voxels - voxels.mean(0)) ** 2).sum(1))]
        starts = centres - middle
        # its crop, soft edge and all, must lie in the volume
        starts = starts[((starts >= 0) & (starts + mask.shape <= shape)).all(1)]
        for start in starts[_share(white, starts, voxels) >= settings.white_fraction]:
            box = tuple(slice(s, s + n) for s, n in zip(start.tolist(), mask.shape, strict=True))
            cut = mask & white[box]
            if cut.sum() < settings.size[0] or label_components(cut, 18).max() != 1:
                continue
            around = grown(box, settings.gap, white.shape)
            wide = np.zeros(taken[around].shape, bool)
            wide[tuple(slice(b.start - a.start, b.stop - a.start) for b, a in zip(box, around, strict=True))] = cut
            if not (ndimage.maximum_filter(wide.view(np.uint8), 2 * settings.gap + 1).view(bool) & taken[around]).any():
                return box, cut, contrast
    return None


def _share(white: np.ndarray, starts: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """The fraction of a lesion's voxels that lie in white matter when its crop begins at each of the starts `(n, 3)`."""
    strides = np.array([white.shape[1] * white.shape[2], white.shape[2], 1])
    index = (starts @ strides)[:, None] + voxels @ strides
    return white.ravel()[index].mean(1) if len(starts) else np.zeros(0)


def _varied(rng: Generator, lesion: BankLesion, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """The lesion's mask and contrast, times the factor drawn, mirrored, turned by quarters and scaled; its largest piece."""
    mask, contrast = lesion.mask, lesion.contrast
    for axis in range(3):
        if rng.random() < 0.5:
            mask, contrast = np.flip(mask, axis), np.flip(contrast, axis)
    for plane in ((0, 1), (0, 2), (1, 2)):
        turns = int(rng.integers(4))
        mask, contrast = np.rot90(mask, turns, plane), np.rot90(contrast, turns, plane)
    scale = float(np.exp(rng.uniform(*np.log(settings.scale))))
    contrast = contrast * np.float32(rng.uniform(*settings.contrast))
    whole = np.pad(ndimage.zoom(mask.astype(np.float32), scale, order=1) > 0.5, EDGE)
    labels = label_components(whole, 18)
    if not labels.any():
        return np.zeros((1, 1, 1), bool), contrast
    largest = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    # as much room around it as its edge takes
    own = grown(ndimage.find_objects(largest.view(np.uint8))[0], EDGE, whole.shape)
    channels = [ndimage.zoom(contrast[..., c], scale, order=1) for c in range(contrast.shape[-1])]
    wide = np.pad(np.stack(channels, -1), [(EDGE, EDGE)] * 3 + [(0, 0)])
    return largest[own], wide[own]


def _blend(
    rng: Generator,
    out: np.ndarray,
    image: np.ndarray,
    white: np.ndarray,
    box: tuple[slice, ...],
    mask: np.ndarray,
    contrast: np.ndarray,
    settings: Settings,
) -> None:
    """Add the lesion to `out`, in the units of the white matter around it in `image`."""
    near = local(box, white)
    values = image[near]
    _, spread = robust(values[white[near]])
    added = contrast * (spread if settings.unit == "tissue" else 1)
    if settings.texture:
        added += settings.texture * drawn(rng, texture_of(values, white[near]), mask.shape)
    weight = edge_weight(mask)[..., None] * (image[box] != 0)
    out[box] += (weight * added).astype(np.float32)
