"""TN: regions of normal-appearing tissue with the shape and size of real lesions, to be explained like lesions.

A region is the voxel set of a lesion, flipped, turned and moved to where tissue looks normal, so that the groups differ in what the
network sees and not in the size of what is asked about.
"""

import zlib
from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path

import numpy as np
from scipy import ndimage

from xaiseg._types import Instance
from xaiseg.analysis.reopened import run_input
from xaiseg.analysis.run_tables import Run
from xaiseg.cohort.output import Files
from xaiseg.cohort.stages import INSTANCES, MASK
from xaiseg.errors import InputError
from xaiseg.imaging import load_scan, nifti, read_cohort
from xaiseg.imaging.manifest import NONE
from xaiseg.instances import instances_of
from xaiseg.saliency.baselines import brightest_class

DISTANCE_MM = 5.0
# Robust standard deviations of white matter that are still normal, and the part of the 3³ voxels around one that must be. On
# phantoms 95 to 98 % of what passes is white matter and 2 to 8 % of unmarked lesions do; with 3 and 0.5, 88 to 92 % and 29 to 46 %.
_SPREADS, _MAJORITY = 2.0, 0.7
_ALIKE = 1e-3  # mm; axes of one spacing may be exchanged
_BLOCK = 2_000_000  # voxels looked up at once
_PROBES = 64  # voxels of a shape that are tried before all of them


def normal_white_matter(
    image: np.ndarray, lesions: np.ndarray, t1w_channel: int = 1, brain: np.ndarray | None = None
) -> np.ndarray:
    """Where tissue looks like normal white matter, bool `(X, Y, Z)`.

    The brightest of three classes of T1w intensity (as `saliency.normal_appearing_white_matter`, whose limits it shares), within
    two robust standard deviations of the class's median in every channel, as are 70 % of the 3³ voxels around.

    image: `(X, Y, Z, C)`, 0 outside the brain. lesions: `(X, Y, Z)`, no white matter where not 0. brain: `(X, Y, Z)`, else where
    no channel is 0.

    Raises InputError for a channel that is not there, shapes that differ, or T1w with fewer than three intensities in the brain.
    """
    if t1w_channel not in range(image.shape[-1]):
        raise InputError(
            f"t1w_channel is {t1w_channel}, the image has {image.shape[-1]} channels, numbered from 0: name the T1w channel"
        )
    inside = (image != 0).all(-1) if brain is None else brain.astype(bool)
    if not inside.shape == lesions.shape == image.shape[:3]:
        raise InputError(
            f"lesions of shape {lesions.shape} and brain of {inside.shape}, expected {image.shape[:3]} as the image: give one grid"
        )
    tissue = inside & (lesions == 0)
    values = image[tissue].astype(np.float64)
    try:
        white = brightest_class(values[:, t1w_channel])
    except ValueError as error:
        raise InputError(f"white matter: {error}: give a brain-extracted scan with a T1w channel") from None
    middle = np.median(values[white], axis=0)
    spread = 1.4826 * np.median(np.abs(values[white] - middle), axis=0)
    found = np.zeros(inside.shape, np.float32)
    found[tissue] = white & (np.abs(values - middle) <= _SPREADS * spread).all(1)
    return tissue & (ndimage.uniform_filter(found, 3, mode="constant") > _MAJORITY)


def sample_true_negatives(
    lesions: np.ndarray,
    tissue: np.ndarray,
    spacing: Sequence[float],
    rng: np.random.Generator,
    like: Sequence[Instance],
    distance_mm: float = DISTANCE_MM,
) -> list[Instance]:
    """Regions of `tissue` with the shapes of lesions: one for each of `like` that fits somewhere, labelled 1, 2, … in that order.

    A region is the lesion's voxels, flipped along random axes and turned by right angles among axes of one spacing, at a place
    drawn evenly among all where every voxel is in `tissue`, none within `distance_mm` of a lesion or of an earlier region
    (between voxel centres). A lesion that fits nowhere, in any of its poses, is left out. Deterministic in `rng`.

    Args:
        lesions: `(X, Y, Z)`, where not 0 there is a lesion, predicted or of the reference.
        tissue: bool `(X, Y, Z)`, as from `normal_white_matter`.
        spacing: of the voxels in mm.
        like: lesions of this scan, or of others with this spacing.

    Raises ValueError for shapes that differ.
    """
    if lesions.shape != tissue.shape:
        raise ValueError(f"lesions of shape {lesions.shape}, tissue of shape {tissue.shape}, expected one shape")
    free = tissue & ~near(lesions != 0, spacing, distance_mm)
    poses = _poses(spacing)
    found: list[Instance] = []
    for lesion in like:
        for pose in rng.permutation(len(poses)):
            axes, signs = poses[pose]
            moved = lesion.voxels[:, axes] * signs
            voxels = _place(moved - moved.min(0), free, rng)
            if voxels is not None:
                found.append(Instance(len(found) + 1, voxels))
                _take(free, voxels, spacing, distance_mm)
                break
    return found


def near(mask: np.ndarray, spacing: Sequence[float], distance_mm: float) -> np.ndarray:
    """The voxels whose centre is within `distance_mm` of that of a voxel of the mask, its own among them."""
    if not mask.any():
        return np.zeros(mask.shape, bool)
    return ndimage.distance_transform_edt(~mask, sampling=spacing) <= distance_mm


def label_map(instances: Sequence[Instance], shape: Sequence[int]) -> np.ndarray:
    """Instances as int32 `(X, Y, Z)`."""
    labels = np.zeros(shape, np.int32)
    for label, voxels in instances:
        labels[tuple(voxels.T)] = label
    return labels


def write_true_negatives(
    run: Run,
    folder: str | Path,
    source: str | Path | None = None,
    t1w: str = "T1w",
    distance_mm: float = DISTANCE_MM,
    most: int | None = None,
    seed: int = 0,
) -> Path:
    """Sample TN regions for every scan of a run and write label maps and a manifest, whose path is returned.

    `xaiseg explain MANIFEST OUT-TN --instances given`, with the options of the run, explains them. As many regions are sought in a
    scan as it has lesions that were explained, with their shapes. They keep away from all lesions: predicted, of the reference, and
    explained. A scan where no region fits, or without lesions, is not in the manifest. The same seed gives a scan the same
    regions whatever the others are.

    Args:
        folder: to write to. source: the run's manifest or BIDS folder, where it is no longer where it was.
        t1w: the channel in which white matter is brightest. most: regions in a scan, of lesions drawn at random.

    Raises InputError where the input cannot be read, has no channel `t1w`, or no region is found in any scan.
    """
    channels = run.identity["model"]["channels"]
    if t1w not in channels:
        raise InputError(
            f"{run.root}: its channels are {', '.join(channels)}, expected {t1w}: name the one that is T1w"
        )
    given = Path(source) if source else run_input(run)
    cases = {case.name: case for case in read_cohort(given, channels).cases}
    files = Files(folder)
    lines: list[dict[str, str]] = []
    for name in dict.fromkeys(run.lesions["case"].tolist()):
        if name not in cases:
            raise InputError(f"{given}: no case {name}, which {run.root} has: give the run's own input")
        case, place = cases[name], int(np.flatnonzero(run.lesions["case"] == name)[0])
        scan = load_scan(case, channels, resample=bool(run.identity.get("resample")))
        explained = nifti.read_labels(run.file(place, INSTANCES), scan.stored_grid)
        lesions = explained + nifti.read_labels(run.file(place, MASK), scan.stored_grid)
        if case.reference is not None:
            lesions += nifti.read_labels(case.reference, scan.stored_grid)
        wanted = run.lesions["lesion"][run.lesions["case"] == name].astype(int)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        tissue = normal_white_matter(scan.image, lesions, channels.index(t1w))
        if most is not None and most < len(wanted):
            wanted = rng.choice(wanted, most, replace=False)
        like = instances_of(explained, sorted(wanted.tolist()))
        regions = sample_true_negatives(lesions, tissue, scan.stored_grid.spacing, rng, like, distance_mm)
        if regions:
            path = files.root / f"{name}_desc-truenegatives_dseg.nii.gz"
            files.label_volume(path, scan, label_map(regions, tissue.shape))
            images = {channel: str(case.images[channel].absolute()) for channel in channels}
            reference = str(case.reference.absolute()) if case.reference else NONE
            line = {"case": name, **images, "reference": reference, "instances": path.name, "patient": case.patient}
            lines.append(line)
    if not lines:
        raise InputError(f"{run.root}: no scan has normal-appearing tissue for a region; give a smaller distance")
    files.table(files.root / "manifest.tsv", list(lines[0]), lines)
    return files.root / "manifest.tsv"


def _poses(spacing: Sequence[float]) -> list[tuple[list[int], np.ndarray]]:
    """Permutations of axes of one spacing, with flips: 48 for cubic voxels, 8 where all sides differ."""
    orders = [
        list(axes)
        for axes in permutations(range(3))
        if all(abs(spacing[a] - spacing[b]) <= _ALIKE for a, b in enumerate(axes))
    ]
    return [(axes, np.array(signs)) for axes in orders for signs in product((1, -1), repeat=3)]


def _place(shape: np.ndarray, free: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """The voxels of a shape `(n, 3)`, moved to a place drawn evenly among all where each is free; None where there is none."""
    candidates = rng.permutation(np.flatnonzero(free))  # for the first voxel of the shape
    offsets = shape - shape[0]
    # a few voxels, its corners first, tell of most places that the shape does not fit
    corners = offsets[np.concatenate([offsets.argmin(0), offsets.argmax(0)])]
    few = offsets[np.unique(np.linspace(0, len(shape) - 1, _PROBES).astype(int))]
    low, step = 0, 64  # few places are looked at first: where tissue is plenty one of them will do
    while low < len(candidates):
        anchors = np.stack(np.unravel_index(candidates[low : low + step], free.shape), -1)
        for some in (corners, few):
            anchors = anchors[_fits(anchors, some, free)]
        block = max(1, _BLOCK // len(shape))
        for start in range(0, len(anchors), block):
            last = anchors[start : start + block]
            if (fits := _fits(last, offsets, free)).any():
                chosen = last[np.flatnonzero(fits)[0]] + offsets
                return chosen[np.lexsort(chosen.T[::-1])].astype(np.int32)
        low, step = low + step, min(4 * step, _BLOCK // len(corners))
    return None


def _fits(anchors: np.ndarray, offsets: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Bool `(m,)`: whether all voxels at these offsets from each anchor `(m, 3)` are in the volume, and free."""
    inside = ((anchors + offsets.min(0) >= 0) & (anchors + offsets.max(0) < free.shape)).all(1)
    fits = inside.copy()
    voxels = anchors[inside][:, None] + offsets
    fits[inside] = free[tuple(np.moveaxis(voxels, -1, 0))].all(1)
    return fits


def _take(free: np.ndarray, voxels: np.ndarray, spacing: Sequence[float], distance_mm: float) -> None:
    """A region, and what is within the distance of it, is free no more."""
    reach = np.ceil(distance_mm / np.array(spacing)).astype(int)
    low, high = np.maximum(voxels.min(0) - reach, 0), np.minimum(voxels.max(0) + reach + 1, free.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    region = np.zeros(high - low, bool)
    region[tuple((voxels - low).T)] = True
    free[box] &= ~near(region, spacing, distance_mm)
