"""Choosing the threshold and the smallest lesion by what they give on validation data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from xaiseg.errors import InputError
from xaiseg.instances import label_components, match_instances
from xaiseg.metrics.evaluation import EvaluationSettings, field_of_view
from xaiseg.metrics.lesions import lesion_measures
from xaiseg.metrics.voxels import count_voxels, voxel_measures

AIMS = {"ndsc": "ndsc", "dice": "dice", "f1": "lesion_f1"}  # what to tune for, and the measure of that name
TUNING = {
    "threshold": "On the lesion probability; what is above is lesion",
    "min_voxels": "Predicted lesions of fewer voxels are removed",
    "ndsc": "Mean nDSC over scans",
    "dice": "Mean Dice over scans",
    "lesion_f1": "Mean lesion F1 over scans that have one",
    "lesion_f1_undefined": "Scans without lesions on either side, whose F1 is n/a",
    "chosen": "1 for the combination that is used for all other results, 0 for the others",
}
_MOST = 1000  # combinations; each is a comparison of every scan
_TIE = 1e-9  # far below what a voxel changes, far above the rounding of a mean


class TuningGrid(NamedTuple):
    """The thresholds and sizes of which all combinations are tried; an empty one is not tuned."""

    thresholds: tuple[float, ...] = ()
    min_voxels: tuple[int, ...] = ()


def parse_tuning(words: Sequence[str]) -> TuningGrid:
    """Read `threshold=0.1:0.9:0.05` (first, last and step, both ends included) or `min-voxels=0,3,5,10` (a list).

    Raises InputError for what is neither, and for values that cannot be.

    >>> parse_tuning(["threshold=0.3:0.5:0.1", "min-voxels=0,5"])
    TuningGrid(thresholds=(0.3, 0.4, 0.5), min_voxels=(0, 5))
    """
    found: dict[str, tuple[float, ...]] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or name not in ("threshold", "min-voxels"):
            raise InputError(
                f"--tune {word}: expected threshold=… or min-voxels=…, as in threshold=0.1:0.9:0.05: correct it"
            )
        if name in found:
            raise InputError(f"--tune {word}: {name} is given twice; expected it once: give all its values together")
        values = _values(word, text)
        if name == "threshold" and not all(0 < value < 1 for value in values):
            raise InputError(f"--tune {word}: expected thresholds between 0 and 1: correct it")
        if name == "min-voxels" and not all(value >= 0 and value == int(value) for value in values):
            raise InputError(f"--tune {word}: expected numbers of voxels, whole and from 0: correct it")
        found[name] = tuple(sorted(set(values)))
    grid = TuningGrid(found.get("threshold", ()), tuple(int(value) for value in found.get("min-voxels", ())))
    if (count := max(len(grid.thresholds), 1) * max(len(grid.min_voxels), 1)) > _MOST:
        raise InputError(f"--tune: {count} combinations, expected at most {_MOST}: give fewer values")
    return grid


def tune_case(
    probability: np.ndarray,
    reference: np.ndarray,
    grid: TuningGrid,
    settings: EvaluationSettings,
    brain: np.ndarray | None = None,
) -> np.ndarray:
    """nDSC, Dice and lesion F1 of one scan for all combinations, `(thresholds, sizes, 3)`: those of `evaluate_case`.

    probability: `(X, Y, Z)`. reference, brain: boolean masks, see `evaluate_case`. grid: with both lists filled.
    """
    # Outside of the box no threshold finds anything: V is all that the rest of the volume adds.
    found = ndimage.find_objects(((probability > min(grid.thresholds)) | reference).astype(np.int8))
    box = found[0] if found else (slice(0, 1),) * 3
    outside = field_of_view(np.zeros_like(reference), reference, brain)
    probability, reference = probability[box], reference[box]
    within = reference if brain is None else reference | brain[box]
    outside -= reference.size if brain is None else int(within.sum())
    reference_labels = label_components(reference, settings.connectivity)
    table = np.empty((len(grid.thresholds), len(grid.min_voxels), len(AIMS)))
    for row, threshold in enumerate(grid.thresholds):
        everything = label_components(probability > threshold, settings.connectivity)
        sizes = np.bincount(everything.ravel())
        for column, least in enumerate(grid.min_voxels):
            labels = np.where(sizes >= least, np.arange(len(sizes)), 0)[everything]
            predicted = labels > 0
            total = outside + field_of_view(predicted, reference, None if brain is None else within)
            measures = voxel_measures(count_voxels(predicted, reference, total), settings.r)
            measures |= lesion_measures(match_instances(labels, reference_labels, settings.rule, settings.iou))
            table[row, column] = [measures[name] for name in AIMS.values()]
    return table


def choose(tables: Sequence[np.ndarray], grid: TuningGrid, aim: str) -> list[dict[str, Any]]:
    """The rows of `TUNING` from the tables of all scans, one of them chosen.

    It has the largest mean of the aim; of several, the threshold nearest 0.5, then the smaller size, then the smaller threshold.
    A mean is over the scans that have a value. Raises InputError where no combination has one.
    """
    stacked = np.stack(tables)
    rows: list[dict[str, Any]] = []
    for i, threshold in enumerate(grid.thresholds):
        for j, least in enumerate(grid.min_voxels):
            means = {}
            for name, values in zip(AIMS.values(), stacked[:, i, j].T, strict=True):
                known = values[~np.isnan(values)]
                means[name] = float(known.mean()) if len(known) else np.nan
            undefined = int(np.isnan(stacked[:, i, j, 2]).sum())
            row = {"threshold": threshold, "min_voxels": least, **means, "lesion_f1_undefined": undefined}
            rows.append({**row, "chosen": 0})
    name = AIMS[aim]
    known_rows = [row for row in rows if not np.isnan(row[name])]
    if not known_rows:
        raise InputError(
            f"--tune-for {aim}: no scan has lesions to tune for; expected some: tune for dice, or add scans"
        )
    best = max(row[name] for row in known_rows)
    ties = [row for row in known_rows if row[name] >= best - _TIE]
    chosen = min(ties, key=lambda row: (round(abs(row["threshold"] - 0.5), 9), row["min_voxels"], row["threshold"]))
    chosen["chosen"] = 1
    return rows


def _values(word: str, text: str) -> list[float]:
    """The numbers of `first:last:step`, or of a list."""
    parts = text.split(":") if ":" in text else text.split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if ":" not in text and numbers and np.isfinite(numbers).all():
        return numbers
    if len(numbers) != 3 or not np.isfinite(numbers).all() or numbers[2] <= 0 or numbers[1] < numbers[0]:
        raise InputError(
            f"--tune {word}: expected numbers, as 0,3,5, or first:last:step with a positive step, as 0.1:0.9:0.05: correct it"
        )
    first, last, step = numbers
    count = int((last - first) / step + 1e-9) + 1
    if count > _MOST:
        raise InputError(f"--tune {word}: {count} values, expected at most {_MOST}: give a larger step")
    return [round(first + n * step, 10) for n in range(count)]  # 0.1 + 2 · 0.05 is not 0.2 in binary
