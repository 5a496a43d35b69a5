"""Which synthetic lesions are put into which scans of a run: their places, shapes and contrasts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from xaiseg.analysis.insertion import tissue_spread
from xaiseg.analysis.lesion_shape import LesionShape, ellipsoid, free_centres, like_lesion, to_voxel
from xaiseg.analysis.normal_tissue import lesions_of, seed_of, white_matter_of
from xaiseg.analysis.reopened import OpenScan
from xaiseg.analysis.run_tables import Run
from xaiseg.errors import InputError

SHAPES, UNITS, ALL = ("ball", "lesion"), ("spread", "intensity"), "all"
SERIES = 4  # that a picture can tell apart
_REACH_MM, _REACH_VOXELS = (
    8.0,
    4.0,
)  # of the tissue around a place, whichever is farther: of coarse voxels 8 mm hold few
_EDGE_MM = 1.0
_FEW_VOXELS = 20  # of a real lesion: with fewer there is no shape to speak of
_DARK = ("t1w", "mprage")  # channels in which lesions are dark


@dataclass(frozen=True)
class Design:
    """Which lesions are put in.

    places: in each scan, drawn in its normal-appearing white matter. centres_mm: places `(R, A, S)` instead, the same in each scan.
    diameters_mm: at every place one lesion after another of each. shape: "ball", or "lesion", a real one of the scan, scaled.
    roughness: of a ball, see `lesion_shape.ellipsoid`.
    contrasts: rising, from 0 or more. unit: "spread" of the tissue around the place, see `tissue_spread`, or "intensity".
    signs: by channel, 1 bright or -1 dark; by default dark in T1w and bright elsewhere. series: names of channels that have the
    lesion alone, and "all" for all of them together; by default each channel alone and all, four series at most.
    """

    places: int = 2
    centres_mm: tuple[tuple[float, float, float], ...] = ()
    diameters_mm: tuple[float, ...] = (6.0, 10.0)
    shape: str = "ball"
    roughness: float = 0.15
    contrasts: tuple[float, ...] = (0.0, 2.0, 4.0, 6.0, 8.0)
    unit: str = "spread"
    signs: Mapping[str, int] = field(default_factory=dict)
    series: tuple[str, ...] = ()


class Planned(NamedTuple):
    """A lesion to put in. unit: `(C,)` of contrast, in the image's intensities. like: label of the real lesion, if any."""

    shape: LesionShape
    place: int
    centre_mm: tuple[float, float, float]
    diameter_mm: float
    unit: np.ndarray
    like: int | None


def signs_of(design: Design, channels: Sequence[str]) -> dict[str, int]:
    """By channel, 1 where lesions are bright and -1 where they are dark. Raises InputError for channels that are not there."""
    if unknown := [name for name in design.signs if name not in channels]:
        raise InputError(
            f"sign of {unknown[0]}: the model's channels are {', '.join(channels)}, expected one of them: name it as the model does"
        )
    return {name: design.signs.get(name, -1 if name.lower() in _DARK else 1) for name in channels}


def directions(design: Design, channels: Sequence[str]) -> dict[str, np.ndarray]:
    """By name of the series, `(C,)` the sign of each channel's contrast, 0 where it has none.

    Raises InputError for unknown channels or more than four series.

    >>> {name: d.tolist() for name, d in directions(Design(), ("FLAIR", "T1w")).items()}
    {'FLAIR alone': [1, 0], 'T1w alone': [0, -1], 'FLAIR and T1w': [1, -1]}
    """
    signs = signs_of(design, channels)
    together = (ALL,) if len(channels) > 1 else ()
    wanted = tuple(dict.fromkeys(design.series)) or (*channels[: SERIES - 1], *together)
    if unknown := [name for name in wanted if name not in (*channels, ALL)]:
        raise InputError(
            f"series {unknown[0]}: the model's channels are {', '.join(channels)}, expected some of these, or {ALL}: name them so"
        )
    if len(wanted) > SERIES:
        raise InputError(f"{len(wanted)} series, expected {SERIES} at most, which a picture can tell apart: name fewer")
    found = {}
    for name in wanted:
        used = channels if name == ALL else (name,)
        title = (
            f"{name} alone" if name != ALL else " and ".join(p for p in (", ".join(channels[:-1]), channels[-1]) if p)
        )
        found[title] = np.array([signs[channel] * (channel in used) for channel in channels])
    return found


def contrasts_of(design: Design, series: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Contrasts `(K, C)` of all series, each once (0 is the same image in all), and which of them each series takes.

    Raises InputError unless the contrasts rise from 0 or more.
    """
    levels = [float(level) for level in design.contrasts]
    if not levels or not np.isfinite(levels).all() or levels[0] < 0 or any(b <= a for a, b in pairwise(levels)):
        raise InputError(f"contrasts {levels}: expected rising numbers from 0 or more: give some such as 0, 2, 4")
    found: dict[tuple[float, ...], int] = {}
    which = {
        name: [found.setdefault(tuple((level * signs + 0.0).tolist()), len(found)) for level in levels]
        for name, signs in series.items()
    }
    return np.array(list(found)), which


def choose_cases(run: Run, cases: Sequence[str], scans: int, seed: int) -> list[str]:
    """These cases, or `scans` drawn from all that were segmented, so that no patient has two before each has one.

    Raises InputError for a case that was not.
    """
    patients = {row["case"]: row["patient"] for row in run.cases if row["status"] != "failed"}
    if unknown := [name for name in cases if name not in patients]:
        raise InputError(
            f"{run.root}: no segmented scan {unknown[0]}, expected one of {len(patients)}, such as {next(iter(patients))}: name "
            "some of these"
        )
    if cases:
        return list(dict.fromkeys(cases))
    rounds: dict[str, int] = {}
    turns = []
    for name in np.random.default_rng(seed).permutation(list(patients)).tolist():
        rounds[patients[name]] = rounds.get(patients[name], 0) + 1
        turns.append((rounds[patients[name]], name))
    drawn = {name for _, name in sorted(turns, key=lambda turn: turn[0])[:scans]}
    return [name for name in patients if name in drawn]


def planned(
    run: Run, opened: OpenScan, design: Design, channels: Sequence[str], seed: int, notes: list[str]
) -> list[Planned]:
    """The lesions of one scan; what is not as asked is noted.

    Raises InputError where white matter cannot be told and no centres are given, a centre lies outside of the brain, the tissue
    around has too few voxels for a spread, or no lesion of the scan gives a shape.
    """
    image, grid, name = opened.scan.image, opened.scan.grid, opened.case.name
    lesions, largest = lesions_of(run, opened), max(design.diameters_mm)
    white: np.ndarray | None = None
    try:
        white = white_matter_of(opened, lesions, channels)
    except InputError as error:
        if not design.centres_mm:
            raise InputError(f"{name}: places cannot be drawn, {error}, or give --centre") from error
        if design.unit == "spread":
            notes.append(f"{name}: contrasts are in spreads of all tissue around, not white matter alone; {error}")
    if design.centres_mm:
        centres = [_in_brain(opened, centre) for centre in design.centres_mm]
    else:
        assert white is not None
        found = free_centres(white, grid.spacing, (largest + _EDGE_MM) / 2, design.places, seed_of(seed, name))
        centres = [(float(x), float(y), float(z)) for x, y, z in found]
        if len(centres) < design.places:
            notes.append(f"{name}: normal white matter has {len(centres)} of {design.places} places for {largest:g} mm")
    reach = max(_REACH_MM, _REACH_VOXELS * max(grid.spacing))
    rows: list[Planned] = []
    for place, centre in enumerate(centres, start=1):
        like, shapes = _shapes(opened, design, centre, seed_of(seed, name, place))
        unit = np.ones(len(channels))
        if design.unit == "spread":
            outer = shapes[design.diameters_mm.index(largest)]
            try:
                unit = tissue_spread(image, outer, grid.spacing, tissue=white, exclude=lesions, reach_mm=reach)
            except InputError as error:
                raise InputError(f"{name}, place {place}: {error}") from error
        x, y, z = grid.to_world(np.array(centre)).tolist()
        for diameter, shape in zip(design.diameters_mm, shapes, strict=True):
            rows.append(Planned(shape, place, (x, y, z), diameter, unit, like))
    return rows


def _in_brain(opened: OpenScan, centre_mm: Sequence[float]) -> tuple[float, float, float]:
    """Voxel coordinates of a centre."""
    image = opened.scan.image
    centre = to_voxel(opened.scan.grid.affine, centre_mm)
    nearest = np.round(centre).astype(int)
    held = bool((nearest >= 0).all() and (nearest < image.shape[:3]).all())
    if not held or not (image[tuple(nearest)] != 0).any():
        raise InputError(
            f"{opened.case.name}: the centre {','.join(f'{c:g}' for c in centre_mm)} mm lies in "
            f"{'the background' if held else 'no voxel of the scan'}, expected a place in the brain: give R,A,S in mm"
        )
    return centre


def _shapes(
    opened: OpenScan, design: Design, centre: Sequence[float], seed: int
) -> tuple[int | None, list[LesionShape]]:
    """A shape for each diameter at a place, and which real lesion they are like."""
    shape, spacing = opened.scan.image.shape, opened.scan.grid.spacing
    if design.shape == "ball":
        options: dict[str, Any] = {"roughness": design.roughness, "edge_mm": _EDGE_MM, "seed": seed}
        return None, [ellipsoid(shape, spacing, centre, diameter, **options) for diameter in design.diameters_mm]
    labels, counts = np.unique(opened.labels[opened.labels > 0], return_counts=True)
    if not (counts >= _FEW_VOXELS).any():
        raise InputError(
            f"{opened.case.name}: its lesions have {counts.max(initial=0)} voxels at most, expected {_FEW_VOXELS} for a shape: "
            "give a ball, or other scans"
        )
    label = int(np.random.default_rng(seed).choice(labels[counts >= _FEW_VOXELS]))
    voxels = np.argwhere(opened.labels == label)
    return label, [
        like_lesion(shape, spacing, centre, voxels, diameter_mm=diameter, edge_mm=_EDGE_MM)
        for diameter in design.diameters_mm
    ]
