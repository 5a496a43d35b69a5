"""The output folder: BIDS derivatives, each file written to a temporary name and renamed, nothing half-written left behind."""

import contextlib
import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xaiseg._version import __version__
from xaiseg.errors import InputError
from xaiseg.imaging import Case, Scan, nifti

_LOG = Path("logs/run.json")


class OutputError(InputError):
    """The output cannot be written: no case is to blame, and there is no use in going on with the next."""


class Files:
    """Writes below a folder: each file to a temporary name that is then renamed, folders as they are needed.

    All methods raise OutputError where that fails.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def describe(self, source: str, ignored: Sequence[str]) -> None:
        """The dataset description, by which a folder inside a dataset is known as this tool's results; even of a killed run, so it
        comes first. `ignored` are patterns of files for which BIDS has no name."""
        description = {
            "Name": "xaiseg: instance-level saliency",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "xaiseg", "Version": __version__}],
            "SourceDatasets": [{"URL": source}],
        }
        self.json(self.root / "dataset_description.json", description)
        self.text(self.root / ".bidsignore", "".join(f"{pattern}\n" for pattern in ignored))

    def path(self, case: Case, name: str) -> Path:
        """The file `NAME` of a case, `sub-01/ses-01/anat/sub-01_ses-01_NAME`."""
        entities = [f"sub-{case.subject}"] + ([f"ses-{case.session}"] if case.session else [])
        return self.root.joinpath(*entities, "anat", "_".join([*entities, name]))

    def volume(self, path: Path, scan: Scan, array: np.ndarray, start: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Write an array on the image's grid, or a crop of one that begins at `start`, with its axes as stored."""
        stored, affine = scan.to_stored(array, start)
        self._write(path, lambda: nifti.write(path, stored, affine, scan.header))

    def label_volume(self, path: Path, scan: Scan, array: np.ndarray) -> None:
        """Write an array on the scan's label grid onto its stored grid."""
        stored, affine = scan.labels_to_stored(array)
        self._write(path, lambda: nifti.write(path, stored, affine, scan.header))

    def figure(self, path: Path, draw: Any) -> None:
        """Let `draw(path)` make a picture; it renames by itself."""
        self._write(path, lambda: draw(path))

    def text(self, path: Path, content: str) -> None:
        def write() -> None:
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                temporary.write_text(content, encoding="utf-8")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

        self._write(path, write)

    def json(self, path: Path, content: Mapping[str, Any]) -> None:
        self.text(path, json.dumps(content, indent=2, default=_plain, ensure_ascii=False) + "\n")

    def table(self, path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
        """A BIDS table: tab-separated, `n/a` for what is missing."""
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
        self.text(path, stream.getvalue())

    def _make(self, place: Path) -> None:
        for folder in reversed([place, *place.parents]):
            if not folder.exists():
                try:
                    folder.mkdir(exist_ok=True)  # another run may make it now
                except OSError as error:
                    raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
                self._made(folder)

    def _write(self, path: Path, write: Any) -> None:
        self._make(path.parent)
        self._begun(path)  # before it exists: an interruption just after the renaming must find it listed
        try:
            write()
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
        except InputError as error:  # of `nifti.write`
            raise OutputError(str(error)) from error

    def _begun(self, path: Path) -> None:
        """Told of every file before it is written."""

    def _made(self, folder: Path) -> None:
        """Told of every folder that was made."""

    def check_writable(self) -> None:
        """Raises OutputError."""
        parent = self.root
        # Not Path.exists: it raises for a folder that may not be searched.
        while not os.path.exists(parent):
            parent = parent.parent
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise OutputError(f"{self.root}: cannot be written ({error.strerror}); choose another folder") from error


class OutputFolder(Files):
    """A folder of derivatives. It must be new or empty, or an earlier run's that `overwrite` allows to replace.

    With `overwrite` exactly the files that the earlier run recorded are replaced: set aside by `begin`, removed by `close`, put
    back by `discard`. Raises InputError for a folder that exists and is not to be overwritten, that holds something else, or that
    cannot be written.
    """

    def __init__(self, root: str | Path, overwrite: bool = False) -> None:
        super().__init__(root)
        self._files: dict[Path, None] = {}
        self._earlier: list[Path] = []
        self._created: list[Path] = []
        self._aside = self.root / f".earlier-{os.getpid()}"
        if os.path.lexists(self.root) and not os.path.isdir(self.root):
            raise InputError(f"{self.root}: is a file, expected a folder to write to; choose another name")
        try:
            occupied = os.path.isdir(self.root) and any(self.root.iterdir())
        except OSError as error:
            raise InputError(f"{self.root}: cannot be read ({error.strerror}); choose another folder") from error
        if occupied:
            if not overwrite:
                raise InputError(f"{self.root}: is not empty; choose another folder or give --overwrite")
            self._earlier = self._recorded()
        self.check_writable()

    def _recorded(self) -> list[Path]:
        log = self.root / _LOG
        try:
            files = json.loads(log.read_text())["files"]
            return [log] + [
                self.root / name for name in files if ".." not in Path(name).parts and not Path(name).is_absolute()
            ]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.root}: is not empty and holds no {_LOG} of an earlier run, so --overwrite does not touch it; "
                "choose another folder"
            ) from None

    def begin(self, source: str, ignored: Sequence[str]) -> None:
        """Set the earlier run's files aside; called when the headers are known to be good."""
        self._move(self._earlier, self.root, self._aside)
        self.describe(source, ignored)

    def discard(self) -> None:
        """Leave the folder as it was found."""
        self._remove(list(self._files))
        if self._aside.exists():
            self._move([self._aside / file.relative_to(self.root) for file in self._earlier], self._aside, self.root)

    def close(self, log: Mapping[str, Any]) -> None:
        """Write, last, the run log with the list of files; the earlier run's are gone then."""
        self.json(self.root / _LOG, {**log, "files": sorted(str(f.relative_to(self.root)) for f in self._files)})
        shutil.rmtree(self._aside, ignore_errors=True)

    def _begun(self, path: Path) -> None:
        self._files[path] = None

    def _made(self, folder: Path) -> None:
        self._created.append(folder)

    def _remove(self, files: Sequence[Path]) -> None:
        for file in files:
            file.unlink(missing_ok=True)
        self._files = {file: None for file in self._files if file not in set(files)}
        for folder in reversed(self._created):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._created = [folder for folder in self._created if folder.exists()]

    def _move(self, files: Sequence[Path], source: Path, target: Path) -> None:
        """Move files to the same places below another folder, and remove the folders that this leaves empty."""
        for file in files:
            if file.is_file():
                moved = target / file.relative_to(source)
                moved.parent.mkdir(parents=True, exist_ok=True)
                file.rename(moved)
            with contextlib.suppress(OSError):
                for folder in file.relative_to(self.root).parents[:-1]:
                    (self.root / folder).rmdir()


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, float | np.floating):
        return f"{value:.7g}" if np.isfinite(value) else "n/a"
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)
