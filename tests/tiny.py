"""A two-level U-Net that finds bright blobs, and small scans with such blobs, for tests of whole runs."""

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from xaiseg.checkpoints import save_model
from xaiseg.models import Model, ModelSpec, build_network

CASE = "sub-01_ses-1"
Explain = Callable[..., Path]
SHAPE = (24, 28, 22)
WINDOW = (16, 16, 16)
CHANNELS = ("FLAIR", "T1w")
# Centre and radius in RAS voxels. The blobs are found, the reference knows the first only; the speck stays below the threshold.
BLOBS = (((8, 9, 8), 2.6), ((16, 19, 13), 2.2))
SPECK = ((17, 7, 15), 1.0)
# Powers of two: the affine and its inverse are exact.
RAS = np.array([[1.0, 0, 0, -14.0], [0, 0.5, 0, -17.0], [0, 0, 4.0, -11.0], [0, 0, 0, 1]])


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
    params = jax.tree.map(lambda a: np.array(a) * np.float32(0.08), variables["params"])
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
    numbered = 2 * blob((6, 20, 6), 1.5) + 7 * blob((16, 19, 12), 1.8)
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
    path.write_text(
        "\n".join("\t".join(row) for row in [columns, *([line[c] for c in columns] for line in lines)]) + "\n"
    )
    return path


def progress_free(text: str) -> list[str]:
    """The lines of stderr besides those of progress bars."""
    return [line for line in text.splitlines() if line.strip() and not re.match("(segmenting|explaining): ", line)]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content, every folder with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def timeless(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows without the columns that differ from run to run."""
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def onto(image: nib.Nifti1Image, affine: np.ndarray, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """The values of an image at the same world coordinates of another grid, 0 elsewhere; both share voxel centres."""
    data = np.asarray(image.dataobj)
    index = np.stack(np.meshgrid(*map(np.arange, data.shape[:3]), indexing="ij"), -1).reshape(-1, 3)
    places = apply_affine(np.linalg.inv(affine) @ image.affine, index)
    # float32 headers: 1e-3 of a voxel is far above their rounding and far below a misplacement
    assert np.abs(places - places.round()).max() < 1e-3
    x, y, z = places.round().astype(int).T
    assert min(x.min(), y.min(), z.min()) >= 0
    whole = np.zeros((*shape, *data.shape[3:]), data.dtype)
    whole[x, y, z] = data.reshape(len(index), *data.shape[3:])
    return whole
