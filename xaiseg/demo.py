"""The built-in example: unseen phantoms, segmented and explained with a small U-Net that this project trained on phantoms."""

from pathlib import Path
from typing import Any

import numpy as np

from xaiseg.checkpoints import load_model
from xaiseg.checkpoints.shipped import shipped_folder
from xaiseg.cohort import Request, Settings, explain
from xaiseg.errors import InputError
from xaiseg.imaging import nifti
from xaiseg.imaging.phantom import phantom
from xaiseg.models import Model

# The training command draws its phantoms from seeds of 1000 and more.
_FIRST_SEED = 1
_MANIFEST = "manifest.tsv"


def example_model() -> Model:
    """The small U-Net shipped with the package, trained on phantoms by `python -m training --config example`."""
    return load_model(shipped_folder("example"))


def run_demo(out: Path, cases: int = 2, samples: int = 4, overwrite: bool = False) -> list[dict[str, Any]]:
    """Write phantoms to `OUT/scans`, everything `explain` makes of them and its report to `OUT/results`; returns the rows of
    `cases.tsv`."""
    from xaiseg.report.html import report

    scans = out / "scans"
    if not overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; choose another folder with --out, or give --overwrite")
    if overwrite and out.exists() and any(out.iterdir()) and not (out / "results" / "logs" / "run.json").is_file():
        raise InputError(
            f"{out}: holds no earlier demo, so --overwrite does not touch it; choose another folder with --out"
        )
    manifest = write_phantoms(scans, cases)
    settings = Settings(methods=("smoothgrad", "gradcam++"), samples=samples)
    rows = explain(example_model(), Request(manifest, out / "results", overwrite=overwrite), settings)
    print()
    pages = report(out / "results", say=lambda _: None)
    print(f"\nlook at   {pages[0]}, in a browser")
    print(f"tables    {out / 'results' / 'lesions.tsv'}, {out / 'results' / 'cases.tsv'}")
    return rows


def write_phantoms(folder: Path, count: int, first_seed: int = _FIRST_SEED, **options: Any) -> Path:
    """Write `count` phantoms (FLAIR, T1w, reference mask) and the manifest that lists them; returns its path.

    options: of `phantom`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    lines = ["case\tFLAIR\tT1w\treference"]
    for number in range(count):
        made = phantom(seed=first_seed + number, **options)
        name = f"sub-phantom{number + 1:0{max(2, len(str(count)))}d}"
        columns = {"FLAIR": made.flair, "T1w": made.t1w, "label-L_mask": (made.lesions > 0).astype(np.uint8)}
        for suffix, array in columns.items():
            nifti.write(folder / f"{name}_{suffix}.nii.gz", array, made.affine)
        lines.append("\t".join([name, *(f"{name}_{suffix}.nii.gz" for suffix in columns)]))
    manifest = folder / _MANIFEST
    manifest.write_text("\n".join(lines) + "\n")
    return manifest
