"""Kernels in C++: how they are built, and what happens where they cannot be."""

import functools
import logging
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.kernels import dispatch
from kvcompress_jax.kernels.dispatch import UnsuitedError
from kvcompress_jax.kernels.native import call, library, refuse_shapes

DOUBLED = r"""
#include "xla/ffi/api/ffi.h"
#include "vectors.h"
#include "threads.h"
namespace ffi = xla::ffi;
static ffi::Error Double(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                         ffi::ResultBuffer<ffi::F32> y, float by) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1];
  share(pool, rows, [&](int64_t i) {
    for (int64_t j = 0; j < size; j += kLanes)
      store(y->typed_data() + i * size + j, load<Floats>(x.typed_data() + i * size + j) * by);
  });
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(%s, Double, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>().Attr<float>("by"));
"""


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache of its own, and nothing found yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CXX", "CXXFLAGS", library.SWITCH):
        monkeypatch.delenv(name, raising=False)
    library.forget()
    yield tmp_path
    library.forget()


def source(folder, name, text=DOUBLED):
    path = folder / "op" / "cpu.cc"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        text.replace("vectors.h", str(library.HERE / "vectors.h")).replace(
            "threads.h", str(library.HERE / "threads.h")
        )
        % name
    )
    return path


def doubled(path, name, x):
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    return call(path, name, like, x, by=np.float32(2))[0]


def test_is_compiled_once_and_called_under_jit(fresh, monkeypatch):
    path = source(fresh, "kvcompress_test_once")
    x = jnp.arange(64 * 32, dtype=jnp.float32).reshape(64, 32)
    got = jax.jit(functools.partial(doubled, path, "kvcompress_test_once"))(x)
    assert np.array_equal(got, 2 * np.asarray(x))
    kept = list((fresh / "cache" / "kvcompress_jax").iterdir())
    assert [x.suffix for x in kept] == [".so"]  # and nothing half-built
    before = kept[0].stat().st_mtime_ns
    library.forget()
    monkeypatch.setattr(subprocess, "run", refuse_to_compile(subprocess.run))
    assert np.array_equal(doubled(path, "kvcompress_test_once", x), 2 * np.asarray(x))
    assert kept[0].stat().st_mtime_ns == before
    # Another source is another library.
    path.write_text(path.read_text() + "// changed\n")
    library.forget()
    with pytest.raises(AssertionError, match="compiles"):
        doubled(path, "kvcompress_test_once", x)


def refuse_to_compile(run):
    def instead(command, **options):
        assert "--version" in command, "compiles"
        return run(command, **options)

    return instead


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"CXX": "no-such-compiler"}, r"compiler: expected .*\$CXX, got no-such-compiler"),
        ({"PATH": ""}, r"compiler: expected one of g\+\+, clang\+\+ on the PATH, .* got none"),
        ({"KVCOMPRESS_NATIVE": "0"}, "KVCOMPRESS_NATIVE: expected 1 .*, got 0"),
        ({"KVCOMPRESS_NATIVE": "no"}, "KVCOMPRESS_NATIVE: expected 0 or 1, got no"),
    ],
)
def test_says_why_there_is_none(fresh, monkeypatch, environ, message):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    path = source(fresh, "kvcompress_test_none")
    expected = ValueError if environ.get(library.SWITCH) == "no" else NotImplementedError
    with pytest.raises(expected, match=message):
        doubled(path, "kvcompress_test_none", jnp.zeros((1, 16)))


def test_what_the_compiler_says_is_in_the_error(fresh):
    path = source(fresh, "kvcompress_test_broken", DOUBLED.replace("return", "retrun", 1))
    with pytest.raises(NotImplementedError, match=r"(?s)^cpu.cc: .*g\+\+ failed: .*retrun"):
        doubled(path, "kvcompress_test_broken", jnp.zeros((1, 16)))
    assert list((fresh / "cache" / "kvcompress_jax").iterdir()) == []


def test_without_a_compiler_xla_does_it_and_that_is_logged_once_and_counted(
    fresh, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    implementations = {
        "cpu": lambda x: doubled(source(fresh, "kvcompress_test_fallback"), "none", x),
        "xla": lambda x: 3 * x,
    }
    before = dispatch.FALLBACKS["op", "cpu"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert dispatch.dispatch("op", implementations, None, jnp.ones((1, 16)))[0, 0] == 3
    assert dispatch.FALLBACKS["op", "cpu"] == before + 2
    warned = [x.getMessage() for x in caplog.records]
    assert len(warned) == 1 and "no-such-compiler" in warned[0]
    with pytest.raises(NotImplementedError, match="no-such-compiler"):  # a name never falls back
        dispatch.dispatch("op", implementations, "cpu", jnp.ones((1, 16)))


def test_what_another_is_better_at_is_no_fallback(caplog):
    def unsuited(x):
        raise UnsuitedError("too many")

    before = dispatch.FALLBACKS.total()
    with caplog.at_level(logging.DEBUG):
        assert dispatch.dispatch("op", {"cpu": unsuited, "xla": lambda x: x}, None, 1) == 1
        # Nor where an operation around it names the one that is unsuited.
        named = {"cpu": lambda x: dispatch.dispatch("in", {"cpu": unsuited}, "cpu", x)}
        assert dispatch.dispatch("op", named | {"xla": lambda x: x}, None, 1) == 1
    assert dispatch.FALLBACKS.total() == before and not caplog.records
    with pytest.raises(NotImplementedError, match=r"^op: cpu: in: cpu: too many$"):
        dispatch.dispatch("op", named, "cpu", 1)


def test_a_home_that_is_read_only_is_no_obstacle(fresh, monkeypatch, caplog):
    blocked = fresh / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    path = source(fresh, "kvcompress_test_home")
    assert doubled(path, "kvcompress_test_home", jnp.ones((1, 16)))[0, 0] == 2
    assert "is compiled for this process alone" in caplog.text


def test_shapes_without_loops_are_refused():
    refuse_shapes(64, 16)
    for dim, page_size in ((80, 16), (64, 24), (512, 16)):
        with pytest.raises(NotImplementedError, match=rf"got {dim} and {page_size}$"):
            refuse_shapes(dim, page_size)


X86 = platform.machine() == "x86_64"


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="vectors of 512 bits can be turned off where they are")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx512f -mno-avx"], ids=["avx2", "sse"])
def test_shorter_vectors_pass_the_same_tests(flags):
    """Only a process of its own loads other code by the same names."""
    here = Path(__file__).parent
    paged = here.parent / "paged"
    tests = [here / "test_seal_page.py", paged / "test_attention.py", paged / "test_read.py"]
    some = "bound or spoils or equals or low_precision or any_level or (to_the_bit and float16)"
    if "-mno-avx " not in f"{flags} ":  # without fused products and sums, ties are not XLA's
        some += " or (byte and 16-64)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", f"cpu and ({some})"]
    command += map(str, tests)
    environ = os.environ | {"CXXFLAGS": flags}
    for name in ("PYTEST_XDIST_WORKER", "XLA_FLAGS"):  # without its optimisations XLA fuses nothing
        environ.pop(name, None)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 10
