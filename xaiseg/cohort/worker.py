"""What a Dask worker does when it starts."""

import contextlib
import os
from typing import Any

from distributed import WorkerPlugin


class Apart(WorkerPlugin):
    """A worker in a session of its own: the Ctrl-C of a terminal reaches the run alone, which lets workers finish."""

    name = "xaiseg-apart"

    def setup(self, worker: Any) -> None:
        with contextlib.suppress(OSError):  # it leads a group already
            os.setsid()
