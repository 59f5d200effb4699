"""Sizes of `decode_attention`: Llama's, Qwen's, Phi's and Gemma's heads; pages of all levels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.case import MOST_BYTES, Case
from kvcompress_jax.kernels.decode_attention.inputs import AttentionPools, PageLists
from kvcompress_jax.kernels.decode_attention.mosaic import attention_mosaic
from kvcompress_jax.kernels.decode_attention.reference import attention_reference
from kvcompress_jax.kernels.decode_attention.triton import attention_triton
from kvcompress_jax.kernels.pools import init_pools
from kvcompress_jax.kernels.random_pools import fill_random
from kvcompress_jax.kernels.tuning import Tuning, find_tuning

# page size, dim, rows of a fine chunk, query heads of a KV head, dtype, options
SIZES: tuple[tuple[int, int, int, int, str, str], ...] = (
    (16, 128, 8, 4, "bfloat16", ""),
    (64, 96, 32, 4, "bfloat16", ""),
    (64, 128, 0, 4, "bfloat16", ""),
    (64, 128, 32, 4, "bfloat16", "mass"),
    (64, 128, 32, 4, "bfloat16", "mass+even"),
    (64, 128, 16, 4, "bfloat16", "mass+even"),
    (64, 256, 32, 4, "bfloat16", "window"),
    (64, 256, 32, 4, "bfloat16", "window+even"),
    (128, 128, 64, 16, "float16", ""),
    (128, 128, 64, 16, "float16", "even"),
)
# Likewise, on Mosaic GPU.
MOSAIC_SIZES = (
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
    tokens: int = TOKENS,
    implementation: str = "triton",
    interpret: bool = False,
    most_bytes: float = MOST_BYTES,
) -> Case:
    """`ROWS` sequences of `tokens` tokens in sealed pages, of which none is shared and every second
    is refined, and some raw pages."""
    named = options.split("+")
    example = functools.partial(
        _example,
        page_size,
        dim,
        fine_rows,
        group,
        dtype,
        fine_bits=2 if "even" in named else 4,
        queries=queries,
        tokens=tokens,
    )
    arguments = jax.eval_shape(example)
    kernel = functools.partial(attention_triton, op=op, tuning=tuning, interpret=interpret)
    if implementation == "mosaic_gpu":
        kernel = functools.partial(attention_mosaic, interpret=interpret)

    def run(attention, q, pools, layer, lists, query_lengths, window):  # type: ignore[no-untyped-def]
        out, lse, mass = attention(
            q,
            pools,
            layer,
            lists,
            query_lengths=query_lengths,
            scale=dim**-0.5,
            window=window if "window" in named else None,
            soft_cap=30.0 if "soft_cap" in named else None,
            return_mass="mass" in named,
        )
        return out, lse, mass

    parts = [op, f"{page_size}x{dim}", fine_rows, group * queries, dtype, options]
    parts.append("" if implementation == "triton" else implementation)
    return Case(
        name="/".join(str(part) for part in parts if part != ""),
        op=op,
        build=lambda: (functools.partial(run, kernel), arguments),
        floor_bytes=_nbytes(arguments) + _result_bytes(arguments, mass="mass" in named),
        most_bytes=most_bytes,
        needs_tensor_cores=True,
        example=example,
        reference=functools.partial(run, attention_reference),
        relative_from=0.5,  # a mean of values errs by a share of the greatest of them
    )


def candidates(op: str, page_size: int, dim: int) -> list[Tuning]:
    """Settings that may be best: the default, with one of them changed."""
    default = dict(find_tuning(op, f"{page_size}x{dim}"))
    warps = [
        {key: default[key] * by // 2 for key in ("num_warps", "num_warps_wide")}
        for by in (1, 4)
        if min(default["num_warps"], default["num_warps_wide"]) * by >= 2
        and default["num_warps_wide"] * by <= 16
    ]
    changes: list[dict[str, int]] = [
        *warps,
        *({"num_stages": stages} for stages in (2, 3, 4)),
        *({"programs": programs} for programs in (512, 2048)),
        {"widest": 32},
        *({"columns": x} for x in (default["columns"] // 2, default["columns"] * 2) if x >= 8),
    ]
    return [default | change for change in changes if default | change != default]


def _example(
    page_size: int,
    dim: int,
    fine_rows: int,
    group: int,
    dtype: str,
    *,
    fine_bits: int,
    queries: int,
    tokens: int,
) -> tuple[Any, ...]:
    columns = tokens // page_size
    pages = ROWS * columns
    keys = iter(jax.random.split(jax.random.key(0), 4))
    pools = init_pools(
        layers=1,
        pages=pages,
        chunks=pages if fine_rows else 0,
        heads=HEADS,
        page_size=page_size,
        dim=dim,
        fine_rows=fine_rows,
        fine_bits=fine_bits,
    )

    def numbers(shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.dtype(dtype))

    pools = fill_random(pools, next(keys))
    page = jnp.arange(pages, dtype=jnp.int32)
    refined = page if fine_rows else jnp.full_like(page, -1)
    recent = jnp.arange(ROWS * RAW_COLUMNS, dtype=jnp.int32).reshape(ROWS, RAW_COLUMNS)
    every = functools.partial(jnp.full, (ROWS,), dtype=jnp.int32)
    lists = PageLists(
        sealed=page.reshape(ROWS, columns),
        sealed_index=jnp.tile(jnp.arange(columns, dtype=jnp.int32), (ROWS, 1)),
        sealed_count=every(columns),
        raw=recent,
        raw_index=columns + recent % RAW_COLUMNS,
        raw_count=every(RAW_COLUMNS),
        sink=jnp.arange(ROWS, dtype=jnp.int32),
        length=every(tokens + RAW_COLUMNS * page_size - page_size // 2),
    )
    attended = AttentionPools(
        raw=numbers((1, ROWS * RAW_COLUMNS, 2, HEADS, page_size, dim)),
        codes=pools,
        fine_of=jnp.where(page % 2 == 0, refined, -1)[None],
        sinks=numbers((1, ROWS, 2, HEADS, SINK_TOKENS, dim)),
    )
    q = numbers((ROWS, queries, HEADS * group, dim))
    window = jnp.int32(tokens // 2)
    return q, attended, jnp.int32(0), lists, every(queries), window


def _result_bytes(arguments: tuple[Any, ...], *, mass: bool) -> int:
    q, pools, _, lists, *_ = arguments
    numbers = q.size // q.shape[3]  # log-sum-exp
    if mass:
        numbers += HEADS * (lists.sealed.size + lists.raw.size * pools.raw.shape[4])
    return _nbytes(q) + 4 * numbers


def _nbytes(arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


MOSAIC_CASES = [make_case(*size, implementation="mosaic_gpu") for size in MOSAIC_SIZES]
CASES = [*(make_case(*size) for size in SIZES), *MOSAIC_CASES]
