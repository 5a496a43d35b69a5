"""The sessions of a BIDS dataset as pybids finds them, for datasets that are laid out in other ways than ours."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from xaiseg.errors import InputError
from xaiseg.imaging.bids import Session, walk
from xaiseg.imaging.found import Rejected


def indexed(folder: Path, channels: Sequence[str]) -> Iterator[Session | Rejected]:
    """The images of each session, sorted as `bids.walk` does it. pybids passes over folders that it cannot list: they are rejected.

    Raises:
        InputError: pybids is not installed or cannot index the folder.
    """
    rejected = {found.name: found for found in walk(folder) if isinstance(found, Rejected)}
    sessions: dict[tuple[str, str], Session] = {}
    for subject, session, path in _images(folder, channels):
        name = f"{subject}_{session}" if session else subject
        known = sessions.setdefault((subject, session), Session(name, Path(subject, session, "anat"), []))
        known.files.append(path)
    found: dict[str, Session | Rejected] = {session.name: session for session in sessions.values()}
    found |= rejected
    yield from (found[name] for name in sorted(found, key=lambda name: name.split("_")))


def _images(folder: Path, channels: Sequence[str]) -> Iterator[tuple[str, str, Path]]:
    """Subject, session ("" where there is none) and path of each image, sorted by path."""
    try:
        from bids.layout import BIDSLayout, BIDSLayoutIndexer
    except ImportError as error:
        raise InputError(
            f"{folder}: the index 'pybids' needs the package pybids ({error}); pip install 'xaiseg[bids]', "
            "or leave the index out"
        ) from error
    root = folder.absolute()
    try:
        # Without sidecars: nothing here needs them, and one that is no JSON would stop the whole.
        indexer = BIDSLayoutIndexer(validate=False, index_metadata=False)
        layout = BIDSLayout(root, validate=False, indexer=indexer)
        images = layout.get(suffix=list(channels), extension=[".nii", ".nii.gz"], datatype="anat")
        found = sorted((Path(image.path), image.get_entities()) for image in images)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder}: pybids cannot index it ({reason}); expected a BIDS folder: correct it, or leave the index out"
        ) from error
    for path, entities in found:
        if "subject" not in entities or path.name.startswith("."):
            continue
        session = entities.get("session")
        place = folder / path.relative_to(root) if path.is_relative_to(root) else path
        yield f"sub-{entities['subject']}", f"ses-{session}" if session else "", place
