"""nnU-Net's dataset fingerprint: sizes, spacings and lesion intensities of the training cases, all that its plan is made from.

Source: `DatasetFingerprintExtractor` of nnunetv2 2.8.1, whose dataset_fingerprint.json this equals. Cases stream by: of each one
only its lesion voxels are kept.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xaiseg.errors import InputError

STATISTICS = ("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5")
SAMPLES = 100_000_000  # draws of lesion voxels over all cases, nnU-Net's number
SEED = 1234  # nnU-Net's; each case starts from it
_CHUNK = 1_000_000  # draws held at once; the stream of draws does not depend on it


class LoadedCase(NamedTuple):
    """image: `(X, Y, Z, C)`, as stored, not normalised. reference: `(X, Y, Z)`, lesions above 0. spacing: along X, Y, Z in mm.
    name: what messages call the case."""

    image: np.ndarray
    reference: np.ndarray
    spacing: tuple[float, float, float]
    name: str = ""


@dataclass(frozen=True)
class Fingerprint:
    """What dataset_fingerprint.json holds. Its axes are nnU-Net's, (Z, Y, X): those of the file in reverse.

    Attributes:
        spacings: of each case, in mm.
        shapes_after_crop: of each case, in voxels: the box around what is not zero in some channel.
        intensities: of each channel, the `STATISTICS` of its lesion voxels, in the unit of the images.
        median_relative_size_after_cropping: voxels in that box over voxels of the image, the median over cases.
    """

    spacings: tuple[tuple[float, ...], ...]
    shapes_after_crop: tuple[tuple[int, ...], ...]
    intensities: tuple[Mapping[str, float], ...]
    median_relative_size_after_cropping: float

    def to_dict(self) -> dict[str, Any]:
        """In the layout of dataset_fingerprint.json, as JSON takes it; `from_dict` reads it back."""
        return {
            "spacings": [list(s) for s in self.spacings],
            "shapes_after_crop": [list(s) for s in self.shapes_after_crop],
            "foreground_intensity_properties_per_channel": {str(c): dict(v) for c, v in enumerate(self.intensities)},
            "median_relative_size_after_cropping": self.median_relative_size_after_cropping,
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], source: str) -> "Fingerprint":
        """Read what `to_dict` or nnU-Net made. source: for messages, a path.

        Raises:
            InputError: a field is missing or cannot be nnU-Net's; names it.
        """

        def refuse(name: str, expected: str) -> InputError:
            found = repr(given[name])[:80] if name in given else "missing"
            return InputError(f"{source}: {name} is {found}, expected {expected}; take nnU-Net's own file")

        spacings: Any = given.get("spacings")
        shapes: Any = given.get("shapes_after_crop")
        if not _is_table(spacings):
            raise refuse("spacings", "three lengths in mm for each case")
        if not _is_table(shapes) or len(shapes) != len(spacings) or any(n != int(n) for s in shapes for n in s):
            raise refuse("shapes_after_crop", f"three whole numbers of voxels for each of {len(spacings)} cases")
        properties: Any = given.get("foreground_intensity_properties_per_channel")
        channels = range(len(properties)) if isinstance(properties, Mapping) else ()
        if not channels or not all(_has_statistics(properties.get(str(c))) for c in channels):
            raise refuse("foreground_intensity_properties_per_channel", f"{', '.join(STATISTICS)} for 0, 1, …")
        relative: Any = given.get("median_relative_size_after_cropping")
        if not (_is_number(relative) and 0 < relative <= 1):
            raise refuse("median_relative_size_after_cropping", "a number above 0 and up to 1")
        return cls(
            tuple(tuple(map(float, s)) for s in spacings),
            tuple(tuple(map(int, s)) for s in shapes),
            tuple({name: float(properties[str(c)][name]) for name in STATISTICS} for c in channels),
            float(relative),
        )


def take_fingerprint(
    cases: Iterable[LoadedCase], count: int, *, samples: int = SAMPLES, seed: int = SEED
) -> Fingerprint:
    """The fingerprint of cases that pass by once; nnU-Net's own numbers with the default options.

    Each case gives `samples // count` draws with replacement of its lesion voxels, so that patients with many lesions do not
    outweigh the others; a case without lesions gives none. Voxels outside the box around the image are left out. Draws are
    counted, not stored, so that memory grows with lesion voxels and not with draws.

    Args:
        cases: with their axes as nnU-Net's reader would have them: as stored for SimpleITKIO and NibabelIO, in RAS for
            NibabelIOWithReorient.
        count: how many cases there are.
        samples: draws over all cases.
        seed: of the draws, the same for each case.

    Returns:
        Statistics in float64; nnU-Net's are float32, which may differ in the seventh digit.

    Raises:
        InputError: an image is zero throughout or holds NaN; a reference holds NaN or is not on its image's grid; spacings are not
            positive; channels differ in number between cases; no case has a lesion.
        ValueError: `cases` are not `count`, or there would be no draw.

    Example:
        >>> image = np.arange(24.0).reshape(2, 3, 4, 1)
        >>> found = take_fingerprint([LoadedCase(image, image[..., 0] > 20, (1.0, 1.0, 3.0))], count=1, samples=1000)
        >>> found.spacings, found.shapes_after_crop, found.intensities[0]["max"]
        (((3.0, 1.0, 1.0),), ((4, 3, 2),), 23.0)
    """
    draws = samples // max(count, 1)
    if draws < 1:
        raise ValueError(f"{samples} samples for {count} cases; expected at least one for each of one case or more")
    spacings, shapes, relative_sizes = [], [], []
    drawn: list[list[tuple[np.ndarray, np.ndarray]]] = []  # per channel and case, values and how often each was drawn
    for number, case in enumerate(cases, start=1):
        name = case.name or f"case {number}"
        _check(case, name, len(drawn))
        box = _box_of_nonzero(case.image, name)
        drawn = drawn or [[] for _ in range(case.image.shape[-1])]
        for channel, found in zip(drawn, _draw(case, box, draws, seed), strict=True):
            channel.append(found)
        shape = tuple(side.stop - side.start for side in box)
        spacings.append(tuple(float(s) for s in reversed(case.spacing)))
        shapes.append(shape[::-1])
        relative_sizes.append(math.prod(shape) / math.prod(case.image.shape[:3]))
    if len(shapes) != count:
        raise ValueError(f"{len(shapes)} cases came by, but count is {count}")
    if not any(len(values) for values, _ in drawn[0]):
        raise InputError(
            f"references: none of {count} has a lesion within its image; expected some to plan for: give the lesion masks"
        )
    intensities = tuple(
        _statistics(*(np.concatenate(part) for part in zip(*channel, strict=True))) for channel in drawn
    )
    return Fingerprint(tuple(spacings), tuple(shapes), intensities, float(np.median(relative_sizes)))


def read_fingerprint(path: str | Path) -> Fingerprint:
    """Read a dataset_fingerprint.json. Raises InputError where it is missing, no JSON or not nnU-Net's."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); give a dataset_fingerprint.json") from error
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path}: holds a {type(content).__name__}, expected an object; give a dataset_fingerprint.json"
        )
    return Fingerprint.from_dict(content, str(path))


def _check(case: LoadedCase, name: str, channels: int) -> None:
    """channels: of the cases before, 0 for the first."""
    if case.image.ndim != 4 or case.reference.shape != case.image.shape[:3]:
        raise InputError(
            f"{name}: image {case.image.shape} and reference {case.reference.shape}; expected (X, Y, Z, C) and the same X, Y, Z: "
            "resample the reference to the image"
        )
    if channels not in (0, case.image.shape[-1]):
        raise InputError(
            f"{name}: {case.image.shape[-1]} channels, but {channels} in the cases before; expected the same sequences for each: "
            "leave the case out or complete it"
        )
    if len(case.spacing) != 3 or not all(0 < s < math.inf for s in case.spacing):
        raise InputError(f"{name}: spacing is {case.spacing}, expected three lengths in mm: correct the header")
    if np.isnan(case.image).any() or np.isnan(case.reference).any():
        raise InputError(
            f"{name}: NaN in the image or the reference; expected numbers: replace them, by 0 outside the brain"
        )


def _box_of_nonzero(image: np.ndarray, name: str) -> tuple[slice, ...]:
    """nnU-Net also fills holes, which does not move the box."""
    nonzero = np.zeros(image.shape[:3], bool)
    for channel in range(image.shape[-1]):
        nonzero |= image[..., channel] != 0
    if not nonzero.any():
        raise InputError(f"{name}: all voxels are zero; expected an image, give the right file")
    sides = []
    for axis in range(3):
        inside = np.flatnonzero(nonzero.any(axis=tuple(a for a in range(3) if a != axis)))
        sides.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(sides)


def _draw(case: LoadedCase, box: tuple[slice, ...], draws: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each channel, the lesion voxels that were drawn and how often, one stream of draws for all channels."""
    # nnU-Net's own generator and order of voxels, so that its file comes out.
    random = np.random.RandomState(seed)
    lesion = case.reference[box].T > 0
    found = []
    for channel in range(case.image.shape[-1]):
        values = case.image[..., channel][box].T[lesion]
        counts = np.zeros(len(values), np.int64)
        for start in range(0, draws if len(values) else 0, _CHUNK):
            drawn = random.choice(len(values), min(_CHUNK, draws - start))
            counts += np.bincount(drawn, minlength=len(values))
        found.append((values[counts > 0].astype(np.float64), counts[counts > 0]))
    return found


def _statistics(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Of the list in which `values[i]` stands `counts[i]` times."""
    order = np.argsort(values, kind="stable")
    values, last = values[order], np.cumsum(counts[order])
    total = int(last[-1])

    def percentile(q: float) -> float:
        below, share = divmod(q / 100 * (total - 1), 1)
        a, b = values[np.searchsorted(last, [below, min(below + 1, total - 1)], side="right")]
        return float(a + share * (b - a))

    mean = np.average(values, weights=counts[order])
    return {
        "mean": float(mean),
        "median": percentile(50),
        "std": float(np.sqrt(np.average((values - mean) ** 2, weights=counts[order]))),
        "min": float(values[0]),
        "max": float(values[-1]),
        "percentile_00_5": percentile(0.5),
        "percentile_99_5": percentile(99.5),
    }


def _is_table(value: Any) -> bool:
    """Whether `value` has a row of three positive numbers for each case."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(row, list | tuple) and len(row) == 3 for row in value)
        and all(_is_number(v) and v > 0 for row in value for v in row)
    )


def _has_statistics(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_number(value.get(name)) for name in STATISTICS)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
