"""A synthetic brain with multiple-sclerosis lesions, for users who have no scans at hand.

Anatomy is drawn with signed depths (mm, positive inside a structure) in a warped head coordinate system whose origin
is the centre of the brain, x to the right, y to the front, z up (RAS+). Every random field is a sum of plane waves.
Contrasts relative to white matter (grey matter, CSF, lesions) follow the scans of Lesjak et al., Neuroinformatics
2018;16:51-63, doi:10.1007/s12021-017-9348-7; no voxel of them is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import ndimage
from scipy.interpolate import CubicSpline

from xaiseg.errors import InputError

Array = np.ndarray
Axes = Sequence[Array]  # the coordinates (mm) along each axis of a grid
CSF, CORTEX, DEEP_GREY, WHITE = range(4)  # the rows of Anatomy.fractions
TOUCHING = ndimage.generate_binary_structure(3, 2)  # 18-connected
EVERYWHERE = (slice(None),) * 3
SMALLEST_LESION, SMALLEST_LOOKALIKE = 5, 4  # voxels
LARGEST_LESION = 2700.0  # mm3

# Shapes of an average brain: centres and semi-axes, mm; those off the midline are mirrored to the left.
EXTENT = (144.0, 182.0, 152.0)  # the largest brain with a margin: smaller fields of view get a smaller brain
HEMISPHERE = ((15, 0, 8), (50, 80, 55))
TEMPORAL_LOBE = ((40, 12, -27), (23, 42, 22))
CEREBRUM_FLOOR = -25.0
CEREBELLUM = (((22, -45, -41), (32, 30, 23)), ((0, -44, -38), (18, 25, 22)))
BRAIN_STEM = (((0, -2, -22), (15, 11, 18)), ((0, -6, -38), (19, 15, 16)), ((0, -16, -56), (9, 9, 18)))
CORE = ((0, 6, -12), (33, 38, 32))  # basal ganglia, thalami and their capsules: no sulcus enters
DEEP_NUCLEI = (((11, 2, -2), (8.5, 14, 9)), ((14, 29, -1), (5, 10, 9)), ((27, 18, -6), (6.5, 16, 10)))
CALLOSUM = ((13, -5), (40, 29))  # the longitudinal fissure stops at this ellipse of the sagittal plane (y, z)
INSULA = ((39, 15, -6), (2.2, 23, 15))
SYLVIAN_CLEFT = ((56, 12, -8), (20, 25, 1.6))
POOLS = (  # third and fourth ventricle, the cisterns behind and in front of the midbrain
    ((0, 6, -8), (2.4, 14, 10)),
    ((0, -24, -41), (6, 5, 9)),
    ((0, -19, -14), (13, 3.2, 6)),
    ((0, 19, -26), (11, 8, 4)),
)
# The lateral ventricle from the frontal horn through the atrium: x, y, z, radius.
LATERAL_VENTRICLE = (
    ((13, 51, -4, 1.5), (9, 42, 1, 4.0), (8, 30, 6, 5.0), (9, 14, 11, 4.5), (13, -2, 13, 4.5), (20, -16, 8, 6.0)),
    ((20, -16, 8, 6.0), (26, -26, 2, 5.5), (25, -38, -2, 3.0), (23, -50, -4, 1.2)),  # into the occipital horn
    ((26, -22, 2, 5.0), (33, -16, -10, 2.5), (36, -4, -20, 1.8), (35, 8, -24, 1.0)),  # into the temporal horn
)
HORNS = ((12, 49, 0), (25, -36, 0))  # where caps form

LESION_PLACES = {"periventricular": 0.58, "juxtacortical": 0.17, "deep": 0.18, "infratentorial": 0.07}  # shares
RIBBON = 3.1  # thickness of the cortex, mm
GYRUS = (13.0, 25.0)  # wavelengths of the folding, mm: a sulcus lies every half wavelength

# Intensities relative to white matter, by row of Anatomy.fractions.
FLAIR_CONTRAST = (0.27, 1.22, 1.04, 1.0)
T1W_CONTRAST = (0.16, 0.70, 0.83, 1.0)


@dataclass(frozen=True)
class Phantom:
    """A brain-extracted FLAIR and T1w pair with the truth behind it.

    flair, t1w: (X, Y, Z) float32, arbitrary scanner units, zero outside the brain.
    lesions: (X, Y, Z) int32, the true lesions 1..n, each one 18-connected component, none touching another.
    lookalikes: (X, Y, Z) int32, hyperintense places 1..m that are no lesions.
    tissue: (X, Y, Z) uint8, 0 outside, 1 CSF, 2 grey matter, 3 white matter (lesions count as white matter).
    affine: (4, 4) float64, voxel index to RAS+ mm, the origin at the centre of the brain.
    """

    flair: Array
    t1w: Array
    lesions: Array
    lookalikes: Array
    tissue: Array
    affine: Array


class Anatomy(NamedTuple):
    """points: warped head coordinates, mm. fractions: (4, X, Y, Z), what each voxel is made of. pial: depth below the
    cortical surface, ventricle: distance from the lateral ventricles, hindbrain: depth in cerebellum or brain stem."""

    points: Sequence[Array]
    inside: Array
    fractions: Array
    pial: Array
    ventricle: Array
    hindbrain: Array


class Blend(NamedTuple):
    """A patch (slices) whose voxels move by weight towards these intensities; t1w None leaves T1w as it is."""

    where: tuple[slice, ...]
    weight: Array
    flair: float
    t1w: float | None = None


def _waves(rng: Generator, wavelengths: tuple[float, float], n: int) -> tuple[Array, Array]:
    direction = rng.normal(size=(n, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return 2 * np.pi * direction / rng.uniform(*wavelengths, size=(n, 1)), rng.uniform(0, 2 * np.pi, size=n)


def _field(rng: Generator, axes: Axes, wavelengths: tuple[float, float], n: int = 60) -> Array:
    """A smooth random field of unit variance on a grid: plane waves factorise over the axes into a matrix product."""
    k, phase = _waves(rng, wavelengths, n)
    x, y, z = (np.exp(1j * np.outer(axis, k[:, i])).astype(np.complex64) for i, axis in enumerate(axes))
    plane = (x[:, None] * y[None] * np.exp(1j * phase).astype(np.complex64)).reshape(-1, n)
    field = np.hstack([plane.real, -plane.imag]) @ np.hstack([z.real, z.imag]).T
    return (field * np.float32(np.sqrt(2 / n))).reshape(len(axes[0]), len(axes[1]), len(axes[2]))


def _soft(depth: Array, width: float) -> Array:
    """The fraction of a voxel of this width that lies at positive depth."""
    return np.clip(depth / width + 0.5, 0, 1)


def _ellipsoid(points: Sequence[Array], shape: tuple) -> Array:
    """Depth inside an ellipsoid, mm, exact to first order at its surface; mirrored when its centre is off x = 0."""
    (cx, cy, cz), radii = shape
    x, y, z = points
    offset = (np.abs(x) - cx if cx else x, y - cy, z - cz)
    level = np.sqrt(sum((o / r) ** 2 for o, r in zip(offset, radii, strict=True)))
    slope = np.sqrt(sum((o / r**2) ** 2 for o, r in zip(offset, radii, strict=True)))
    return level * (1 - level) / np.maximum(slope, 1e-6)


def _union(points: Sequence[Array], shapes: Sequence[tuple]) -> Array:
    return np.maximum.reduce([_ellipsoid(points, shape) for shape in shapes])


def _head_coordinates(rng: Generator, axes: Axes) -> list[Array]:
    """Grid positions in the coordinates of the average brain: another size, proportions and smooth asymmetry."""
    points = []
    for i, grid in enumerate(np.meshgrid(*axes, indexing="ij", sparse=True)):
        warp = 1.6 * _field(rng, axes, (70, 160)) + 1.0 * _field(rng, axes, (20, 45))
        points.append((grid / rng.uniform(0.89, 1.0) + warp - (3.0 if i == 2 else 0.0)).astype(np.float32))
    return points


def _sulci(rng: Generator, points: Sequence[Array], domain: Array, step: float) -> Array:
    """Distance to the nearest sulcus, mm: the zero sheets of a narrow-band field that hardly varies along the depth."""
    k, phase = _waves(rng, GYRUS, 90)
    flat = np.stack([p[domain] for p in points])
    side = np.sign(flat[0])
    flat[0] -= 18 * side  # each hemisphere unfolds about its own centre
    flat *= (50 / np.maximum(np.linalg.norm(flat, axis=0), 8)) ** 0.75
    flat[0] += 500 * side  # and has gyri of its own
    field = np.zeros(domain.shape, np.float32)
    for wave, shift in zip(k.astype(np.float32), phase.astype(np.float32), strict=True):
        field[domain] += np.cos(wave @ flat + shift)
    slope = np.sqrt(sum(g**2 for g in np.gradient(field, step)))
    return np.where(domain, np.abs(field) / np.maximum(slope, 0.6), 99).astype(np.float32)


def _cerebrum(rng: Generator, points: Sequence[Array], axes: Axes, step: float) -> tuple[Array, Array]:
    """Depth below the hull of the cerebrum and depth below its folded (pial) surface, mm."""
    x, y, z = points
    hull = np.minimum(_ellipsoid(points, HEMISPHERE), z - CEREBRUM_FLOOR - 0.12 * np.maximum(y, 0))
    hull = np.maximum(hull, _ellipsoid(points, TEMPORAL_LOBE))
    hull = np.minimum(hull, -1.5 - _union(points, CEREBELLUM))
    sulcal_depth = 17 + 5 * _field(rng, axes, (20, 60))
    width = rng.uniform(0.3, 0.8) + 1.3 * np.exp(-np.maximum(hull, 0) / 3)  # atrophy; sulci open at the surface
    below = np.maximum(np.maximum(hull - sulcal_depth, _ellipsoid(points, CORE)), 0)
    sulci = np.hypot(below, _sulci(rng, points, hull > 0, step)) - width
    (cy, cz), (ry, rz) = CALLOSUM
    callosum = _ellipsoid((np.zeros_like(y), y, z), ((0, cy, cz), (1, ry, rz)))
    fissure = np.hypot(np.maximum(callosum, 0), x + 1.3 * _field(rng, axes, (18, 40))) - rng.uniform(0.6, 1.3)
    rising = (x, y, z + 0.35 * (y - 12) + 2 * _field(rng, axes, (25, 50)))  # the Sylvian fissure climbs backwards
    insula = -np.maximum(_ellipsoid(points, INSULA), _ellipsoid(rising, SYLVIAN_CLEFT))
    return hull, np.minimum.reduce([hull - 0.3, sulci, fissure, insula])


def _lateral_ventricles(rng: Generator, points: Sequence[Array]) -> Array:
    """Distance from the lateral ventricles, mm, negative inside: spheres along the curves of the horns."""
    size, lopsided = rng.uniform(0.75, 1.45), rng.normal(0, 0.07)
    near = _ellipsoid(points, ((0, 0, -2), (50, 72, 45))) > 0
    x, y, z = (p[near] for p in points)
    scale = size * (1 + lopsided * np.sign(x))
    nearest = np.full(x.shape, 99, np.float32)
    for curve in LATERAL_VENTRICLE:
        nodes = np.asarray(curve, float)
        for cx, cy, cz, r in CubicSpline(np.arange(len(nodes)), nodes)(np.linspace(0, len(nodes) - 1, 8 * len(nodes))):
            distance = np.sqrt((1.25 * (np.abs(x) - cx)) ** 2 + (y - cy) ** 2 + (0.85 * (z - cz)) ** 2) - r * scale
            nearest = np.minimum(nearest, distance.astype(np.float32))
    result = np.full(near.shape, 99, np.float32)
    result[near] = np.maximum(nearest, 1.0 - np.abs(x))  # the septum stays between the two
    return result


def _anatomy(rng: Generator, axes: Axes, step: float) -> Anatomy:
    points = _head_coordinates(rng, axes)
    _, y, z = points
    hull, pial = _cerebrum(rng, points, axes, step)
    cerebellum = _union(points, CEREBELLUM) + 0.8 * _field(rng, axes, (10, 20))
    stem = _union(points, BRAIN_STEM)
    ventricle = _lateral_ventricles(rng, points)
    pools = _union(points, POOLS)
    nuclei = _union(points, DEEP_NUCLEI)

    fractions = np.zeros((4, *hull.shape), np.float32)
    fractions[WHITE] = 1

    def paint(tissue: int, amount: Array) -> None:
        fractions[:] *= 1 - amount
        fractions[tissue] += amount

    paint(DEEP_GREY, _soft(nuclei, step))
    paint(CORTEX, _soft(RIBBON - pial, step))
    paint(CSF, _soft(-pial, step))
    folium = 24 * np.arctan2(z + 45, y + 24) + 1.2 * _field(rng, axes, (15, 40))  # folia fan out from the stem
    branch = 6 + 5 * _field(rng, axes, (12, 25)) * (1 - _soft(cerebellum - 14, 6))
    in_cerebellum = _soft(cerebellum, step)
    paint(CORTEX, in_cerebellum)
    paint(WHITE, in_cerebellum * _soft(cerebellum - branch, 3) * 0.9)
    paint(CSF, in_cerebellum * np.clip(np.cos(folium) - 0.3, 0, 1) * 0.7 * _soft(8 - cerebellum, 5))
    paint(WHITE, _soft(stem, step))
    paint(CSF, _soft(np.maximum(-ventricle, pools), step))

    hindbrain = np.maximum(cerebellum, stem)
    inside = (np.maximum(hull, hindbrain) > 0) & ((pial > -1.2) | (hull > 3.5) | (hindbrain > 0))
    inside |= ndimage.binary_closing(inside, iterations=2) & (z < -8)  # CSF fills the gap above the cerebellum
    parts, _ = ndimage.label(ndimage.binary_opening(inside))
    inside = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    fractions *= inside
    fractions[CSF] += ~inside
    return Anatomy(points, inside, fractions, np.where(hindbrain > 0, 99, pial), ventricle, hindbrain)


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
    level = np.sqrt((along / radii[0]) ** 2 + across2 / radii[1] ** 2) + 0.22 * _field(rng, offsets, (mean, 4 * mean))
    return where, _soft((1 - level) * mean, edge)


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
    return Blend(where, weight * _soft(anatomy.fractions[WHITE][where] - 0.4, 0.4), flair, t1w)


def _lesions(rng: Generator, anatomy: Anatomy, white: Array, step: float, n: int) -> tuple[Array, list[Blend]]:
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


def _caps(rng: Generator, anatomy: Anatomy, step: float) -> list[Blend]:
    """A smooth rim along the ventricles that swells to symmetric caps at the frontal and occipital horns."""
    x, y, z = anatomy.points
    rim = np.full(x.shape, rng.uniform(-0.8, 0.8))
    for cx, cy, cz in HORNS:
        reach = ((np.abs(x) - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / rng.uniform(8, 12) ** 2
        rim += rng.uniform(1.5, 3.8) * np.exp(-reach)
    weight = _soft(rim - anatomy.ventricle, 1.5 * step) * anatomy.fractions[WHITE]
    return [Blend(EVERYWHERE, weight, rng.uniform(1.28, 1.48))]


def _septum(rng: Generator, anatomy: Anatomy, step: float) -> list[Blend]:
    """A bright septum between the frontal horns."""
    x, y, z = anatomy.points
    extent = np.minimum(18 - np.abs(y - 26), 9 - np.abs(z - 4))
    weight = _soft(np.minimum(1.6 - np.abs(x), extent), step) * _soft(5 - anatomy.ventricle, 2)
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
        tube = _soft(rng.uniform(0.9, 1.5) - np.sqrt(nearest), step)
        blends.append(
            Blend(where, tube * anatomy.inside[where] * (anatomy.ventricle[where] > 3), rng.uniform(1.3, 1.7))
        )
    return blends


def _lookalike_labels(blends: list[Blend], lesions: Array, anatomy: Anatomy, step: float) -> Array:
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


def _scan(rng: Generator, signal: Array, inside: Array, axes: Axes) -> Array:
    """What a scanner makes of the ideal signal (white matter 1): blur, bias field, Rician noise, its own units."""
    blurred = ndimage.gaussian_filter(signal, 0.6)  # voxels
    bias = _field(rng, axes, (120, 300))
    bias *= rng.uniform(0.05, 0.15) / np.abs(bias[inside]).max()
    sigma = 1 / rng.uniform(20, 30)
    clean = blurred * (1 + bias)
    noise = rng.normal(0, sigma, size=(2, *signal.shape)).astype(np.float32)
    image = np.hypot(clean + noise[0], noise[1]) * 200 * np.exp(rng.normal(0, 0.5))
    return np.where(inside, image, 0).astype(np.float32)


def phantom(
    seed: int, shape: tuple[int, int, int] = (112, 136, 112), spacing: float = 1.5, lesions: int | None = None
) -> Phantom:
    """Draws the brain of one imaginary patient; the same arguments give the same patient.

    shape: voxels along x, y, z. spacing: mm, isotropic. A field of view below about 144 x 182 x 152 mm gets a
    proportionally smaller brain with smaller lesions. lesions: how many, drawn when None (4 to 25, median 10);
    fewer where they do not fit. Voxels above about 4 mm are too coarse for most look-alikes.
    Raises InputError for a shape, spacing or number of lesions that cannot be drawn.
    """
    if len(shape) != 3 or min(shape) < 24:
        raise InputError(f"phantom: shape is {shape}, expected three sizes of at least 24 voxels; give a larger shape")
    if not 0 < spacing < np.inf:
        raise InputError(f"phantom: spacing is {spacing}, expected a positive number of mm; give one such as 1.5")
    if lesions is not None and lesions < 0:
        raise InputError(f"phantom: lesions is {lesions}, expected 0 or more; leave it out to have the number drawn")
    rng = np.random.default_rng(seed)
    step = spacing * max(1.0, *(e / (n * spacing) for e, n in zip(EXTENT, shape, strict=True)))
    axes = [(np.arange(n) - (n - 1) / 2) * step for n in shape]
    n = int(np.clip(round(10 * np.exp(rng.normal(0, 0.5))), 4, 25)) if lesions is None else lesions

    anatomy = _anatomy(rng, axes, step)
    tissue = np.array([1, 2, 2, 3], np.uint8)[anatomy.fractions.argmax(axis=0)] * anatomy.inside
    labels, lesion_blends = _lesions(rng, anatomy, tissue == 3, step, n)
    lookalikes = [
        blend
        for draw in (_caps, _septum, _choroid_plexus, _cortical_patches, _vessels)
        for blend in draw(rng, anatomy, step)
    ]

    jitter = rng.normal(1, 0.03, size=(2, 4)) * np.array([1, 1, 1, 0]) + np.array([0, 0, 0, 1])
    contrasts = (jitter * np.array([FLAIR_CONTRAST, T1W_CONTRAST])).astype(np.float32)
    flair, t1w = np.tensordot(contrasts, anatomy.fractions, axes=1)
    texture = _field(rng, axes, (5, 16)) * anatomy.fractions[WHITE]
    haze = 0.06 * np.exp(-np.maximum(anatomy.ventricle, 0) / 8) * anatomy.fractions[WHITE]
    flair += 0.025 * texture + haze
    t1w -= 0.008 * texture
    for blend in lookalikes + lesion_blends:
        flair[blend.where] += blend.weight * (blend.flair - flair[blend.where])
        if blend.t1w is not None:
            t1w[blend.where] += blend.weight * (blend.t1w - t1w[blend.where])

    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    return Phantom(
        _scan(rng, flair, anatomy.inside, axes),
        _scan(rng, t1w, anatomy.inside, axes),
        labels,
        _lookalike_labels(lookalikes, labels, anatomy, step),
        tissue,
        affine,
    )
