"""Sizes of `decode_attention`: Llama's, Qwen's, Phi's and Gemma's heads; pages of all levels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.decode_attention.inputs import AttentionPools, PageLists
from kvcompress_jax.kernels.decode_attention.triton import attention_triton
from kvcompress_jax.kernels.pools import init_pools
from kvcompress_jax.kernels.tuning import Tuning

# page size, dim, refined slots, query heads of a KV head, dtype, options
SIZES: tuple[tuple[int, int, int, int, str, str], ...] = (
    (16, 128, 8, 4, "bfloat16", ""),
    (64, 96, 32, 4, "bfloat16", ""),
    (64, 128, 0, 4, "bfloat16", ""),
    (64, 128, 32, 4, "bfloat16", "mass"),
    (64, 256, 32, 4, "bfloat16", "window"),
    (128, 128, 64, 16, "float16", ""),
)
ROWS, TOKENS, RAW_COLUMNS, HEADS, SINK_TOKENS = 8, 32768, 2, 8, 4


def make_case(
    page_size: int,
    dim: int,
    fine_rows: int,
    group: int,
    dtype: str,
    options: str,
    tuning: Tuning | None = None,
    *,
    queries: int = 1,
    op: str = "decode_attention",
) -> Case:
    """Sequences of `TOKENS` tokens in sealed pages, of which none is shared, and some raw pages."""
    arguments = _arguments(page_size, dim, fine_rows, group, dtype, queries)
    run = functools.partial(
        attention_triton,
        scale=dim**-0.5,
        soft_cap=30.0 if options == "soft_cap" else None,
        return_mass=options == "mass",
        op=op,
        tuning=tuning,
    )
    name = f"{op}/{page_size}x{dim}/{fine_rows}/{group * queries}/{dtype}"

    def function(q, pools, layer, lists, query_lengths, window):  # type: ignore[no-untyped-def]
        window = window if options == "window" else None
        return run(q, pools, layer, lists, query_lengths=query_lengths, window=window)

    return Case(
        name=f"{name}/{options}" if options else name,
        op=op,
        build=lambda: (function, arguments),
        floor_bytes=_nbytes(arguments) + _result_bytes(arguments, mass=options == "mass"),
        needs_tensor_cores=True,
    )


def _arguments(
    page_size: int, dim: int, fine_rows: int, group: int, dtype: str, queries: int
) -> tuple[Any, ...]:
    columns = TOKENS // page_size
    pages = ROWS * columns
    codes = jax.eval_shape(
        lambda: init_pools(
            layers=1,
            pages=pages,
            chunks=pages if fine_rows else 0,
            heads=HEADS,
            page_size=page_size,
            dim=dim,
            fine_rows=fine_rows,
        )
    )
    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    vectors = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    pools = AttentionPools(
        raw=vectors((1, ROWS * RAW_COLUMNS, 2, HEADS, page_size, dim)),
        codes=codes,
        fine_of=i32((1, pages)),
        sinks=vectors((1, ROWS, 2, HEADS, SINK_TOKENS, dim)),
    )
    lists = PageLists(
        sealed=i32((ROWS, columns)),
        sealed_index=i32((ROWS, columns)),
        sealed_count=i32((ROWS,)),
        raw=i32((ROWS, RAW_COLUMNS)),
        raw_index=i32((ROWS, RAW_COLUMNS)),
        raw_count=i32((ROWS,)),
        sink=i32((ROWS,)),
        length=i32((ROWS,)),
    )
    q = vectors((ROWS, queries, HEADS * group, dim))
    return q, pools, i32(()), lists, i32((ROWS,)), i32(())


def _result_bytes(arguments: tuple[Any, ...], *, mass: bool) -> int:
    q, pools, _, lists, *_ = arguments
    numbers = q.size // q.shape[3]  # log-sum-exp
    if mass:
        numbers += HEADS * (lists.sealed.size + lists.raw.size * pools.raw.shape[4])
    return _nbytes(q) + 4 * numbers


def _nbytes(arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


CASES = [make_case(*size) for size in SIZES]
