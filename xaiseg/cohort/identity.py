"""What results depend on, the settings of a run and the content of its inputs, so that it can be compared with an earlier run's."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xaiseg._version import __version__
from xaiseg.checkpoints import model_hash
from xaiseg.cohort.methods import Method, Settings
from xaiseg.cohort.work import Request
from xaiseg.imaging import Case
from xaiseg.models import Model

# Of a request, what changes results, and those of explanations besides; the rest says where they come from and go, or which of them
# are wanted.
_DECISIVE = ("instances", "resample", "whole_volume")
_EXPLAINING = ("lesions", "min_voxels", "save_maps", "map_dtype", "pictures")


def identity(model: Model, request: Request, settings: Settings | None, methods: Sequence[Method]) -> dict[str, Any]:
    """What every result of a run depends on besides its inputs, as plain JSON values."""
    found: dict[str, Any] = {
        "xaiseg": __version__,
        "command": "segment" if settings is None else "explain",
        "model": {**asdict(model.spec), "hash": model_hash(model)},
        **{name: getattr(request, name) for name in _DECISIVE},
    }
    if settings is not None:
        found |= {name: getattr(request, name) for name in _EXPLAINING}
        found |= {"precision": settings.precision, "methods": {method.key: method.settings for method in methods}}
    return found


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """One text for each value that is not the same, `samples: 50 before, 20 now`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(before, Mapping) or isinstance(now, Mapping):
        yield f"{name}: {'not there before' if before is None else 'there before, not now'}"
    elif before != now:
        yield f"{name}: {_short(before)} before, {_short(now)} now"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def fingerprint(case: Case, paths: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Length, time and SHA-256 of every file of a case, by its role."""
    found = {}
    for role, path in (paths or input_files(case)).items():
        status = path.stat()
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found[role] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}
    return found


def input_files(case: Case) -> dict[str, Path]:
    """The files that a case's results depend on, by their roles."""
    maps = {"reference": case.reference, "instances": case.instances}
    return {**case.images, **{role: path for role, path in maps.items() if path is not None}}


def changed_inputs(case: Case, before: Mapping[str, Any]) -> list[str]:
    """Roles whose content is not what it was; a file with its length and time unchanged is taken to be unchanged."""
    files = input_files(case)
    suspects = {}
    for role in dict.fromkeys((*files, *before)):
        if role not in files or role not in before:
            suspects[role] = True
            continue
        try:
            status = files[role].stat()
        except OSError:
            continue  # said when it is read
        if [status.st_size, status.st_mtime_ns] != [before[role]["bytes"], before[role]["mtime_ns"]]:
            now = fingerprint(case, {role: files[role]})
            suspects[role] = now[role]["sha256"] != before[role]["sha256"]
    return [role for role, differs in suspects.items() if differs]
