"""What is done of each case: a line of JSON for every unit of work, appended when its files are whole.

The journal is the only memory of a run: tables are made from it, and a run that is repeated goes on from it. A line that a
kill cut short is no line. A unit counts as done only while its files are what the line says they are.
"""

import contextlib
import fcntl
import json
import math
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from xaiseg.cohort.output import OutputError

JOURNALS = Path("logs/cases")
_ENDING = ".jsonl"
Unit = tuple[str, int | None]
"""A method's key, or `segmentation`, `input`, and a lesion's label or None for the case as a whole."""


class Journal:
    """The journal of one case below the folder `root` of a run."""

    def __init__(self, root: Path, case: str) -> None:
        # Names of rejected cases can be anything.
        self.root, self.case = root, case
        self.path = root / JOURNALS / f"{quote(case, safe=' ')}{_ENDING}"

    @contextlib.contextmanager
    def claimed(self) -> Iterator[bool]:
        """Whether this process has the case to itself, while the context lasts. A killed process claims nothing."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}); mend that") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                raise OutputError(
                    f"{self.path}: cannot be locked ({error.strerror}); expected a file system with locks: choose another folder"
                ) from error
            yield True
        finally:
            os.close(handle)

    def entries(self) -> list[dict[str, Any]]:
        """The whole lines, oldest first."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        lines = content[: content.rfind(b"\n") + 1].splitlines()
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a disk's damage costs the units it hit
                found.append(decode(line))
        return found

    def append(self, entry: Mapping[str, Any], files: Sequence[Path] = (), anew: bool = False) -> dict[str, Any]:
        """Add a line about units whose `files` are written, and bring it to the disk. `anew`: forget all earlier lines.

        Raises OutputError.
        """
        sums = {str(file.relative_to(self.root)): checksum(file) for file in files}
        line = encode({"case": self.case, **entry, "at": round(time.time(), 3), "files": sums})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                end = file.seek(0, os.SEEK_END)
                if anew:
                    file.truncate(0)
                elif end and _last_byte(file) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                    end = file.seek(0, os.SEEK_END)
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(0 if anew else end)
                    raise
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from error
        return decode(line)


def encode(entry: Mapping[str, Any]) -> bytes:
    """A line: the entry as JSON, null for what is no number, with the CRC-32 of all that comes before it."""
    body = json.dumps(_plain(entry), ensure_ascii=False, allow_nan=False).encode()
    return body[:-1] + b', "crc": %d}\n' % zlib.crc32(body[:-1])


def decode(line: bytes) -> dict[str, Any]:
    """The entry of a line. Raises ValueError for one that is not as it was written."""
    entry, body = json.loads(line), line.rpartition(b', "crc": ')[0]
    if not isinstance(entry, dict) or entry.pop("crc", None) != zlib.crc32(body):
        raise ValueError("a line of a journal is not as it was written")
    return entry


def journalled(root: Path) -> list[str]:
    """The cases that have a journal, in order of their names."""
    return sorted(unquote(path.name.removesuffix(_ENDING)) for path in (root / JOURNALS).glob(f"*{_ENDING}"))


def checksum(file: Path) -> list[int]:
    """Length and CRC-32 of a file."""
    with file.open("rb") as stream:
        length = total = 0
        while block := stream.read(1 << 20):
            length, total = length + len(block), zlib.crc32(block, total)
    return [length, total]


@dataclass
class CaseRecord:
    """What the journal of a case amounts to.

    segmented: the last line about its segmentation. explained: by unit, the lesion's part of a line. failures: by unit, what has
    failed and not succeeded since. finished: the line about the case's own table, if that was made after the last of them.
    """

    name: str
    segmented: dict[str, Any] | None = None
    explained: dict[Unit, dict[str, Any]] = field(default_factory=dict)
    failures: dict[Unit, dict[str, Any]] = field(default_factory=dict)
    timings: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[str, Any] | None = None

    @classmethod
    def read(cls, root: Path, case: str) -> "CaseRecord":
        record = cls(case)
        for entry in Journal(root, case).entries():
            record.add(entry)
        return record

    def add(self, entry: Mapping[str, Any]) -> None:
        kind = entry.get("entry")
        if kind == "segmented":
            self.segmented, self.explained, self.failures = dict(entry), {}, {}
            self.timings = [{"unit": "segmentation", "lesions": "", **_timing(entry)}]
        elif kind == "explained":
            for lesion in entry["lesions"]:
                unit = entry["method"], lesion["lesion"]
                self.explained[unit] = {**lesion, "files": {name: entry["files"][name] for name in lesion["files"]}}
                self.failures.pop(unit, None)
            self.failures.pop(("explanation", None), None)
            self.failures.pop(("input", None), None)
            labels = ",".join(str(lesion["lesion"]) for lesion in entry["lesions"])
            self.timings.append({"unit": entry["method"], "lesions": labels, **_timing(entry)})
        elif kind == "forgotten":
            for method, label in entry["units"]:
                self.explained.pop((method, label), None)
        elif kind == "restarted":
            self.segmented, self.explained, self.failures, self.timings = None, {}, {}, []
        elif kind == "cleared":
            self.failures = {unit: failure for unit, failure in self.failures.items() if unit[1] is not None}
        elif kind == "failed":
            self.failures[entry["unit"], entry["lesion"]] = dict(entry)
        if kind != "cleared":
            self.finished = dict(entry) if kind == "finished" else None

    def lesions(self) -> list[int]:
        """Labels of the instances that are to be explained."""
        return [] if self.segmented is None else self.segmented["explain"]

    def missing(self, methods: Sequence[str]) -> list[Unit]:
        """The units that are not explained."""
        return [(m, label) for m in methods for label in self.lesions() if (m, label) not in self.explained]


def verify(root: Path, case: str) -> list[str]:
    """Have the journal of a claimed case forget the units whose files are missing or other than they were; returns those files."""
    journal, record = Journal(root, case), CaseRecord.read(root, case)
    if record.segmented is None:
        return []
    broken = [name for name in record.segmented["files"] if not _whole(root / name, record.segmented["files"][name])]
    if broken:
        journal.append({"entry": "restarted"})
        return broken
    units = []
    for (method, label), lesion in record.explained.items():
        lost = [name for name, expected in lesion["files"].items() if not _whole(root / name, expected)]
        if lost:
            units.append((method, label))
            broken += lost
    finished = record.finished["files"] if record.finished else {}
    broken += [name for name, expected in finished.items() if not _whole(root / name, expected)]
    if broken:
        journal.append({"entry": "forgotten", "units": units})  # and with them that the case is finished
    return broken


def _timing(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry.get(name) for name in ("seconds", "passes", "at", "worker")}


def _whole(file: Path, expected: Sequence[int]) -> bool:
    try:
        return file.stat().st_size == expected[0] and checksum(file) == list(expected)
    except OSError:
        return False


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int | str) else str(value)
