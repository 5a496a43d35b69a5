"""Memory of the comparisons: every file has its own networks, so nothing that an earlier one compiled is of use to a later one."""

import gc
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Two workers that kept all programs and their buffers would hold half of a 24 GiB machine before the largest test begins."""
    yield
    jax.clear_caches()
    gc.collect()
