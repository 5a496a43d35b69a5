"""Who is at work in a run's folder: a file for each process, which `xaiseg status` reads, and the log that a person can read."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from xaiseg.cohort.folder import RunFolder
from xaiseg.cohort.stages import WORKER
from xaiseg.cohort.stopping import Stopping

RUNNING = Path("logs/running")
_EVERY = 5.0  # seconds


class Heartbeat:
    """While the context lasts, `logs/running/HOST-PID.json` tells that this process lives; `logs/HOST-PID.log` what it did."""

    def __init__(self, folder: RunFolder, stopping: Stopping) -> None:
        self._folder, self._stopping = folder, stopping
        self._file = folder.root / RUNNING / f"{WORKER}.json"
        self._log = folder.root / "logs" / f"{WORKER}.log"
        self._last = 0.0

    def beat(self) -> None:
        if time.monotonic() - self._last < _EVERY:
            return
        self._last = time.monotonic()
        state = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time(), "stopping": self._stopping()}
        self._folder.text(self._file, json.dumps(state))

    def log(self, line: str) -> None:
        """Add a line to the log. A log that cannot be written stops nothing: results are written apart from it, and say so."""
        self.beat()
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}\n")

    def end(self) -> None:
        self._file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.parent.rmdir()

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()
