"""The XLA path of `attend`, compiled for a GPU that is not there."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.gpu.ahead import compile_for
from benchmarks.gpu.hlo import moved_bytes
from benchmarks.gpu.roofline import FINE_ROWS, PAGE_SIZE, Shape
from benchmarks.gpu.target import Target
from kvcompress_jax.paged import CacheLayout, PageTable, PoolSizes, init_cache
from kvcompress_jax.paged.attention_xla import attend_xla, pages_at_once


def fallback_bytes(shape: Shape, level: str, target: Target, *, sequences: int, tokens: int) -> int:
    """That one decode step of one layer moves."""
    pages = tokens // PAGE_SIZE
    sealed = 0 if level == "raw" else sequences * pages
    fine_rows = FINE_ROWS.get(level, 0)
    layout = CacheLayout(
        layers=1,
        kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        page_size=PAGE_SIZE,
        fine_rows=fine_rows,
        sink_tokens=0,
    )
    sizes = PoolSizes(
        raw_pages=1 if sealed else sequences * pages,
        sealed_pages=sealed,
        fine_chunks=sealed if fine_rows else 0,
        sink_slots=0,
    )
    table = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    columns, none = (sequences, pages), (sequences, 0)
    tables = PageTable(
        sealed=table(columns if sealed else none),
        sealed_index=table(columns if sealed else none),
        sealed_count=table((sequences,)),
        raw=table(none if sealed else columns),
        raw_index=table(none if sealed else columns),
        raw_count=table((sequences,)),
        length=table((sequences,)),
        sink=table((sequences,)),
    )
    cache = jax.eval_shape(functools.partial(init_cache, layout, sizes))
    q = jax.ShapeDtypeStruct((sequences, 1, shape.heads, shape.dim), jnp.bfloat16)

    block = pages_at_once(sequences, shape.heads // shape.kv_heads, layout, platform="gpu")

    def step(q, cache, table):  # type: ignore[no-untyped-def]
        return attend_xla(
            q,
            cache,
            0,
            table,
            query_lengths=jnp.ones((sequences,), jnp.int32),
            scale=shape.dim**-0.5,
            window=None,
            soft_cap=None,
            return_mass=False,
            block_pages=block,
        )[:2]

    text = compile_for(step, (q, cache, tables), target).as_text()
    return moved_bytes(text, trips=-(-pages // block))
