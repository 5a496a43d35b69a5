"""What a run is asked to do, and one case of it between its stages."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xaiseg._types import Instance
from xaiseg.imaging import Case, Scan, load_scan
from xaiseg.imaging.nnunet import NnunetPreprocessing
from xaiseg.models import Model

Print = Callable[[str], Any]


@dataclass(frozen=True)
class Request:
    """What to run on: `input` is a BIDS folder or a manifest; `cases` selects by name; see `Settings` for the rest."""

    input: Path
    output: Path
    cases: tuple[str, ...] = ()
    instances: str = "predicted"
    lesions: tuple[int, ...] | None = None
    min_voxels: int = 6
    resample: bool = False
    overwrite: bool = False
    dry_run: bool = False


def load(case: Case, model: Model, request: Request) -> Scan:
    """The scan of a case as the model takes it."""
    spec = model.spec
    plan = None
    if spec.normalisation == "nnunet":
        plan = NnunetPreprocessing.from_dict(spec.preprocessing, "model.json")
    return load_scan(case, spec.channels, spec.orientation, request.resample, plan)


@dataclass
class Work:
    """One case between segmentation and explanation: only what is small is kept."""

    case: Case
    row: dict[str, Any]
    instances: list[Instance] = field(default_factory=list)
    lesion_rows: list[dict[str, Any]] = field(default_factory=list)
    volume_shape: tuple[int, ...] = ()
    present: int = 0
