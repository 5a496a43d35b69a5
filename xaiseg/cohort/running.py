"""Who is at work in a run's folder: a file for each process, which `xaiseg status` reads, and the log that a person can read."""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from xaiseg.cohort.folder import RunFolder
from xaiseg.cohort.output import OutputError
from xaiseg.cohort.stages import WORKER
from xaiseg.cohort.stopping import Stopping

RUNNING = Path("logs/running")
_EVERY = 5.0  # seconds


class Heartbeat:
    """While the context lasts, `logs/running/HOST-PID.json` tells that this process lives; `logs/HOST-PID.log` what it did.

    Neither matters to results, which are written apart from them: where they cannot be written, nothing stops.
    """

    def __init__(self, folder: RunFolder, stopping: Stopping) -> None:
        self._folder, self._stopping = folder, stopping
        self._file = folder.root / RUNNING / f"{WORKER}.json"
        self._log = folder.root / "logs" / f"{WORKER}.log"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.is_set():
            state = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time(), "stopping": self._stopping()}
            with contextlib.suppress(OutputError):
                self._folder.text(self._file, json.dumps(state))
            self._ended.wait(_EVERY)

    def log(self, line: str) -> None:
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}\n")

    def end(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.parent.rmdir()

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()
