"""Shapes of synthetic lesions on a voxel grid: an ellipsoid with a smooth random surface, or the voxels of a real lesion.

Both are a signed distance to a surface in mm, from which a voxel's weight follows: 1 well inside, 0 well outside, and in between
across a border of some mm, one half on the surface. Axes are the voxel axes; lengths are mm, so voxels may have any size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from xaiseg._types import Instance
from xaiseg.errors import InputError

_WAVES, _WAVE_NUMBER = 60, 3.0  # of the random surface: cosines over the unit sphere, about three bumps around it
_DIRECTIONS = 2000  # on the sphere, at which its volume is measured


@dataclass(frozen=True, eq=False)
class LesionShape:
    """A lesion on the grid of a volume.

    weight: `(x, y, z)` float32 in [0, 1], a crop. start: its first voxel in the volume.
    """

    weight: np.ndarray
    start: tuple[int, int, int]

    @cached_property
    def voxels(self) -> np.ndarray:
        """The voxels that count as lesion, at least half of the weight: `(n, 3)` int32 in C order."""
        return (np.argwhere(self.weight >= 0.5) + np.array(self.start)).astype(np.int32)

    @property
    def box(self) -> tuple[slice, ...]:
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.weight.shape, strict=True))

    def instance(self, label: int = 1) -> Instance:
        return Instance(label, self.voxels)

    def volume_mm3(self, spacing: Sequence[float]) -> float:
        """Sum of the weights times the volume of a voxel."""
        return float(self.weight.sum(dtype=np.float64) * np.prod(spacing))


def ellipsoid(
    shape: Sequence[int],
    spacing: Sequence[float],
    centre: Sequence[float],
    diameters_mm: float | Sequence[float],
    *,
    roughness: float = 0.0,
    turned: bool = False,
    edge_mm: float = 1.0,
    seed: int = 0,
) -> LesionShape:
    """An ellipsoid of volume `π/6 · d1 · d2 · d3` mm³, whatever its surface; a soft border adds `(edge / d)²` of it for a ball.

    shape, spacing: of the volume, voxels and mm. centre: in voxels, fractions allowed, see `to_voxel`. diameters_mm: one, or three.
    roughness: standard deviation of the logarithm of the radius over directions and draws, smooth; 0.15 looks like a lesion.
    turned: into a random orientation, in mm. edge_mm: width of the soft border. seed: of surface and orientation.
    Distances to the surface are first-order ones, exact for a ball. Raises InputError for lengths that are not positive, or where
    no voxel of the lesion lies in the volume.

    >>> lesion = ellipsoid((64, 64, 32), (0.5, 0.5, 1), (32, 32, 16), 10.0)
    >>> round(lesion.volume_mm3((0.5, 0.5, 1))), round(np.pi / 6 * 10**3)
    (529, 524)
    """
    radii = np.broadcast_to(np.asarray(diameters_mm, float), 3) / 2
    step = np.asarray(spacing, float)
    if not (radii > 0).all() or not np.isfinite(radii).all() or edge_mm < 0 or roughness < 0:
        raise InputError(
            f"synthetic lesion: diameters {diameters_mm} mm, edge {edge_mm} mm, roughness {roughness}: expected positive "
            "diameters, the others 0 or more: correct them"
        )
    rng = np.random.default_rng(seed)
    turn = Rotation.random(random_state=rng).as_matrix() if turned else np.eye(3)
    wave = rng.normal(size=(_WAVES, 3))
    wave *= _WAVE_NUMBER / np.linalg.norm(wave, axis=1, keepdims=True)
    phase = rng.uniform(0, 2 * np.pi, _WAVES)

    def surface(directions: np.ndarray) -> np.ndarray:
        """Radius over directions `(…, 3)`, in units of the ellipsoid's."""
        if not roughness:
            return np.ones(directions.shape[:-1])
        bumps = np.sqrt(2 / _WAVES) * np.cos(directions @ wave.T + phase).sum(-1)
        return np.exp(roughness * bumps)

    # the volume of a star-shaped body is the mean cube of its radius over the sphere
    drawn = surface(_sphere(_DIRECTIONS))
    whole = np.cbrt((drawn**3).mean())
    reach = np.ceil((1.1 * radii.max() * drawn.max() / whole + edge_mm) / step).astype(int) + 1
    low, points = _grid_around(shape, step, centre, reach)
    scaled = points @ turn / radii  # rows: the axes of the ellipsoid
    rho = np.linalg.norm(scaled, axis=-1)
    directions = scaled / np.maximum(rho, 1e-9)[..., None]
    slope = np.linalg.norm(directions / radii, axis=-1)
    distance = (rho - surface(directions) / whole) / np.maximum(slope, 1e-9)
    return _shaped(np.where(rho < 1e-9, -radii.min(), distance), edge_mm, low, centre, shape)


def like_lesion(
    shape: Sequence[int],
    spacing: Sequence[float],
    centre: Sequence[float],
    voxels: np.ndarray,
    *,
    voxels_spacing: Sequence[float] | None = None,
    diameter_mm: float | None = None,
    edge_mm: float = 1.0,
) -> LesionShape:
    """A real lesion's shape, its centroid moved to `centre`.

    voxels: `(n, 3)` of the real lesion, on a grid of `voxels_spacing` mm, that of the volume by default.
    diameter_mm: of the ball that has the lesion's volume; the lesion is scaled to that. Its own by default.
    edge_mm: width of the soft border, of which half lies inside the voxels' outer faces. The rest as `ellipsoid`.
    With the grid, size and place of the real lesion, `voxels` are its own.

    >>> real = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]])
    >>> (like_lesion((9, 9, 9), (1, 1, 1), real.mean(0) + 4, real).voxels - 4).tolist()
    [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    """
    step = np.asarray(spacing, float)
    own = step if voxels_spacing is None else np.asarray(voxels_spacing, float)
    if not len(voxels):
        raise InputError("synthetic lesion: the real lesion has no voxels, expected some: choose another")
    if edge_mm < 0 or (diameter_mm is not None and not diameter_mm > 0):
        raise InputError(
            f"synthetic lesion: diameter {diameter_mm} mm, edge {edge_mm} mm: expected a positive diameter and an edge of 0 or more"
        )
    scale = 1.0
    if diameter_mm is not None:
        # between voxel centres corners are cut: of few voxels that is a third of the volume
        body = np.pad(_mask_of(voxels), 2)
        scale = diameter_mm / np.cbrt(6 / np.pi * _volume(signed_distance(body, own)) * np.prod(own))
    margin = np.ceil(edge_mm / scale / own).astype(int) + 2
    corner = voxels.min(0) - margin
    surface = signed_distance(np.pad(_mask_of(voxels), [(m, m) for m in margin.tolist()]), own)
    middle = voxels.mean(0) - corner
    reach = np.ceil(np.array(surface.shape) * own * scale / step).astype(int) + 1
    low, points = _grid_around(shape, step, centre, reach)
    places = np.moveaxis(points / scale / own + middle, -1, 0)
    distance = scale * ndimage.map_coordinates(surface, places, order=1, mode="nearest")
    return _shaped(distance, edge_mm, low, centre, shape)


def _mask_of(voxels: np.ndarray) -> np.ndarray:
    mask = np.zeros(voxels.max(0) - voxels.min(0) + 1, bool)
    mask[tuple((voxels - voxels.min(0)).T)] = True
    return mask


def _volume(surface: np.ndarray) -> float:
    """Voxels within the zero surface of a linearly interpolated distance, by 4³ points each."""
    offsets = (np.arange(4) - 1.5) / 4
    return (
        sum(
            float((ndimage.shift(surface, (x, y, z), order=1, mode="nearest") <= 0).sum())
            for x in offsets
            for y in offsets
            for z in offsets
        )
        / len(offsets) ** 3
    )


def signed_distance(mask: np.ndarray, spacing: Sequence[float] | np.ndarray) -> np.ndarray:
    """Distance in mm from the centre of each voxel to the outer faces of the mask's voxels, negative inside.

    To the box of the nearest voxel, by centres, of the other side.

    >>> signed_distance(np.array([0, 0, 1, 1, 1, 0]).reshape(1, 1, 6) > 0, (1, 1, 2)).ravel().tolist()
    [3.0, 1.0, -1.0, -3.0, -1.0, 1.0]
    """
    step = np.asarray(spacing, float)

    def to_other(side: np.ndarray) -> np.ndarray:
        nearest = ndimage.distance_transform_edt(side, sampling=step, return_distances=False, return_indices=True)
        own = np.indices(mask.shape)
        apart = np.abs(nearest - own) * step[:, None, None, None]
        return np.sqrt((np.maximum(apart - step[:, None, None, None] / 2, 0) ** 2).sum(0))

    return np.where(mask, -to_other(mask), to_other(~mask))


def to_voxel(affine: np.ndarray, world_mm: Sequence[float]) -> tuple[float, float, float]:
    """Voxel coordinates, with fractions, of a place in world mm (R, A, S)."""
    x, y, z = np.linalg.solve(affine[:3, :3], np.asarray(world_mm, float) - affine[:3, 3]).tolist()
    return x, y, z


def free_centres(
    tissue: np.ndarray, spacing: Sequence[float], radius_mm: float, count: int, seed: int = 0
) -> np.ndarray:
    """Random voxels `(n, 3)` around which a ball of this radius lies in the tissue `(X, Y, Z)` bool, no two balls overlapping.

    `count` of them, or fewer where no more fit. Voxel centres within the radius must be tissue.
    """
    step = np.asarray(spacing, float)
    inside = ndimage.distance_transform_edt(np.pad(tissue, 1), sampling=step)[1:-1, 1:-1, 1:-1] > radius_mm
    candidates = np.random.default_rng(seed).permutation(np.argwhere(inside))
    chosen: list[np.ndarray] = []
    while len(candidates) and len(chosen) < count:
        chosen.append(candidates[0])
        apart = np.linalg.norm((candidates - candidates[0]) * step, axis=1)
        candidates = candidates[apart > 2 * radius_mm]
    return np.array(chosen, int).reshape(-1, 3)


def _grid_around(
    shape: Sequence[int], step: np.ndarray, centre: Sequence[float], reach: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The part of the volume within `reach` voxels of the centre: its first voxel, and each voxel's offset in mm `(x, y, z, 3)`."""
    middle = np.asarray(centre, float)
    low = np.clip(np.floor(middle).astype(int) - reach, 0, shape[:3])
    high = np.clip(np.ceil(middle).astype(int) + reach + 1, low, shape[:3])
    axes = [np.arange(a, b) - c for a, b, c in zip(low, high, middle, strict=True)]
    return low, np.stack(np.meshgrid(*axes, indexing="ij"), -1) * step


def _shaped(
    distance: np.ndarray, edge_mm: float, low: np.ndarray, centre: Sequence[float], shape: Sequence[int]
) -> LesionShape:
    weight = np.clip(0.5 - distance / edge_mm, 0, 1) if edge_mm > 0 else (distance <= 0).astype(float)
    if not (weight >= 0.5).any():
        raise InputError(
            f"synthetic lesion: no voxel of it lies in the volume {tuple(shape[:3])} around voxel "
            f"({', '.join(f'{c:.1f}' for c in centre)}): move it, or make it larger than a voxel"
        )
    used = [np.flatnonzero(weight.any(axis=tuple(b for b in range(3) if b != a))) for a in range(3)]
    crop = tuple(slice(int(u[0]), int(u[-1]) + 1) for u in used)
    x, y, z = (int(a + s.start) for a, s in zip(low, crop, strict=True))
    return LesionShape(weight[crop].astype(np.float32), (x, y, z))


def _sphere(count: int) -> np.ndarray:
    """Directions `(count, 3)` spread evenly: a Fibonacci lattice."""
    n = np.arange(count) + 0.5
    z, angle = 1 - 2 * n / count, np.pi * (1 + np.sqrt(5)) * n
    across = np.sqrt(1 - z**2)
    return np.stack([across * np.cos(angle), across * np.sin(angle), z], -1)
