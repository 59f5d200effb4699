"""Sizes of `hadamard`: 16,384 vectors of the head sizes that there are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.hadamard.reference import hadamard_reference
from kvcompress_jax.kernels.hadamard.triton import hadamard_triton
from kvcompress_jax.kernels.tuning import Tuning

SIZES = ((64, "bfloat16"), (96, "bfloat16"), (128, "bfloat16"), (128, "float16"), (256, "bfloat16"))
VECTORS = 16384


def make_case(
    dim: int,
    dtype: str,
    tuning: Tuning | None = None,
    *,
    vectors: int = VECTORS,
    interpret: bool = False,
) -> Case:
    """Reads and writes the vectors, and reads the matrix."""
    itemsize = jnp.dtype(dtype).itemsize
    example = functools.partial(_example, dim, dtype, vectors)
    run = functools.partial(hadamard_triton, tuning=tuning, interpret=interpret)
    return Case(
        name=f"hadamard/{dim}/{dtype}",
        op="hadamard",
        build=lambda: (run, jax.eval_shape(example)),
        floor_bytes=(2 * vectors * dim + dim * dim) * itemsize,
        needs_tensor_cores=True,
        example=example,
        reference=hadamard_reference,
    )


def candidates(dim: int) -> list[Tuning]:
    """Settings that may be best: up to 64 sums in the registers of a thread."""
    return [
        {"num_warps": warps, "num_stages": 1, "rows": rows}
        for warps in (2, 4, 8)
        for rows in (16, 32, 64, 128)
        if rows * dim / (32 * warps) <= 64
    ]


def _example(dim: int, dtype: str, vectors: int) -> tuple[Any, ...]:
    return (jax.random.normal(jax.random.key(0), (vectors, dim), jnp.dtype(dtype)),)


CASES = tuple(make_case(*size) for size in SIZES)
