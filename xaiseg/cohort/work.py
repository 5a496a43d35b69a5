"""What a run is asked to do, and where it is to be done."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xaiseg import imaging
from xaiseg.imaging import Case, Scan
from xaiseg.imaging.nnunet import NnunetPreprocessing
from xaiseg.models import ModelSpec

Print = Callable[[str], Any]
SAVED = ("crop", "full", "none")
MAP_DTYPES = ("float32", "float16")
EXECUTORS = ("local", "dask", "slurm")
LEVELS = ("participant", "group")


@dataclass(frozen=True)
class Request:
    """What to run on, and what to write.

    input: a BIDS folder or a manifest. output: the folder to write. cases: only these names. participants, sessions: only these
    BIDS labels. shard: `(i, n)`, the i-th of n parts of the cases, from 1. index: "pybids" finds cases with pybids.
    instances: in `segmentation.SOURCES`. lesions: only these labels. min_voxels: of an instance.
    resample: other channels onto the first channel's grid. whole_volume: predict, and explain, each volume in one piece.
    save_maps: "crop" around the lesion, "full" grid of the scan, or "none". map_dtype: "float16" keeps its bits of each value.
    pictures: one of each lesion, and of how its peak settled. level: "participant" leaves the tables of the cohort to "group",
    which computes nothing; None does both.
    """

    input: Path
    output: Path
    cases: tuple[str, ...] = ()
    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    index: str | None = None
    instances: str = "predicted"
    lesions: tuple[int, ...] | None = None
    min_voxels: int = 6
    resample: bool = False
    whole_volume: bool = False
    save_maps: str = "crop"
    map_dtype: str = "float32"
    pictures: bool = True
    level: str | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Execution:
    """Where a run is computed; results do not depend on it.

    executor: "local", this process; "dask", the workers of a Dask scheduler at `scheduler`, or `workers` processes on this
    machine; "slurm", `workers` SLURM jobs, as dask-jobqueue's own configuration and `job_options` describe one.
    stop_on_first_crash: leave the rest when something fails.
    """

    executor: str = "local"
    scheduler: str | None = None
    workers: int | None = None
    job_options: tuple[tuple[str, str], ...] = ()
    stop_on_first_crash: bool = False


def load_scan(case: Case, spec: ModelSpec, resample: bool = False) -> Scan:
    """The scan of a case as the model of `spec` takes it. `resample`: bring other channels onto the first channel's grid.

    Raises InputError where a file cannot be used, or the channels are on different grids.
    """
    plan = NnunetPreprocessing.from_dict(spec.preprocessing, "model.json") if spec.normalisation == "nnunet" else None
    return imaging.load_scan(case, spec.channels, spec.orientation, resample, plan)
