"""The bench of the GPU kernels, on a machine without a GPU."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from benchmarks.gpu.times_page import times_page
from benchmarks.gpu_bench import check_cases
from kvcompress_jax.kernels.hadamard.cases import make_case
from kvcompress_jax.lab.agreement import disagreement

ROOT = Path(__file__).parents[2]


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_bench", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            "JAX_PLATFORMS": "cpu",
            "PATH": "/usr/bin:/bin",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        },
        timeout=600,
    )


def test_without_a_gpu_it_says_so_in_a_line():
    done = bench()
    assert done.returncode == 2
    assert done.stderr == "gpu_bench needs a GPU, and JAX has only cpu here\n"


def test_small_cases_are_checked_on_any_device():
    done = bench("--interpret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right ") == 4
    assert "WRONG" not in done.stdout


def test_a_wrong_result_is_found():
    case = make_case(64, "bfloat16", vectors=64, interpret=True)
    wrong = dataclasses.replace(case, name="wrong", reference=lambda x: x)
    found = check_cases(Console(quiet=True), [case, wrong], timed=False)
    assert [x.wrong is None for x in found] == [True, False]


def test_the_page_says_what_was_measured():
    row = {"shape": "Tiny", "sequences": 2, "tokens": 4096, "level": "mixed"}
    row |= {"implementation": "triton", "seconds": 2e-4, "share": 0.5}
    row |= {"raw_over_this": 2.0, "xla_over_this": 31.0}
    op = {"case": "open_page/64x128", "seconds": 1e-5, "xla_seconds": 4e-5, "share": 0.75}
    result = {"device": "NVIDIA H100", "jax": "0.11.2", "repeats": 7, "copy_bytes_per_second": 2e12}
    page = times_page(result | {"ops": [op], "attention": [row]})
    assert "# Measured on NVIDIA H100" in page and "2,000 GB/s" in page
    assert "| Tiny | 2 × 4,096 | mixed | triton | 200.0 | 50% | 2.00 | 31.0 |" in page
    assert "| open_page/64x128 | 10.0 | 75% | 40.0 | 4.0 |" in page


def test_the_page_in_the_repository_is_that_of_its_figures():
    result = json.loads((ROOT / "docs/gpu-times.json").read_text())
    assert (ROOT / "docs/gpu-times.md").read_text() == times_page(result)
    by_level = {
        x["level"]: x["raw_over_this"]
        for x in result["attention"]
        if (x["sequences"], x["implementation"]) == (8, "triton") and "Llama" in x["shape"]
    }
    readme = (ROOT / "README.md").read_text()
    for level, in_readme in (("level 1", "1.6"), ("mixed", "2.0"), ("level 2", "2.8")):
        assert f"{by_level[level]:.1f}" == in_readme
        assert f"({in_readme}" in readme


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "bool", "int32"])
def test_disagreement(dtype):
    x = jax.random.normal(jax.random.key(0), (64, 64)) * 40
    a = x.astype(dtype) if dtype != "bool" else x > 0
    assert disagreement(a, a) is None
    assert "expected 1 arrays, got 2" in disagreement((a, a), a)
    assert "expected" in disagreement(a, a[:32])
    other = a.at[3].set(jnp.roll(a[3], 1))
    assert "differ" in disagreement(other, a)
    if dtype == "bfloat16":
        assert disagreement(jnp.nextafter(a, jnp.full_like(a, jnp.inf)), a) is None
        assert disagreement(a * jnp.bfloat16(1.02), a) is not None
        assert disagreement(a.at[0, 0].set(jnp.nan), a) is not None
    if dtype == "uint8":  # one of 4,096 lies on a border; four of 64 do not
        assert disagreement(a.at[0, 0].add(jnp.uint8(1)), a) is None
