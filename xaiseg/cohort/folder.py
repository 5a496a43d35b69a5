"""The folder of a cohort run, which any number of processes may work on: begun once, gone on with, finished by the last of them."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xaiseg.cohort.identity import differences
from xaiseg.cohort.journal import Journal, journalled
from xaiseg.cohort.output import Files, OutputError
from xaiseg.errors import InputError
from xaiseg.imaging import Case

SETTINGS = Path("logs/settings.json")
PLAN = Path("logs/plan.json")
_LOCKS = Path("logs/locks")
_IGNORED = (
    "*_saliency.*",
    "*.png",
    "*.html",
    "logs/",
    "analysis/",
    "report/",
    "lesions.*",
    "cases.*",
    "**/*_desc-lesions.tsv",
)
# Whatever a run may leave: at the top, and in the folders of its cases.
_AT_THE_TOP = (
    *("dataset_description.json", ".bidsignore", "README.md", "space-orig_*.json", "lesions.*", "cases.*"),
    *("desc-*_saliency.json", "desc-*.png", ".*.tmp"),
    *("report.html", "sub-*.html", "report/*", "analysis/*"),  # which speak of results that are gone
)
_OF_A_CASE = (
    *("*_label-L_probseg.nii.gz", "*_label-L_mask.nii.gz", "*_desc-instances_dseg.nii.gz"),
    *("*_saliency.nii.gz", "*_saliency.png", "*_desc-lesions.tsv", "*_convergence.png", ".*.tmp"),
)
_SIDECARS = {
    "label-L_probseg": {"Description": "Probability of the lesion class, blended over the windows"},
    "label-L_mask": {"Description": "Lesions: probability above the threshold", "Type": "Lesion"},
    "desc-instances_dseg": {"Description": "Lesions by number, as in the column lesion of lesions.tsv"},
}
_README = """\
# Lesions and their explanations, by xaiseg

- `lesions.tsv`: a row per lesion with the figures of its saliency maps; `lesions.json` explains the columns
- `cases.tsv`: a row per scan, and what went wrong where something did
- `sub-*/[ses-*/]anat`: probability, mask and numbered lesions on the grid of the scan (`space-orig`), and of each lesion its
  saliency map (x, y, z, channel), whose affine places it on the scan, with a picture
- `desc-*_saliency.json`: how the maps were made
- `analysis`, `report.html`, `sub-*.html`, `report`: where `xaiseg analyse` and `xaiseg report` were asked
- `logs`: settings, times, failures, and `cases/*.jsonl`, by which the same command goes on where it was; `xaiseg status` reads them

Not for clinical use.
"""


class RunFolder(Files):
    """The results of a run, as far as there are any.

    It must be new or empty, or hold a run with the same settings, which is then gone on with, or be left to `overwrite`. Raises
    InputError for a folder that holds something else or cannot be written.
    """

    def __init__(self, root: str | Path, overwrite: bool = False) -> None:
        super().__init__(Path(root).absolute())
        self.shown = Path(root)
        self._lock: int | None = None
        self._created: list[Path] = []
        self._aside = self.root / f".earlier-{os.getpid()}"
        if os.path.lexists(self.root) and not os.path.isdir(self.root):
            raise InputError(f"{self.shown}: is a file, expected a folder to write to; choose another name")
        try:
            self._existed = os.path.isdir(self.root)
            occupied = self._existed and any(self.root.iterdir())
        except OSError as error:
            raise InputError(f"{self.shown}: cannot be read ({error.strerror}); choose another folder") from error
        if occupied:
            self._recover()
        ours = (self.root / SETTINGS).is_file()
        if occupied and not ours and _anything(self.root):
            but = ", so --overwrite does not touch it" if overwrite else ""
            raise InputError(
                f"{self.shown}: is not empty and holds no {SETTINGS} of an earlier run{but}; choose another folder"
            )
        self.fresh = overwrite or not ours
        self._replaces = overwrite and ours
        self.check_writable()

    def compare(self, identity: Mapping[str, Any]) -> None:
        """Raises InputError where the results that are here came from other settings."""
        if self.fresh:
            return
        try:
            before = json.loads((self.root / SETTINGS).read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{self.root / SETTINGS}: cannot be read ({error}); give --overwrite to start anew, or choose another folder"
            ) from error
        if found := list(differences(before, _plain(identity))):
            listed = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
            raise InputError(
                f"{self.shown}: is not empty, and its results came from other settings ({listed}); "
                "give the same settings to go on, --overwrite to start anew, or choose another folder"
            )

    def begin(self, identity: Mapping[str, Any], source: str) -> None:
        """Take the folder for a run of these settings, sharing it with others of the same. Raises InputError as `compare`."""
        lock = self.root / _LOCKS / "run"
        self._make(lock.parent)
        try:
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._lock, (fcntl.LOCK_EX if self._replaces else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            doing = (
                "is working here, which --overwrite would destroy" if self._replaces else "is replacing what is here"
            )
            raise InputError(f"{self.shown}: another run {doing}; stop it, or choose another folder") from error
        except OSError as error:
            raise OutputError(f"{lock}: cannot be written ({error.strerror})") from error
        try:
            self._begin(identity, source)
        except BaseException:
            if self._aside.exists():
                self.discard()
            raise

    def _begin(self, identity: Mapping[str, Any], source: str) -> None:
        assert self._lock is not None
        if self._replaces:
            self._set_aside()
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        if self.fresh:
            self.describe(source, _IGNORED)
            self.text(self.root / "README.md", _README)
            for (
                name,
                meaning,
            ) in _SIDECARS.items():  # of all files whose names end so, by BIDS's principle of inheritance
                self.json(self.root / f"space-orig_{name}.json", {**meaning, "SpatialReference": "orig"})
            self.fresh = self._settle({"identity": _plain(identity), "input": source})
        self.compare(identity)

    def _settle(self, settings: Mapping[str, Any]) -> bool:
        """Write the settings if there are none; whether that was us."""
        final = self.root / SETTINGS
        ours = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        self.json(ours, settings)
        try:
            os.link(ours, final)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            os.replace(ours, final)
        finally:
            ours.unlink(missing_ok=True)
        return True

    def plan(self, cases: list[str]) -> None:
        """Add cases to those that the run is about."""
        with self.exclusively("plan"):
            known = self.planned()
            if more := [case for case in cases if case not in set(known)]:
                self.json(self.root / PLAN, {"cases": sorted(known + more)})

    def planned(self) -> list[str]:
        try:
            return json.loads((self.root / PLAN).read_text(encoding="utf-8"))["cases"]
        except (OSError, ValueError, KeyError):
            return []

    def journal(self, case: str) -> Journal:
        return Journal(self.root, case)

    def of_case(self, case: Case) -> Path:
        """The folder of a case's files."""
        return self.path(case, "").parent

    def clear(self, case: Case) -> None:
        """Remove what there is of a case that this process has claimed: it is begun anew."""
        for pattern in _OF_A_CASE:
            for file in self.of_case(case).glob(pattern):
                file.unlink(missing_ok=True)

    def clean(self, case: Case) -> None:
        """Remove what a killed process had half written of a case that this process has claimed."""
        for file in self.of_case(case).glob(".*.tmp"):
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def exclusively(self, what: str) -> Iterator[None]:
        """One process at a time does this."""
        path = self.root / _LOCKS / what
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def files(self) -> list[Path]:
        """Every file that runs have left here."""
        return sorted(_ours(self.root))

    def close(self) -> None:
        """The run has come to its end; what it replaced is gone."""
        for aside in self.root.glob(".earlier-*"):
            shutil.rmtree(aside, ignore_errors=True)
        self.release()

    def discard(self) -> None:
        """Leave the folder as it was found, unless another process has found work here meanwhile."""
        if self._lock is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                return
        replaced = self._aside.exists()
        locks = [] if replaced else list((self.root / _LOCKS).iterdir())
        for file in [*_ours(self.root), *locks]:
            file.unlink(missing_ok=True)
            _prune(file.parent, self.root)
        if replaced:
            self._put_back(self._aside)
        self.release()
        for folder in reversed(self._created):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _made(self, folder: Path) -> None:
        self._created.append(folder)

    def _recover(self) -> None:
        """Put back what an `overwrite` had set aside that was killed before its own run began."""
        left = list(self.root.glob(".earlier-*"))
        if not left or (self.root / SETTINGS).is_file():
            return
        self._make(self.root / _LOCKS)
        handle = os.open(self.root / _LOCKS / "run", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for aside in left:
                self._put_back(aside)
        except BlockingIOError as error:
            raise InputError(f"{self.shown}: another run is replacing what is here; wait for it") from error
        finally:
            os.close(handle)

    def _put_back(self, aside: Path) -> None:
        files = sorted((f for f in aside.rglob("*") if f.is_file()), key=lambda f: f == aside / SETTINGS)
        for file in files:  # the settings last: while they are missing, this is begun again
            target = self.root / file.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        shutil.rmtree(aside, ignore_errors=True)

    def _set_aside(self) -> None:
        """The settings first: without them the folder is known to be between two runs."""
        for file in sorted(self.files(), key=lambda file: file != self.root / SETTINGS):
            target = self._aside / file.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
            _prune(file.parent, self.root)


def _ours(root: Path) -> Iterator[Path]:
    """Files of a run, those of its cases first: their folders are known by the journals, which come last."""
    for case in journalled(root):
        folder = Files(root).path(Case(case, {}), "").parent
        for pattern in _OF_A_CASE:
            yield from folder.glob(pattern)
    for pattern in _AT_THE_TOP:
        yield from (path for path in root.glob(pattern) if path.is_file())
    locks = root / _LOCKS
    yield from (path for path in (root / "logs").rglob("*") if path.is_file() and path.parent != locks)


def _anything(root: Path) -> bool:
    """Whether a folder holds more than what a start that was cut off leaves."""
    locks = root / _LOCKS
    started = {
        root / "logs",
        locks,
        locks / "run",
        root / "dataset_description.json",
        root / ".bidsignore",
        root / "README.md",
    }
    started |= {root / f"space-orig_{name}.json" for name in _SIDECARS}
    return any(path not in started and not path.name.endswith(".tmp") for path in root.rglob("*"))


def _prune(folder: Path, root: Path) -> None:
    """Remove folders that have become empty, up to `root`, which stays."""
    with contextlib.suppress(OSError):
        while folder != root:
            folder.rmdir()
            folder = folder.parent


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(identity, default=str))
