"""The output folder: BIDS derivatives, each file written to a temporary name and renamed, nothing half-written left behind."""

import contextlib
import csv
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xaiseg._version import __version__
from xaiseg.errors import InputError
from xaiseg.imaging import Case, Scan, nifti

_LOG = Path("logs/run.json")


class OutputFolder:
    """A folder of derivatives. It must be new or empty, or an earlier run's that `overwrite` allows to replace.

    With `overwrite` exactly the files that the earlier run recorded are removed. Raises InputError for a folder that exists and is
    not to be overwritten, that holds something else, or that cannot be written.
    """

    def __init__(self, root: str | Path, overwrite: bool = False) -> None:
        self.root = Path(root)
        self._files: list[Path] = []
        self._case_files: list[Path] = []
        self._earlier: list[Path] = []
        self._created: list[Path] = []
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.root}: is a file, expected a folder to write to; choose another name")
        try:
            occupied = self.root.is_dir() and any(self.root.iterdir())
        except OSError as error:
            raise InputError(f"{self.root}: cannot be read ({error.strerror}); choose another folder") from error
        if occupied:
            if not overwrite:
                raise InputError(f"{self.root}: is not empty; choose another folder or give --overwrite")
            self._earlier = self._recorded()
        self._check_writable()

    def _recorded(self) -> list[Path]:
        log = self.root / _LOG
        try:
            files = json.loads(log.read_text())["files"]
            return [self.root / name for name in files if ".." not in Path(name).parts and not Path(name).is_absolute()]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.root}: is not empty and holds no {_LOG} of an earlier run, so --overwrite does not touch it; choose another folder"
            ) from None

    def _check_writable(self) -> None:
        parent = self.root
        while not parent.exists():
            parent = parent.parent
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise InputError(f"{self.root}: cannot be written ({error.strerror}); choose another folder") from error

    def begin(self) -> None:
        """Remove the earlier run's files; called when the work is known to be possible."""
        for file in [*self._earlier, self.root / _LOG] if self._earlier else []:
            file.unlink(missing_ok=True)
            self._prune(file.parent)
        self._earlier = []

    def path(self, case: Case, name: str) -> Path:
        """The file `NAME` of a case, `sub-01/ses-01/anat/sub-01_ses-01_NAME`."""
        entities = [f"sub-{case.subject}"] + ([f"ses-{case.session}"] if case.session else [])
        return self.root.joinpath(*entities, "anat", "_".join([*entities, name]))

    def volume(self, path: Path, scan: Scan, array: np.ndarray, start: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Write an array, or a crop that begins at `start`, from model orientation onto the scan's stored grid."""
        stored, affine = scan.to_stored(array, start)
        self._write(path, lambda: nifti.write(path, stored, affine, scan.header))

    def figure(self, path: Path, draw: Any) -> None:
        """Let `draw(path)` make a picture; it renames by itself."""
        self._write(path, lambda: draw(path))

    def text(self, path: Path, content: str) -> None:
        def write() -> None:
            temporary = path.with_name(f".{path.name}.tmp")
            try:
                temporary.write_text(content, encoding="utf-8")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

        self._write(path, write)

    def json(self, path: Path, content: Mapping[str, Any]) -> None:
        self.text(path, json.dumps(content, indent=2, default=_plain, ensure_ascii=False) + "\n")

    def table(self, path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
        """A BIDS table: tab-separated, `n/a` for what is missing."""
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
        self.text(path, stream.getvalue())

    def finish_case(self) -> None:
        self._case_files = []

    def discard_case(self) -> None:
        """Remove what was written for the case that failed."""
        for file in self._case_files:
            file.unlink(missing_ok=True)
            self._files.remove(file)
        self._clean_up()
        self._case_files = []

    def discard(self) -> None:
        """Remove all that this run wrote, and the folders it made."""
        for file in self._files:
            file.unlink(missing_ok=True)
        self._files, self._case_files = [], []
        self._clean_up()

    def close(self, log: Mapping[str, Any]) -> None:
        """Write the dataset description and, last, the run log with the list of files."""
        description = {
            "Name": "xaiseg: instance-level saliency",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "xaiseg", "Version": __version__}],
            "SourceDatasets": [{"URL": str(log["input"])}],
        }
        self.json(self.root / "dataset_description.json", description)
        self.text(
            self.root / ".bidsignore",
            "*_saliency.*\n*.png\nlogs/\nlesions.*\ncases.*\n**/*_desc-lesions.tsv\n",
        )
        self.json(self.root / _LOG, {**log, "files": sorted(str(f.relative_to(self.root)) for f in self._files)})

    def _write(self, path: Path, write: Any) -> None:
        for folder in reversed([path.parent, *path.parent.parents]):
            if not folder.exists():
                try:
                    folder.mkdir()
                except OSError as error:
                    raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
                self._created.append(folder)
        try:
            write()
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
        if path not in self._files:
            self._files.append(path)
            self._case_files.append(path)

    def _clean_up(self) -> None:
        for folder in reversed(self._created):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._created = [folder for folder in self._created if folder.exists()]

    def _prune(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent


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
