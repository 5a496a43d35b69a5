"""A two-level U-Net that finds bright blobs, and small scans with such blobs, for tests of whole runs."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from xaiseg.checkpoints import save_model
from xaiseg.models import Model, ModelSpec, build_network

SHAPE = (24, 28, 22)
WINDOW = (16, 16, 16)
CHANNELS = ("FLAIR", "T1w")
# In RAS voxels: centre and radius. The first two are found with a reference around the first, the third is small.
BLOBS = (((8, 9, 8), 2.6), ((16, 19, 13), 2.2))
SPECK = ((17, 7, 15), 1.0)
RAS = np.array([[1.2, 0, 0, -14.0], [0, 1.0, 0, -17.0], [0, 0, 1.5, -11.0], [0, 0, 0, 1]])


def tiny_model(orientation: str = "native") -> Model:
    """Random weights around a path that lets bright FLAIR voxels through, so that blobs are found and T1w matters too."""
    spec = ModelSpec(
        "unet",
        {"channels": [4, 8], "strides": [2], "out_channels": 2, "norm": "none"},
        CHANNELS,
        WINDOW,
        orientation=orientation,
        default_layer="bottleneck.conv",
        threshold=0.5,
    )
    variables = build_network(spec).init(jax.random.key(3), jnp.zeros((1, *WINDOW, 2)))
    params = jax.tree.map(lambda a: np.asarray(a) * np.float32(0.08), variables["params"])
    params = jax.tree.map(np.array, params)
    params["encoder0_conv"]["kernel"][..., 0, 0] += 0.05
    params["encoder0_act"]["slope"][:] = 0.1
    params["decoder0_conv"]["kernel"][..., 1, 0] += 0.5
    params["decoder0_conv"]["bias"][1] = -5.2
    return Model(spec, {"params": params})


def write_model(folder: Path, orientation: str = "native") -> Path:
    return save_model(folder, tiny_model(orientation))


def blob(centre: Sequence[int], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return ((grid - np.array(centre)) ** 2).sum(-1) <= radius**2


def volumes(seed: int = 0) -> dict[str, np.ndarray]:
    """FLAIR, T1w, a reference mask (one lesion found, one missed) and a label map with labels 2 and 7; RAS."""
    rng = np.random.default_rng(seed)
    inside = np.zeros(SHAPE, bool)
    inside[2:-2, 2:-2, 2:-2] = True
    flair = 100 + 6 * rng.standard_normal(SHAPE)
    t1w = 80 + 6 * rng.standard_normal(SHAPE)
    for centre, radius in (*BLOBS, SPECK):
        flair[blob(centre, radius)] += 70
        t1w[blob(centre, radius)] -= 25
    reference = blob((9, 9, 8), 2.3) | blob((5, 21, 5), 2.0)
    numbered = 2 * blob((6, 20, 12), 1.5) + 7 * blob((16, 19, 12), 1.8)
    return {
        "FLAIR": np.where(inside, flair, 0).astype(np.float32),
        "T1w": np.where(inside, t1w, 0).astype(np.float32),
        "reference": reference.astype(np.uint8),
        "instances": numbered.astype(np.int16),
    }


def stored(array: np.ndarray, codes: str = "RAS", affine: np.ndarray = RAS) -> nib.Nifti1Image:
    """`array`, given in RAS voxels, as an image whose voxel axes run as `codes`: every voxel keeps its place."""
    transform = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    moved = apply_orientation(array, transform)
    image = nib.Nifti1Image(np.ascontiguousarray(moved), affine @ inv_ornt_aff(transform, array.shape))
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 3)
    return image


def write_case(folder: Path, name: str, seed: int = 0, codes: str = "RAS", affine: np.ndarray = RAS) -> dict[str, str]:
    """The files of a case and its line of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    line = {"case": name}
    for column, array in volumes(seed).items():
        line[column] = f"{name}_{column}.nii.gz"
        nib.save(stored(array, codes, affine), folder / line[column])
    return line


def write_manifest(path: Path, lines: Sequence[dict[str, str]]) -> Path:
    columns = list(lines[0])
    path.write_text("\n".join("\t".join(row) for row in [columns, *([line[c] for c in columns] for line in lines)]) + "\n")
    return path
