"""Cases found in a BIDS folder: sub-*/[ses-*/]anat/*_<channel>.nii[.gz], lesions under derivatives/*/."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from xaiseg.errors import InputError
from xaiseg.imaging.case import Case

_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_SESSION = re.compile(r"ses-[A-Za-z0-9]+")


def read_bids(folder: Path, channels: Sequence[str]) -> list[Case]:
    """Find the cases of a BIDS dataset, one per subject and session that has the images.

    The BIDS suffix of an image is its channel: `sub-01_ses-1_FLAIR.nii.gz` is the channel FLAIR. Sessions without any
    channel are left out. The reference mask is the one file `*_label-L*_mask` and the map of numbered lesions the one
    file `*_desc-instances*_dseg` in the same place under any folder of `derivatives`, this tool's own results excepted.

    Raises:
        InputError: a session lacks some of the channels, several files fit one, or there is no case at all.
    """
    folder = Path(folder)
    cases = []
    for subject in _children(folder, _SUBJECT):
        for session in ("", *_children(folder / subject, _SESSION)):
            name = f"{subject}_{session}" if session else subject
            place = Path(subject, session, "anat")
            found = {channel: _one(folder / place, name, _is_image(channel), channel) for channel in channels}
            images = {channel: path for channel, path in found.items() if path}
            if not images:
                continue
            if missing := [channel for channel in channels if channel not in images]:
                raise InputError(
                    f"{folder / place}: no image of channel {', '.join(missing)}, though of {', '.join(images)}; "
                    f"expected {name}_*{missing[0]}.nii.gz: add it, or list the complete cases in a manifest"
                )
            cases.append(
                Case(
                    name,
                    images,
                    reference=_one(folder / "derivatives", name, _is_reference, "the reference mask", place),
                    instances=_one(folder / "derivatives", name, _is_instances, "the numbered lesions", place),
                )
            )
    if not cases:
        looked_for = ", ".join(f"sub-*/[ses-*/]anat/sub-*_{channel}.nii[.gz]" for channel in channels)
        raise InputError(
            f"{folder}: no case found; expected a BIDS folder with {looked_for}: "
            "check the folder and the channel names, or give a manifest"
        )
    return cases


def _children(folder: Path, label: re.Pattern[str]) -> list[str]:
    return sorted(path.name for path in _listed(folder) if label.fullmatch(path.name) and path.is_dir())


def _listed(folder: Path) -> list[Path]:
    try:
        # Without hidden ones: macOS leaves a "._" twin of every file on foreign disks.
        return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); expected a readable folder") from error


def _one(
    folder: Path, name: str, fits: Callable[[list[str]], bool], what: str, below: Path | None = None
) -> Path | None:
    """The file in `folder`, or at `below` in any of its subfolders, that belongs to the case `name` and `fits`."""
    folders = [folder] if below is None else [child / below for child in _listed(folder) if not _is_ours(child)]
    files = [path for place in folders for path in _listed(place) if fits(_entities(path))]
    for path in files:
        if not path.name.startswith(f"{name}_"):
            raise InputError(f"{path}: another case's name; expected {name}_… in this folder: move or rename the file")
    if len(files) > 1:
        listed = ", ".join(str(path.relative_to(folder)) for path in files[:3]) + (", …" if len(files) > 3 else "")
        raise InputError(
            f"{folder}: {len(files)} files for {what} of {name} ({listed}); "
            "expected one: choose the file of each case in a manifest"
        )
    return files[0] if files else None


def _is_ours(derivative: Path) -> bool:
    """Whether a folder of derivatives was written by xaiseg: its predictions are no reference to compare with."""
    try:
        description = json.loads((derivative / "dataset_description.json").read_text(encoding="utf-8"))
        return any(tool.get("Name") == "xaiseg" for tool in description.get("GeneratedBy", []))
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _entities(path: Path) -> list[str]:
    """The parts of a BIDS name, the suffix last; empty for other files."""
    match = re.fullmatch(r"(.+)\.nii(\.gz)?", path.name)
    return match[1].split("_") if match else []


def _is_image(channel: str) -> Callable[[list[str]], bool]:
    return lambda entities: entities[-1:] == [channel]


def _is_reference(entities: list[str]) -> bool:
    return "label-L" in entities and entities[-1] == "mask"


def _is_instances(entities: list[str]) -> bool:
    return "desc-instances" in entities and entities[-1] == "dseg"
