"""Strict settings for every test: no silent promotion, two fake CPU devices, a persistent compilation cache."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Compilation is most of the time that tests take: LLVM optimises only where XLA_FLAGS say so, as `.ci/run` does for the slow tests.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=2",
        *(
            ()
            if "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
            else ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
        ),
    ]
)
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# A worker that kept every program it compiled would end at 6 GB, and two at half of a 24 GB machine before the largest test begins.
ENOUGH = 2 * 2**30


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Each file has its own networks, so little that an earlier one compiled is of use to a later one."""
    yield
    if _resident() > ENOUGH:
        jax.clear_caches()
        gc.collect()


def _resident() -> int:
    """Bytes of memory that this process holds, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real scans and the real checkpoint; tests that need it are skipped where it is absent."""
    if not (SHARED / "models" / "monai_unet_ms.pth").is_file():
        pytest.skip(f"{SHARED} is absent: it holds the real scans and the real checkpoint")
    return SHARED
