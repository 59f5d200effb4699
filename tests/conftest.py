"""Strict everywhere: no implicit promotion, no implicit broadcasting of ranks."""

import os
import tempfile
from pathlib import Path

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow; in CI every run is the same.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

MAPPINGS = Path("/proc/self/maps")
MAPPINGS_LIMIT = Path("/proc/sys/vm/max_map_count")


def pytest_configure(config):
    """Tests make models and caches anew, but the programs are the same: each is compiled once for
    all processes, those that tests start included. JAX locks a cache only where it has a size."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # a worker's, or one that is kept between runs
        return
    programs = tempfile.TemporaryDirectory(prefix="kvcompress-programs-")
    config.add_cleanup(programs.cleanup)
    for name, value in (
        ("JAX_COMPILATION_CACHE_DIR", programs.name),
        ("JAX_COMPILATION_CACHE_MAX_SIZE", 2**33),
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0.1),
    ):
        os.environ[name] = str(value)
        jax.config.update(name.lower(), value)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(autouse=True)
def _room_for_programs():
    """Every program that XLA compiled for a CPU holds some memory mappings. A process may have
    65,530 of them on Linux, and LLVM crashes when it gets no more: hundreds of tests later, in one
    that has done nothing wrong."""
    yield
    if MAPPINGS.exists() and MAPPINGS_LIMIT.exists():
        with MAPPINGS.open("rb") as lines:
            if sum(1 for _ in lines) > int(MAPPINGS_LIMIT.read_text()) // 2:
                jax.clear_caches()
