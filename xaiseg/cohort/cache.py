"""Compiled programs kept from run to run, so that a network and a shape are compiled once."""

import hashlib
import os
import platform
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Let JAX keep its programs in the user's cache folder, unless told where, or not to (`JAX_ENABLE_COMPILATION_CACHE=0`)."""
    told = getattr(jax.config, "jax_compilation_cache_dir", None) is not None
    if told or not getattr(jax.config, "jax_enable_compilation_cache", True):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "xaiseg" / f"jax-{_processor()}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # many small programs add up


def _processor() -> str:
    """Programs for CPUs use the instructions of the machine that compiled them, and homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        kind = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {kind}".encode()).hexdigest()[:12]
