"""Sizes of `open_page`: at level 1 (refined slots) and 2 (none)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.open_page.reference import open_page_reference
from kvcompress_jax.kernels.open_page.triton import open_page_triton
from kvcompress_jax.kernels.pools import init_pools
from kvcompress_jax.kernels.random_pools import fill_random
from kvcompress_jax.kernels.tuning import Tuning

# page size, dim, rows of a fine chunk, dtype of the result
SIZES = (
    (16, 64, 8, "bfloat16"),
    (64, 64, 32, "bfloat16"),
    (64, 96, 32, "bfloat16"),
    (64, 128, 32, "bfloat16"),
    (64, 128, 0, "bfloat16"),
    (64, 128, 32, "float16"),
    (64, 256, 32, "bfloat16"),
    (128, 128, 64, "bfloat16"),
    (256, 128, 128, "bfloat16"),
)
# Likewise, where slots are refined by two bits each: all of them, or half.
EVEN_SIZES = (
    (16, 64, 8, "bfloat16"),
    (64, 64, 32, "bfloat16"),
    (64, 128, 32, "bfloat16"),
    (64, 128, 16, "bfloat16"),
    (64, 256, 32, "bfloat16"),
    (256, 128, 128, "bfloat16"),
)
LAYERS, PAGES, HEADS = 2, 64, 8


WARPS, CHANNELS = (1, 2, 4, 8), (16, 32, 64)  # to choose from where a device is at hand


def make_case(
    page_size: int,
    dim: int,
    fine_rows: int,
    dtype: str,
    tuning: Tuning | None = None,
    *,
    fine_bits: int = 4,
    pages: int = PAGES,
    interpret: bool = False,
) -> Case:
    """All pages of small pools, each once."""
    example = functools.partial(_example, page_size, dim, fine_rows, fine_bits, pages)
    run = functools.partial(open_page_triton, tuning=tuning, interpret=interpret)
    arguments = jax.eval_shape(example)
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
    opened = LAYERS * pages * 2 * HEADS * page_size * dim * jnp.dtype(dtype).itemsize
    return Case(
        name=f"open_page/{page_size}x{dim}/{fine_rows}/{dtype}{'/even' if fine_bits == 2 else ''}",
        op="open_page",
        build=lambda: (functools.partial(_run, run, dtype), arguments),
        floor_bytes=stored + opened,
        needs_tensor_cores=False,
        example=example,
        reference=functools.partial(_run, open_page_reference, dtype),
    )


def candidates(page_size: int, dim: int) -> list[Tuning]:
    """Settings that may be best: between 16 and 64 numbers in the registers of a thread."""
    return [
        {"num_warps": warps, "num_stages": 1, "channels": channels}
        for warps in WARPS
        for channels in CHANNELS
        if (dim // 2) % channels == 0 and 16 <= 2 * page_size * channels / (32 * warps) <= 64
    ]


def _run(open_pages, dtype, pools, pages, chunks, count):  # type: ignore[no-untyped-def]
    return open_pages(pools, pages=pages, chunks=chunks, count=count, dtype=jnp.dtype(dtype))


def _example(page_size: int, dim: int, fine_rows: int, fine_bits: int, n: int) -> tuple[Any, ...]:
    pools = init_pools(
        layers=LAYERS,
        pages=n,
        chunks=LAYERS * n if fine_rows else 0,
        heads=HEADS,
        page_size=page_size,
        dim=dim,
        fine_rows=fine_rows,
        fine_bits=fine_bits,
    )
    pools = fill_random(pools, jax.random.key(0))
    chunks = jnp.arange(n * LAYERS, dtype=jnp.int32).reshape(n, LAYERS)
    pages = jnp.arange(n, dtype=jnp.int32)
    return pools, pages, chunks if fine_rows else jnp.full_like(chunks, -1), jnp.int32(n)


CASES = (
    *(make_case(*size) for size in SIZES),
    *(make_case(*size, fine_bits=2) for size in EVEN_SIZES),
)
