"""Radiomic features of a run's lesions, beside which saliency must show that it tells more.

Definitions of the Image Biomarker Standardisation Initiative (Zwanenburg et al., Radiology 2020;295:328-338,
doi:10.1148/radiol.2020191145), computed by MIRP: `pip install 'xaiseg[radiomics]'`.
"""

import logging
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from tqdm import tqdm

from xaiseg._types import Instance
from xaiseg.analysis.reopened import open_scans
from xaiseg.analysis.run_tables import Run
from xaiseg.errors import InputError
from xaiseg.imaging import Grid

FAMILIES = ("statistics", "cm")  # of intensities: first order, and co-occurrence of grey levels
_BINS = 16  # grey levels from the lesion's smallest to its largest value: lesions are small
_MARGIN = 3  # voxels around the lesion that are handed over


class Radiomics(NamedTuple):
    """values: `(n, k)` in the order of the run's lesions, NaN where a feature is not defined, as for lesions of a few voxels.

    names: `(k,)`, `FAMILY_FEATURE` of shape and `CHANNEL_FAMILY_FEATURE` of intensities.
    """

    values: np.ndarray
    names: tuple[str, ...]


def radiomic_features(run: Run, source: str | Path | None = None) -> Radiomics:
    """Shape once, first-order statistics and grey-level co-occurrence (3-D, merged directions, 16 levels) per channel.

    Intensities are the normalised ones that the network sees; voxels are not resampled. source: the run's input, if it was moved.
    Raises InputError where MIRP is missing or a scan cannot be read.
    """
    check_mirp()
    channels = run.identity["model"]["channels"]
    found: list[dict[str, float]] = [{} for _ in range(len(run))]
    with tqdm(total=len(run), desc="radiomics", unit="lesion") as bar:
        for opened in open_scans(run, range(len(run)), source):
            for place, instance in zip(opened.places, opened.instances, strict=True):
                found[place] = lesion_radiomics(opened.scan.image, opened.scan.grid, instance, channels)
                bar.update()
    names = tuple(dict.fromkeys(name for row in found for name in row))
    values = np.array([[row.get(name, np.nan) for name in names] for row in found], float)
    return Radiomics(values, names)


def check_mirp() -> None:
    """Raises InputError where MIRP is missing."""
    if find_spec("mirp") is None:
        raise InputError("radiomic features: need MIRP, which is missing: pip install 'xaiseg[radiomics]'")


def lesion_radiomics(image: np.ndarray, grid: Grid, instance: Instance, channels: Sequence[str]) -> dict[str, float]:
    """The features of one lesion. image: `(X, Y, Z, C)` on `grid`."""
    logging.getLogger("mirp").setLevel(logging.WARNING)
    low = np.maximum(instance.voxels.min(0) - _MARGIN, 0)
    high = np.minimum(instance.voxels.max(0) + _MARGIN + 1, image.shape[:3])
    box = tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    mask = np.zeros(high - low, np.uint8)
    mask[tuple((instance.voxels - low).T)] = 1
    affine = np.diag([*grid.spacing, 1.0])  # features know distances, not places
    row: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # ITK's generated classes warn when they are made, and crash where warnings are errors
        warnings.simplefilter("ignore")
        from mirp import extract_features

        # arrays are taken to have voxels of 1 mm; files have their own
        lesion = Path(folder) / "mask.nii"
        nib.save(nib.Nifti1Image(mask, affine), lesion)
        for c, channel in enumerate(channels):
            path = Path(folder) / f"image{c}.nii"
            nib.save(nib.Nifti1Image(np.ascontiguousarray(image[box][..., c], np.float32), affine), path)
            (table,) = extract_features(
                image=str(path),
                mask=str(lesion),
                image_modality="mr",
                by_slice=False,
                base_feature_families=[*FAMILIES, *(["morphology"] if c == 0 else [])],
                base_discretisation_method="fixed_bin_number",
                base_discretisation_n_bins=_BINS,
            )
            for name in table.columns:
                family = name.split("_")[0]
                if family in ("stat", "cm", "morph"):
                    key = name if family == "morph" else f"{channel}_{name}"
                    row[key] = float(table[name].iloc[0])
    return row
