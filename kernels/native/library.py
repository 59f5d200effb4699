"""From a `.cc` file to a function that XLA calls.

A file is compiled once for a compiler, a processor and a release of jaxlib, and kept in
`$XDG_CACHE_HOME/kvcompress_jax` (`~/.cache/kvcompress_jax`).
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib

_log = logging.getLogger(__name__)

COMPILERS = ("g++", "clang++")
COMPILER_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"),
    *("-shared", "-fPIC", "-w"),
)
SWITCH = "KVCOMPRESS_NATIVE"
HERE = Path(__file__).parent


def call(
    source: Path,
    function: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *args: jax.Array,
    aliases: dict[int, int] | None = None,
    **attributes: object,
) -> Sequence[jax.Array]:
    """Calls a C++ function, under `jax.jit` as well.

    Args:
      source: the file that defines it.
      function: its name.
      results: shapes and dtypes.
      args: arrays.
      aliases: results that are arguments, updated in place: index of the argument to that of the
        result.
      attributes: of the call.

    Raises:
      NotImplementedError: it cannot be compiled here; says why, and is logged as a warning once.
      ValueError: `KVCOMPRESS_NATIVE` is neither 0 nor 1.
    """
    reason = _register(source, function)
    if reason is not None:
        raise NotImplementedError(reason)
    found: Sequence[jax.Array] = jax.ffi.ffi_call(
        function, results, input_output_aliases=aliases, vmap_method="sequential"
    )(*args, **attributes)
    return found


def unavailable() -> str | None:
    """Why no kernel can be compiled here, or None: it seems that they can."""
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH}: expected 0 or 1, got {switch}")
    if switch == "0":
        return f"{SWITCH}: expected 1 to use kernels in C++, got 0"
    if compiler() is None:
        found = os.environ.get("CXX", "none")
        return (
            f"compiler: expected one of {', '.join(COMPILERS)} on the PATH, or another in $CXX,"
            f" got {found}"
        )
    return None


@functools.cache
def compiler() -> str | None:
    """The C++ compiler's path."""
    chosen = os.environ.get("CXX")
    paths = (shutil.which(name) for name in ((chosen,) if chosen else COMPILERS))
    return next((path for path in paths if path is not None), None)


def forget() -> None:
    """Looks for the compiler, and for what it made, anew. Functions stay registered."""
    for found in (compiler, _version, _register):
        found.cache_clear()


@functools.cache
def _register(source: Path, function: str) -> str | None:
    """Makes a function known to XLA; returns why that is impossible, if it is."""
    reason = unavailable()
    try:
        library = None if reason else ctypes.CDLL(str(_compiled(source)))
    except (RuntimeError, OSError) as e:
        reason = str(e)
    if reason:
        if os.environ.get(SWITCH) != "0":
            _log.warning("XLA computes what %s would: %s", function, reason)
        return reason
    handler = jax.ffi.pycapsule(getattr(library, function))
    jax.ffi.register_ffi_target(function, handler, platform="cpu")
    return None


def _compiled(source: Path) -> Path:
    """The shared library of a source.

    Raises:
      RuntimeError: the compiler fails.
    """
    path = compiler()
    assert path is not None
    command = [path, *COMPILER_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    texts = [x.read_text() for x in (source, *sorted(HERE.glob("*.h")))]
    of = [" ".join(command), jaxlib.__version__, _processor(), _version(path), *texts]
    digest = hashlib.sha256("\n".join(of).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcompress_jax"
    library = cache / f"{source.parent.name}-{digest[:20]}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        room = tempfile.mkdtemp(dir=cache)
    except OSError as e:  # a home that is read-only
        _log.warning("%s is compiled for this process alone: %s", source, e)
        room = tempfile.mkdtemp(prefix="kvcompress_jax-")
        library = Path(room) / library.name
    built = Path(room) / f"built-{library.name}"
    command += ["-isystem", jax.ffi.include_dir(), str(source), "-o", str(built)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name}: {path} failed: {done.stderr[-2000:]}")
        built.replace(library)  # appears as a whole or not at all
    finally:
        if library.parent != Path(room):
            shutil.rmtree(room)
    return library


def _processor() -> str:
    """What -march=native depends on: a home may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    )


@functools.cache
def _version(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return done.stdout
