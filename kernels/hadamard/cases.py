"""Sizes of `hadamard`: 16,384 vectors of the head sizes that there are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.hadamard.triton import hadamard_triton
from kvcompress_jax.kernels.tuning import Tuning

SIZES = ((64, "bfloat16"), (96, "bfloat16"), (128, "bfloat16"), (128, "float16"), (256, "bfloat16"))
VECTORS = 16384


def make_case(dim: int, dtype: str, tuning: Tuning | None = None) -> Case:
    """Reads and writes the vectors, and reads the matrix."""
    itemsize = jnp.dtype(dtype).itemsize
    return Case(
        name=f"hadamard/{dim}/{dtype}",
        op="hadamard",
        build=functools.partial(_build, dim, dtype, tuning),
        floor_bytes=(2 * VECTORS * dim + dim * dim) * itemsize,
        needs_tensor_cores=True,
    )


def _build(dim: int, dtype: str, tuning: Tuning | None) -> tuple[Any, tuple[Any, ...]]:
    run = functools.partial(hadamard_triton, tuning=tuning)
    return run, (jax.ShapeDtypeStruct((VECTORS, dim), jnp.dtype(dtype)),)


CASES = tuple(make_case(*size) for size in SIZES)
