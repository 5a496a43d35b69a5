"""Cases found in a BIDS folder: sub-*/[ses-*/]anat/*_<channel>.nii[.gz], lesions under derivatives/*/."""

import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from xaiseg.errors import InputError
from xaiseg.imaging.case import Case
from xaiseg.imaging.found import Cohort, Rejected

_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_SESSION = re.compile(r"ses-[A-Za-z0-9]+")


class Session(NamedTuple):
    """One session of a subject, or a subject without sessions: its case's name, its folder `anat` and the files there."""

    name: str
    place: Path  # relative to the dataset
    files: list[Path]


def read_bids(folder: Path, channels: Sequence[str]) -> list[Case]:
    """Find the cases of a BIDS dataset, one per subject and session that has the images.

    The BIDS suffix of an image is its channel: `sub-01_ses-1_FLAIR.nii.gz` is the channel FLAIR. Sessions without any
    channel are left out. The reference mask is the one file `*_label-L*_mask` and the map of numbered lesions the one
    file `*_desc-instances*_dseg` in the same place under any folder of `derivatives`, this tool's own results excepted.

    Raises:
        InputError: a session lacks some of the channels, several files fit one, a folder cannot be listed, or there is no
            case at all.
    """
    return bids_cohort(folder, channels, walk(Path(folder))).complete()


def bids_cohort(folder: Path, channels: Sequence[str], sessions: Iterable[Session | Rejected]) -> Cohort:
    """Find cases as `read_bids` does, but reject those that cannot be used and go on.

    Args:
        sessions: the files of each session, or why it has none: from `walk`, or from another index of the dataset.

    Raises:
        InputError: the folder, or its `derivatives`, cannot be listed; or it holds nothing, neither usable nor rejected.
    """
    folder = Path(folder)
    # Once, not for each case: a cohort has thousands.
    derivatives = [child for child in _listed(folder / "derivatives") if not _is_ours(child)]
    cases, rejected = [], []
    for session in sessions:
        if isinstance(session, Rejected):
            rejected.append(session)
            continue
        try:
            case = _case(folder, derivatives, session, channels)
        except InputError as error:
            rejected.append(Rejected(session.name, str(error)))
        else:
            cases += [case] if case else []
    if not cases and not rejected:
        looked_for = ", ".join(f"sub-*/[ses-*/]anat/sub-*_{channel}.nii[.gz]" for channel in channels)
        raise InputError(
            f"{folder}: no case found; expected a BIDS folder with {looked_for}: "
            "check the folder and the channel names, or give a manifest"
        )
    return Cohort(cases, rejected)


def walk(folder: Path) -> Iterator[Session | Rejected]:
    """The sessions of a dataset by its folders, sorted; a folder that cannot be listed is rejected with what it would hold.

    Raises:
        InputError: the dataset's own folder cannot be listed.
    """
    for subject in _children(folder, _listed(folder), _SUBJECT):
        try:
            sessions = ["", *_children(folder / subject, _entered(folder / subject), _SESSION)]
        except InputError as error:
            yield Rejected(subject, str(error))
            continue
        for session in sessions:
            name, place = f"{subject}_{session}" if session else subject, Path(subject, session, "anat")
            try:
                _entered(folder / subject / session)
                found: Session | Rejected = Session(name, place, _entered(folder / place))
            except InputError as error:
                found = Rejected(name, str(error))
            yield found


def _case(folder: Path, derivatives: list[Path], session: Session, channels: Sequence[str]) -> Case | None:
    """The case of a session, None where it has no channel at all."""
    name, place, files = session
    found = {channel: _one(files, folder / place, name, _is_image(channel), channel) for channel in channels}
    images = {channel: path for channel, path in found.items() if path}
    if not images:
        return None
    if missing := [channel for channel in channels if channel not in images]:
        raise InputError(
            f"{folder / place}: no image of channel {', '.join(missing)}, though of {', '.join(images)}; "
            f"expected {name}_*{missing[0]}.nii.gz: add it, or list the complete cases in a manifest"
        )
    maps = [path for child in derivatives for path in _listed(child / place)]
    root = folder / "derivatives"
    return Case(
        name,
        images,
        reference=_one(maps, root, name, _is_reference, "the reference mask"),
        instances=_one(maps, root, name, _is_instances, "the numbered lesions"),
    )


def _one(files: Sequence[Path], root: Path, name: str, fits: Callable[[list[str]], bool], what: str) -> Path | None:
    """The one of `files` that belongs to the case `name` and `fits`; messages name it relative to `root`."""
    fitting = [path for path in files if fits(_entities(path))]
    for path in fitting:
        if not path.name.startswith(f"{name}_"):
            raise InputError(f"{path}: another case's name; expected {name}_… in this folder: move or rename the file")
    if len(fitting) > 1:
        shown = [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in fitting[:3]]
        listed = ", ".join(shown) + (", …" if len(fitting) > 3 else "")
        raise InputError(
            f"{root}: {len(fitting)} files for {what} of {name} ({listed}); "
            "expected one: choose the file of each case in a manifest"
        )
    return fitting[0] if fitting else None


def _children(folder: Path, listed: list[Path], label: re.Pattern[str]) -> list[str]:
    return [path.name for path in listed if label.fullmatch(path.name) and _is_folder(path)]


def _is_folder(path: Path) -> bool:
    """Whether it is one, or would be but for a broken link or missing rights: listing it says so then."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return True


def _entered(folder: Path) -> list[Path]:
    """What a folder that is thought to be there holds; nothing where it is absent, but not behind a broken link."""
    listed = _listed(folder)
    if not listed and folder.is_symlink() and not folder.exists():
        raise InputError(
            f"{folder}: a link to a folder that is not there; expected a folder: fetch it or remove the link"
        )
    return listed


def _listed(folder: Path) -> list[Path]:
    try:
        # Without hidden ones: macOS leaves a "._" twin of every file on foreign disks.
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); expected a readable folder") from error


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
