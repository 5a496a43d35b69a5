"""Radiomic features of lesions: of the scans, beside which saliency must show that it tells more, and of the maps themselves.

Definitions of the Image Biomarker Standardisation Initiative (Zwanenburg et al., Radiology 2020;295:328-338,
doi:10.1148/radiol.2020191145), computed by MIRP: `pip install 'xaiseg[radiomics]'`. Features of the maps are those of the paper's
follow-up, which rejects false lesions by first-order and texture features of the saliency in the lesion grown by 2 voxels; there
PyRadiomics computed them.
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
from scipy import ndimage
from tqdm import tqdm

from xaiseg.analysis.reopened import open_scans
from xaiseg.analysis.run_tables import Run
from xaiseg.analysis.saved_maps import around, saved_maps
from xaiseg.errors import InputError

SOURCES = ("maps", "scans")
_INTENSITY = ("statistics", "cm")  # first order, and co-occurrence of grey levels
_BINS = 16  # grey levels from the smallest to the largest value in the lesion: lesions are small
_MARGIN = 3  # voxels around what is measured that are handed over
_GROWN = 2  # voxels by which a lesion is grown for features of its map: saliency lies around it, too


class Radiomics(NamedTuple):
    """values: `(n, k)` in the order of the run's lesions, NaN where a feature is not defined, as for lesions of a few voxels.

    names: `(k,)`, `morph_FEATURE` of shape, `CHANNEL_FAMILY_FEATURE` of intensities, behind the method's key for maps.
    """

    values: np.ndarray
    names: tuple[str, ...]


def scan_radiomics(run: Run, source: str | Path | None = None) -> Radiomics:
    """Of scans: shape once, first-order statistics and grey-level co-occurrence (3-D, merged directions, 16 levels) per channel.

    Intensities are the normalised ones that the network sees; voxels are not resampled. source: the run's input, if it was moved.
    Raises InputError where MIRP is missing or a scan cannot be read.
    """
    check_mirp()
    channels = run.identity["model"]["channels"]
    found: list[dict[str, float]] = [{} for _ in range(len(run))]
    with tqdm(total=len(run), desc="radiomics of scans", unit="lesion") as bar:
        for opened in open_scans(run, range(len(run)), source):
            for place, instance in zip(opened.places, opened.instances, strict=True):
                low = np.maximum(instance.voxels.min(0) - _MARGIN, 0)
                high = np.minimum(instance.voxels.max(0) + _MARGIN + 1, opened.scan.image.shape[:3])
                mask = np.zeros(high - low, bool)
                mask[tuple((instance.voxels - low).T)] = True
                box = opened.scan.image[tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))]
                found[place] = features(box, mask, opened.scan.grid.spacing, channels, shape=True)
                bar.update()
    return _table(found)


def map_radiomics(run: Run, notes: list[str]) -> Radiomics:
    """Of the saved maps, in the lesion grown by 2 voxels: first-order statistics and co-occurrence per channel.

    Lesions without a usable map have none, which a line in `notes` tells. Raises InputError where MIRP is missing.
    """
    check_mirp()
    found: list[dict[str, float]] = [{} for _ in range(len(run))]
    for method in run.methods:
        flaws: list[str] = []
        maps = tqdm(saved_maps(run, method, flaws), "radiomics of maps", len(run), unit="lesion")
        for n, saved in enumerate(maps):
            box = None if saved is None else around(saved, np.full(3, _GROWN + _MARGIN))
            if saved is None or box is None:
                continue
            grown = ndimage.binary_dilation(box.mask, ndimage.generate_binary_structure(3, 2), _GROWN) & box.known
            names = [f"{method.key}_{channel}" for channel in method.channels]
            found[n] |= features(box.values, grown, saved.grid.spacing, names, shape=False)
        if missing := sum(not any(name.startswith(f"{method.key}_") for name in row) for row in found):
            first = f"; {flaws[0]}" if flaws else ""
            notes.append(f"radiomics: {missing} of {len(run)} lesions have no usable map of {method.key}{first}")
    return _table(found)


def check_mirp() -> None:
    """Raises InputError where MIRP is missing."""
    if find_spec("mirp") is None:
        raise InputError("radiomic features: need MIRP, which is missing: pip install 'xaiseg[radiomics]'")


def features(
    image: np.ndarray, mask: np.ndarray, spacing: Sequence[float], channels: Sequence[str], *, shape: bool
) -> dict[str, float]:
    """The features of the voxels of a mask `(x, y, z)` in an image `(x, y, z, C)`. spacing: mm. shape: those of the mask, too."""
    logging.getLogger("mirp").setLevel(logging.WARNING)
    affine = np.diag([*spacing, 1.0])  # features know distances, not places
    row: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # ITK's generated classes warn when they are made, and crash where warnings are errors
        warnings.simplefilter("ignore")
        from mirp import extract_features

        # arrays are taken to have voxels of 1 mm; files have their own
        lesion = Path(folder) / "mask.nii"
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), lesion)
        for c, channel in enumerate(channels):
            path = Path(folder) / f"image{c}.nii"
            nib.save(nib.Nifti1Image(np.ascontiguousarray(image[..., c], np.float32), affine), path)
            (table,) = extract_features(
                image=str(path),
                mask=str(lesion),
                image_modality="mr",
                by_slice=False,
                base_feature_families=[*_INTENSITY, *(["morphology"] if shape and c == 0 else [])],
                base_discretisation_method="fixed_bin_number",
                base_discretisation_n_bins=_BINS,
            )
            for name in table.columns:
                family = name.split("_")[0]
                if family in ("stat", "cm", "morph"):
                    row[name if family == "morph" else f"{channel}_{name}"] = float(table[name].iloc[0])
    return row


def _table(found: Sequence[dict[str, float]]) -> Radiomics:
    names = tuple(dict.fromkeys(name for row in found for name in row))
    values = np.array([[row.get(name, np.nan) for name in names] for row in found], float)
    return Radiomics(values.reshape(len(found), len(names)), names)
