"""Sizes of `seal_page`: Llama's, Qwen's, Phi's and Gemma's heads, small and large pages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.pools import init_pools
from kvcompress_jax.kernels.seal_page.reference import seal_page_reference
from kvcompress_jax.kernels.seal_page.triton import seal_page_triton
from kvcompress_jax.kernels.tuning import Tuning

# page size, dim, rows of a fine chunk, dtype, whether tokens are ordered, whether errors are fed
SIZES = (
    (16, 64, 8, "bfloat16", True, False),
    (64, 64, 32, "bfloat16", True, False),
    (64, 96, 32, "bfloat16", True, False),
    (64, 128, 32, "bfloat16", True, False),
    (64, 128, 64, "bfloat16", False, False),
    (64, 128, 0, "bfloat16", False, False),
    (64, 128, 32, "float16", True, False),
    (64, 256, 32, "bfloat16", True, False),
    (128, 128, 64, "bfloat16", True, False),
    (256, 128, 128, "bfloat16", True, False),
    (16, 64, 8, "bfloat16", True, True),
    (64, 64, 32, "bfloat16", True, True),
    (64, 96, 32, "bfloat16", True, True),
    (64, 128, 32, "bfloat16", True, True),
    (64, 128, 0, "bfloat16", False, True),
    (64, 256, 32, "bfloat16", True, True),
    (128, 128, 64, "bfloat16", True, True),
    (256, 128, 128, "bfloat16", True, True),
)
# Likewise, where slots are refined by two bits each: all of them, or half.
EVEN_SIZES = (
    (16, 64, 8, "bfloat16", False, True),
    (64, 64, 32, "bfloat16", False, True),
    (64, 128, 32, "bfloat16", False, False),
    (64, 128, 32, "bfloat16", False, True),
    (64, 128, 16, "bfloat16", True, True),
    (64, 256, 32, "bfloat16", False, True),
    (128, 128, 64, "bfloat16", False, True),
    (256, 128, 128, "bfloat16", False, True),
)
LAYERS, PAGES, HEADS = 2, 64, 8
RANK, PAIRS = 4, 4


# Settings to choose from where a device is at hand, by page size.
WARPS, CHANNELS = (1, 2, 4, 8), (16, 32, 64)


def make_case(
    page_size: int,
    dim: int,
    fine_rows: int,
    dtype: str,
    ordered: bool,
    fed: bool = False,
    tuning: Tuning | None = None,
    *,
    fine_bits: int = 4,
    pages: int = PAGES,
    interpret: bool = False,
) -> Case:
    """All pages of small pools, each once."""
    example = functools.partial(
        _example, page_size, dim, fine_rows, fine_bits, dtype, ordered, fed, pages
    )
    run = functools.partial(seal_page_triton, tuning=tuning, interpret=interpret)
    arguments = jax.eval_shape(example)
    return Case(
        name=f"seal_page/{page_size}x{dim}/{fine_rows}/{dtype}{'' if ordered else '/unordered'}"
        f"{'/even' if fine_bits == 2 else ''}{'/fed' if fed else ''}",
        op="seal_page",
        build=lambda: (functools.partial(_run, run), arguments),
        floor_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments)),
        needs_tensor_cores=False,
        donate=(1,),
        example=example,
        reference=functools.partial(_run, seal_page_reference),
    )


def candidates(page_size: int, dim: int) -> list[Tuning]:
    """Settings that may be best: between 16 and 64 numbers in the registers of a thread."""
    return [
        {"num_warps": warps, "num_stages": 1, "channels": channels}
        for warps in WARPS
        for channels in CHANNELS
        if (dim // 2) % channels == 0 and 16 <= 2 * page_size * channels / (32 * warps) <= 64
    ]


def _run(seal, raw, pools, source, target, chunks, count, exact, worth=None, feedback=None):  # type: ignore[no-untyped-def]
    return seal(
        raw,
        pools,
        source=source,
        target=target,
        chunks=chunks,
        count=count,
        exact=exact,
        worth=worth,
        feedback=feedback,
        pairs=PAIRS,
    )


def _example(
    page_size: int,
    dim: int,
    fine_rows: int,
    fine_bits: int,
    dtype: str,
    ordered: bool,
    fed: bool,
    n: int,
) -> tuple[Any, ...]:
    key = jax.random.key(0)
    pages = jnp.arange(n, dtype=jnp.int32)
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
    chunks = jnp.arange(n * LAYERS, dtype=jnp.int32).reshape(n, LAYERS)
    arguments: tuple[Any, ...] = (
        jax.random.normal(key, (LAYERS, n, 2, HEADS, page_size, dim), jnp.dtype(dtype)),
        pools,
        pages,
        pages[::-1],
        chunks if fine_rows else jnp.full_like(chunks, -1),
        jnp.int32(n),
        jnp.zeros_like(pages),
    )
    arguments += (jax.random.uniform(key, (n, LAYERS, HEADS, page_size)) if ordered else None,)
    if fed:
        # As large as measured ones: what a channel owes is a part of its step (0.3 here).
        shape = (n, LAYERS, HEADS, 2, RANK, dim)
        sizes = jnp.array([1.0, 0.1])[None, None, None, :, None, None]
        arguments += (jax.random.normal(key, shape) * sizes,)
    return arguments


CASES = (
    *(make_case(*size) for size in SIZES),
    *(make_case(*size, fine_bits=2) for size in EVEN_SIZES),
)
