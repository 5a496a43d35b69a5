"""What a run is asked to do, and one case of it between its stages."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xaiseg import imaging
from xaiseg._types import Instance
from xaiseg.imaging import Case, Scan
from xaiseg.imaging.nnunet import NnunetPreprocessing
from xaiseg.models import ModelSpec

Print = Callable[[str], Any]


@dataclass(frozen=True)
class Request:
    """What to run on: `input` is a BIDS folder or a manifest; `cases` selects by name; see `Settings` for the rest.

    whole_volume: predict, and explain, each volume in one piece instead of in windows.
    """

    input: Path
    output: Path
    cases: tuple[str, ...] = ()
    instances: str = "predicted"
    lesions: tuple[int, ...] | None = None
    min_voxels: int = 6
    resample: bool = False
    whole_volume: bool = False
    overwrite: bool = False
    dry_run: bool = False


def load_scan(case: Case, spec: ModelSpec, resample: bool = False) -> Scan:
    """The scan of a case as the model of `spec` takes it. `resample`: bring other channels onto the first channel's grid.

    Raises InputError where a file cannot be used, or the channels are on different grids.
    """
    plan = NnunetPreprocessing.from_dict(spec.preprocessing, "model.json") if spec.normalisation == "nnunet" else None
    return imaging.load_scan(case, spec.channels, spec.orientation, resample, plan)


@dataclass
class Work:
    """One case between segmentation and explanation: only what is small is kept."""

    case: Case
    row: dict[str, Any]
    instances: list[Instance] = field(default_factory=list)
    lesion_rows: list[dict[str, Any]] = field(default_factory=list)
    volume_shape: tuple[int, ...] = ()
    present: int = 0
