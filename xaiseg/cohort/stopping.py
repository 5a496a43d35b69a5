"""A clean end on Ctrl-C or SIGTERM: what is under way is finished, and the next one is not begun."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """While the context lasts, the first signal asks to stop; a second interrupts at once. Only the main thread is told of signals.

    signal: the one that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.asked = threading.Event()
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.asked.is_set()

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Signals mean what they meant before, while code of the caller runs."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked.is_set():
            raise KeyboardInterrupt
        self.signal = number
        self.asked.set()
        print("\nstopping once the lesions under way are done; again: at once", file=sys.stderr, flush=True)
