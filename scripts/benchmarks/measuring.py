"""Seconds, compilation, peak memory, and whether two sides agree."""

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def error_of(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, as a fraction of the largest magnitude of `theirs`."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def agree(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Exit where two sides differ by more than 1e-4 of the maximum: there is nothing to time."""
    error = error_of(ours, theirs)
    print(f"{what} agree to {error:.1e} of their maximum", flush=True)
    if not error <= 1e-4:
        sys.exit(f"{what} differ: nothing to time")


class CompileClock:
    """Seconds that JAX has spent on tracing, lowering and compiling since this was made."""

    def __init__(self) -> None:
        import jax

        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration


class Peak:
    """By how much memory peaks above what was in use when this was made.

    allocator: `torch` or `jax` for that library's on a GPU; `host` for the process (Linux).
    """

    def __init__(self, allocator: str) -> None:
        self._allocator = allocator
        if allocator == "host":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._before = self._read("VmRSS", "memory_allocated", "bytes_in_use")
        self.restart()

    def restart(self) -> None:
        """Forget the peak so far; JAX cannot on a GPU."""
        if self._allocator == "host":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is given back
            Path("/proc/self/clear_refs").write_text("5")
        elif self._allocator == "torch":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def mib(self) -> int:
        return (self._read("VmHWM", "max_memory_allocated", "peak_bytes_in_use") - self._before) // 2**20

    def _read(self, host: str, torch_name: str, jax_name: str) -> int:
        if self._allocator == "host":
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(host))
        if self._allocator == "torch":
            import torch

            return int(getattr(torch.cuda, torch_name)())
        import jax

        return int(jax.local_devices()[0].memory_stats()[jax_name])


def allocator_of(side: str) -> str:
    """Whose memory counts: that of the GPU, if the side runs on one."""
    if side == "torch":
        import torch

        return "torch" if torch.cuda.is_available() else "host"
    import jax

    return "host" if jax.default_backend() == "cpu" else "jax"
