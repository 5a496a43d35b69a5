"""The brain of the phantom: head coordinates, cerebrum, ventricles, and what tissue each voxel is made of.

Anatomy is drawn with signed depths (mm, positive inside a structure) in a warped head coordinate system whose origin
is the centre of the brain, x to the right, y to the front, z up (RAS+). Every random field is a sum of plane waves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import ndimage
from scipy.interpolate import CubicSpline

Array = np.ndarray
Axes = Sequence[Array]  # the coordinates (mm) along each axis of a grid
CSF, CORTEX, DEEP_GREY, WHITE = range(4)  # the rows of Anatomy.fractions

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

RIBBON = 3.1  # thickness of the cortex, mm
GYRUS = (13.0, 25.0)  # wavelengths of the folding, mm: a sulcus lies every half wavelength


class Anatomy(NamedTuple):
    """points: warped head coordinates, mm. fractions: (4, X, Y, Z), what each voxel is made of. pial: depth below the
    cortical surface, ventricle: distance from the lateral ventricles, hindbrain: depth in cerebellum or brain stem."""

    points: Sequence[Array]
    inside: Array
    fractions: Array
    pial: Array
    ventricle: Array
    hindbrain: Array


def _waves(rng: Generator, wavelengths: tuple[float, float], n: int) -> tuple[Array, Array]:
    direction = rng.normal(size=(n, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return 2 * np.pi * direction / rng.uniform(*wavelengths, size=(n, 1)), rng.uniform(0, 2 * np.pi, size=n)


def random_field(rng: Generator, axes: Axes, wavelengths: tuple[float, float], n: int = 60) -> Array:
    """A smooth random field of unit variance on a grid: plane waves factorise over the axes into a matrix product."""
    k, phase = _waves(rng, wavelengths, n)
    x, y, z = (np.exp(1j * np.outer(axis, k[:, i])).astype(np.complex64) for i, axis in enumerate(axes))
    plane = (x[:, None] * y[None] * np.exp(1j * phase).astype(np.complex64)).reshape(-1, n)
    field = np.hstack([plane.real, -plane.imag]) @ np.hstack([z.real, z.imag]).T
    return (field * np.float32(np.sqrt(2 / n))).reshape(len(axes[0]), len(axes[1]), len(axes[2]))


def soft(depth: Array, width: float) -> Array:
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
        warp = 1.6 * random_field(rng, axes, (70, 160)) + 1.0 * random_field(rng, axes, (20, 45))
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
    sulcal_depth = 17 + 5 * random_field(rng, axes, (20, 60))
    width = rng.uniform(0.3, 0.8) + 1.3 * np.exp(-np.maximum(hull, 0) / 3)  # atrophy; sulci open at the surface
    below = np.maximum(np.maximum(hull - sulcal_depth, _ellipsoid(points, CORE)), 0)
    sulci = np.hypot(below, _sulci(rng, points, hull > 0, step)) - width
    (cy, cz), (ry, rz) = CALLOSUM
    callosum = _ellipsoid((np.zeros_like(y), y, z), ((0, cy, cz), (1, ry, rz)))
    fissure = np.hypot(np.maximum(callosum, 0), x + 1.3 * random_field(rng, axes, (18, 40))) - rng.uniform(0.6, 1.3)
    rising = (x, y, z + 0.35 * (y - 12) + 2 * random_field(rng, axes, (25, 50)))  # the Sylvian fissure climbs backwards
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


def draw_anatomy(rng: Generator, axes: Axes, step: float) -> Anatomy:
    """One brain on a grid of this voxel size (mm), painted tissue over tissue."""
    points = _head_coordinates(rng, axes)
    _, y, z = points
    hull, pial = _cerebrum(rng, points, axes, step)
    cerebellum = _union(points, CEREBELLUM) + 0.8 * random_field(rng, axes, (10, 20))
    stem = _union(points, BRAIN_STEM)
    ventricle = _lateral_ventricles(rng, points)
    pools = _union(points, POOLS)
    nuclei = _union(points, DEEP_NUCLEI)

    fractions = np.zeros((4, *hull.shape), np.float32)
    fractions[WHITE] = 1

    def paint(tissue: int, amount: Array) -> None:
        fractions[:] *= 1 - amount
        fractions[tissue] += amount

    paint(DEEP_GREY, soft(nuclei, step))
    paint(CORTEX, soft(RIBBON - pial, step))
    paint(CSF, soft(-pial, step))
    folium = 24 * np.arctan2(z + 45, y + 24) + 1.2 * random_field(rng, axes, (15, 40))  # folia fan out from the stem
    branch = 6 + 5 * random_field(rng, axes, (12, 25)) * (1 - soft(cerebellum - 14, 6))
    in_cerebellum = soft(cerebellum, step)
    paint(CORTEX, in_cerebellum)
    paint(WHITE, in_cerebellum * soft(cerebellum - branch, 3) * 0.9)
    paint(CSF, in_cerebellum * np.clip(np.cos(folium) - 0.3, 0, 1) * 0.7 * soft(8 - cerebellum, 5))
    paint(WHITE, soft(stem, step))
    paint(CSF, soft(np.maximum(-ventricle, pools), step))

    hindbrain = np.maximum(cerebellum, stem)
    inside = (np.maximum(hull, hindbrain) > 0) & ((pial > -1.2) | (hull > 3.5) | (hindbrain > 0))
    inside |= ndimage.binary_closing(inside, iterations=2) & (z < -8)  # CSF fills the gap above the cerebellum
    parts, _ = ndimage.label(ndimage.binary_opening(inside))
    inside = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    fractions *= inside
    fractions[CSF] += ~inside
    return Anatomy(points, inside, fractions, np.where(hindbrain > 0, 99, pial), ventricle, hindbrain)
