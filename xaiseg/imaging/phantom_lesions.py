"""What the phantom shows besides its anatomy: lesions, and hyperintense places that only look like lesions.

Each is a Blend: a patch of voxels that move towards other intensities, given relative to white matter. The source of
the contrasts is named in phantom.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from xaiseg.imaging.phantom_anatomy import CORTEX, CSF, RIBBON, WHITE, Anatomy, Array, random_field, soft

TOUCHING = ndimage.generate_binary_structure(3, 2)  # 18-connected
EVERYWHERE = (slice(None),) * 3
SMALLEST_LESION, SMALLEST_LOOKALIKE = 5, 4  # voxels
LARGEST_LESION = 2700.0  # mm3
LESION_PLACES = {"periventricular": 0.58, "juxtacortical": 0.17, "deep": 0.18, "infratentorial": 0.07}  # shares
HORNS = ((12, 49, 0), (25, -36, 0))  # where caps form, mm


class Blend(NamedTuple):
    """A patch (slices) whose voxels move by weight towards these intensities; t1w None leaves T1w as it is."""

    where: tuple[slice, ...]
    weight: Array
    flair: float
    t1w: float | None = None


def _patch(shape: Sequence[int], centre: Array, reach: float, step: float) -> tuple[tuple[slice, ...], list[Array]]:
    """The cube of half-width reach (mm) about a voxel: its slices and the offsets (mm) along each axis."""
    n = int(np.ceil(reach / step))
    where = tuple(slice(max(round(c) - n, 0), min(round(c) + n + 1, s)) for c, s in zip(centre, shape, strict=True))
    return where, [(np.arange(w.start, w.stop) - c) * step for w, c in zip(where, centre, strict=True)]


def _blob(rng: Generator, shape: Sequence[int], centre: Array, axis: Array, radii: tuple[float, float], edge: float,
          step: float) -> tuple[tuple[slice, ...], Array]:  # fmt: skip
    """An ellipsoid with a ragged, soft edge (mm), long along a unit axis: its patch and weights."""
    where, offsets = _patch(shape, centre, 1.6 * max(radii) + edge + step, step)
    ox, oy, oz = np.meshgrid(*offsets, indexing="ij", sparse=True)
    along = ox * axis[0] + oy * axis[1] + oz * axis[2]
    across2 = np.maximum(ox**2 + oy**2 + oz**2 - along**2, 0)
    mean = (radii[0] * radii[1] ** 2) ** (1 / 3)
    ragged = random_field(rng, offsets, (mean, 4 * mean))
    level = np.sqrt((along / radii[0]) ** 2 + across2 / radii[1] ** 2) + 0.22 * ragged
    return where, soft((1 - level) * mean, edge)


def _lesion_sites(anatomy: Anatomy, white: Array, step: float) -> list[Array]:
    """Voxels where lesions start, by row of LESION_PLACES."""
    upper, ventricle, z = white & (anatomy.hindbrain < 0), anatomy.ventricle, anatomy.points[2]
    places = (
        upper & (ventricle < 1.5 * step) & (z > -8),
        upper & (np.abs(anatomy.pial - RIBBON - 1.5) < 1) & (z > -12),
        upper & (anatomy.pial > 7) & (ventricle > 7) & (z > -8),
        white & (anatomy.hindbrain > 4),
    )
    return [np.argwhere(place) for place in places]


def _lesion(rng: Generator, anatomy: Anatomy, centre: Array, place: str, step: float) -> Blend:
    largest = 300 if place == "infratentorial" else LARGEST_LESION
    volume = np.clip(110 * np.exp(rng.normal(0, 1.15)), 1.5 * SMALLEST_LESION * step**3, largest)  # before tissue cuts
    stretch = rng.uniform(1.3, 1.9) if place == "periventricular" else rng.uniform(1.0, 1.4)
    mean = (3 * volume / (4 * np.pi)) ** (1 / 3)
    radii = (mean * stretch, mean / np.sqrt(stretch))
    axis = rng.normal(size=3)
    if place == "periventricular":  # Dawson's fingers follow the venules, away from the ventricle
        around, _ = _patch(anatomy.inside.shape, centre, 2 * step, step)
        axis = 0.1 * axis + [g.mean() for g in np.gradient(anatomy.ventricle[around])]
    axis /= np.linalg.norm(axis)
    if place == "periventricular":
        centre = centre + axis * 0.7 * radii[0] / step
    where, weight = _blob(rng, anatomy.inside.shape, centre, axis, radii, rng.uniform(1.0, 3.0), step)
    flair = 1 + np.clip(rng.normal(0.54, 0.14) + 0.03 * np.log(volume / 80), 0.18, 0.85)
    t1w = 1 - np.clip(rng.normal(0.19, 0.11) + 0.05 * np.log(volume / 80), 0.0, 0.5)
    return Blend(where, weight * soft(anatomy.fractions[WHITE][where] - 0.4, 0.4), flair, t1w)


def draw_lesions(rng: Generator, anatomy: Anatomy, white: Array, step: float, n: int) -> tuple[Array, list[Blend]]:
    """n lesions in white matter; a lesion that would touch an earlier one is drawn again elsewhere."""
    sites = dict(zip(LESION_PLACES, _lesion_sites(anatomy, white, step), strict=True))
    labels = np.zeros(white.shape, np.int32)
    blends: list[Blend] = []
    for _ in range(100 * n):
        if len(blends) == n:
            break
        place = str(rng.choice(list(LESION_PLACES), p=list(LESION_PLACES.values())))
        if not len(sites[place]):
            continue
        lesion = _lesion(rng, anatomy, rng.choice(sites[place]), place, step)
        where = lesion.where
        parts, _ = ndimage.label((lesion.weight > 0.5) & white[where], TOUCHING)
        core = parts == np.argmax(np.bincount(parts.ravel(), minlength=2)[1:]) + 1
        around = ndimage.binary_dilation(core, np.ones((3, 3, 3)), 2)
        if core.sum() >= SMALLEST_LESION and not labels[where][around].any():
            labels[where][core] = len(blends) + 1
            blends.append(lesion._replace(weight=lesion.weight * around))
    return labels, blends


def draw_lookalikes(rng: Generator, anatomy: Anatomy, step: float) -> list[Blend]:
    """Everything bright on FLAIR that is no lesion."""
    kinds = (_caps, _septum, _choroid_plexus, _cortical_patches, _vessels)
    return [blend for draw in kinds for blend in draw(rng, anatomy, step)]


def _caps(rng: Generator, anatomy: Anatomy, step: float) -> list[Blend]:
    """A smooth rim along the ventricles that swells to symmetric caps at the frontal and occipital horns."""
    x, y, z = anatomy.points
    rim = np.full(x.shape, rng.uniform(-0.8, 0.8))
    for cx, cy, cz in HORNS:
        reach = ((np.abs(x) - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / rng.uniform(8, 12) ** 2
        rim += rng.uniform(1.5, 3.8) * np.exp(-reach)
    weight = soft(rim - anatomy.ventricle, 1.5 * step) * anatomy.fractions[WHITE]
    return [Blend(EVERYWHERE, weight, rng.uniform(1.28, 1.48))]


def _septum(rng: Generator, anatomy: Anatomy, step: float) -> list[Blend]:
    """A bright septum between the frontal horns."""
    x, y, z = anatomy.points
    extent = np.minimum(18 - np.abs(y - 26), 9 - np.abs(z - 4))
    weight = soft(np.minimum(1.6 - np.abs(x), extent), step) * soft(5 - anatomy.ventricle, 2)
    return [Blend(EVERYWHERE, weight * (1 - anatomy.fractions[CSF]), rng.uniform(1.15, 1.4))]


def _choroid_plexus(rng: Generator, anatomy: Anatomy, step: float) -> list[Blend]:
    """Lumps inside the atria, brighter than the CSF around them in both sequences."""
    x, y, z = anatomy.points
    blends = []
    for side in (-1, 1):
        atrium = (side * x > 0) & (np.abs(y + 18) < 9) & (z > -6) & (anatomy.ventricle < -step)
        if rng.random() < 0.8 and atrium.any():
            where, weight = _blob(rng, x.shape, rng.permutation(np.argwhere(atrium))[0], np.array([0, 0.8, 0.6]),
                                  (rng.uniform(4, 7), rng.uniform(2, 3)), step, step)  # fmt: skip
            blends.append(Blend(where, weight * (anatomy.ventricle[where] < 0), rng.uniform(1.1, 1.5), 0.62))
    return blends


def _cortical_patches(rng: Generator, anatomy: Anatomy, step: float) -> list[Blend]:
    """Stretches of cortex that are brighter than the rest; on T1w they stay ordinary grey matter."""
    cortex = np.argwhere(anatomy.fractions[CORTEX] > 0.9)
    blends = []
    for centre in cortex[rng.integers(len(cortex), size=rng.integers(3, 9))]:
        radius = rng.uniform(3, 7)
        where, weight = _blob(rng, anatomy.inside.shape, centre, np.array([1, 0, 0]), (radius, radius), 3.0, step)
        blends.append(Blend(where, weight * anatomy.fractions[CORTEX][where], rng.uniform(1.3, 1.5)))
    return blends


def _vessels(rng: Generator, anatomy: Anatomy, step: float) -> list[Blend]:
    """Thin bright tubes (flow) that wander from the CSF of the skull base and of the sulci; nothing on T1w."""
    sources = anatomy.inside & (anatomy.fractions[CSF] > 0.6) & (anatomy.ventricle > 8)
    base = np.argwhere(sources & (anatomy.points[2] < -15))
    sulci = np.argwhere(sources)
    blends = []
    for i in range(rng.integers(3, 8)):
        pool = base if i % 2 and len(base) else sulci
        if not len(pool):
            break
        centre = pool[rng.integers(len(pool))].astype(float)
        where, offsets = _patch(sources.shape, centre, 16, step)
        x, y, z = np.meshgrid(*offsets, indexing="ij", sparse=True)
        nearest = np.full(np.broadcast_shapes(x.shape, y.shape, z.shape), 99.0)
        position, direction = np.zeros(3), rng.normal(size=3)
        for _ in range(rng.integers(6, 14)):
            nearest = np.minimum(nearest, sum((g - p) ** 2 for g, p in zip((x, y, z), position, strict=True)))
            direction = 0.8 * direction / np.linalg.norm(direction) + 0.3 * rng.normal(size=3)
            position = position + direction / np.linalg.norm(direction)
        tube = soft(rng.uniform(0.9, 1.5) - np.sqrt(nearest), step)
        blends.append(
            Blend(where, tube * anatomy.inside[where] * (anatomy.ventricle[where] > 3), rng.uniform(1.3, 1.7))
        )
    return blends


def label_lookalikes(blends: list[Blend], lesions: Array, anatomy: Anatomy, step: float) -> Array:
    """The look-alikes clear of lesions and of the ventricle wall, where partial volume hides what was drawn."""
    mask = np.zeros(lesions.shape, bool)
    for blend in blends:
        mask[blend.where] |= blend.weight > 0.5
    wall = (anatomy.ventricle > 0) & (anatomy.ventricle < 0.75 * step)
    mask &= anatomy.inside & ~wall & ~ndimage.binary_dilation(lesions > 0, TOUCHING)
    parts, _ = ndimage.label(mask, TOUCHING)
    sizes = np.bincount(parts.ravel())
    keep = sizes >= SMALLEST_LOOKALIKE
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[parts]
