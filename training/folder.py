"""The folder of a run. Whatever moment the process is killed at, the same command goes on from the last checkpoint.

`run.json` says what is trained on what; `volumes/` holds the normalised cases (it may be deleted and is made again);
`checkpoints/` the states (Orbax commits each by a rename); `log.jsonl` one line per log step and validation; `model/` the best
model so far; `tensorboard/`, where asked for, the log again.
"""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.cases import Cases
from training.config import Config
from training.files import write_whole
from xaiseg.errors import InputError
from xaiseg.imaging import Case


def open_folder(out: Path, config: Config, cases: Cases) -> Path:
    """Make the folder of a run, or check that an existing one is of the same run; removes what a killed process left over.

    Raises InputError where the folder holds something else, was begun with another config or other files, or cannot be written.
    """
    out = Path(out).absolute()
    sides = {"training": cases.training, "validation": cases.validation}
    run = {"config": asdict(config), **{side: {c.name: _files(c) for c in members} for side, members in sides.items()}}
    run = json.loads(json.dumps(run))
    record = out / "run.json"
    if record.is_file():
        _check_same(record, run)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is no training run (no run.json inside); choose another folder with --out")
    try:
        (out / "volumes").mkdir(parents=True, exist_ok=True)
        for leftover in [*out.glob(".*"), *(out / "volumes").glob(".*")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_whole(record, json.dumps(run, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another folder with --out") from error
    return out


def _step_of(line: str) -> float:
    """Of a line of the log; infinity for one that was cut off, which is then written again."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class Log:
    """`log.jsonl`, opened to go on after `step`: lines of later steps, which will come again, are removed. A context.

    tensorboard: write the same numbers into `tensorboard/` too.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool = False) -> None:
        self.file = file = out / "log.jsonl"
        self._board = _board(out / "tensorboard", step) if tensorboard else None
        lines = file.read_text().splitlines() if file.is_file() else []
        kept = [line for line in lines if _step_of(line) <= step]
        write_whole(file, "".join(f"{line}\n" for line in kept))

    def write(self, step: int, **entry: float) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")
        if self._board is not None:
            for name, value in entry.items():
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise InputError("--tensorboard: tensorboardX is not installed; pip install 'xaiseg[training]'") from error
    return SummaryWriter(str(folder), purge_step=step + 1)


def _files(case: Case) -> dict[str, list[Any]]:
    """Path, size and time of change of each file: a corrected mask is another run."""
    paths = {**case.images, "reference": case.reference}
    stats = {key: path.stat() for key, path in paths.items() if path}
    return {key: [str(paths[key]), stat.st_size, stat.st_mtime_ns] for key, stat in stats.items()}


def _check_same(record: Path, run: dict[str, Any]) -> None:
    try:
        begun = json.loads(record.read_text())
        old = {f"{part} {key}": value for part in run for key, value in begun[part].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{record}: cannot be read as the record of a run; choose another folder with --out"
        ) from error
    new = {f"{part} {key}": value for part in run for key, value in run[part].items()}
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            raise InputError(
                f"{record.parent}: a run with {key} = {old.get(key)} was begun here, not {new.get(key)}; "
                "give the settings and data it was begun with, or another folder with --out"
            )
