"""Sizes of `seal_page`: Llama's, Qwen's, Phi's and Gemma's heads, small and large pages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.pools import init_pools
from kvcompress_jax.kernels.seal_page.triton import seal_page_triton
from kvcompress_jax.kernels.tuning import Tuning

# page size, dim, slots that are refined, dtype, whether tokens are ordered
SIZES = (
    (16, 64, 8, "bfloat16", True),
    (64, 64, 32, "bfloat16", True),
    (64, 96, 32, "bfloat16", True),
    (64, 128, 32, "bfloat16", True),
    (64, 128, 64, "bfloat16", False),
    (64, 128, 0, "bfloat16", False),
    (64, 128, 32, "float16", True),
    (64, 256, 32, "bfloat16", True),
    (128, 128, 64, "bfloat16", True),
    (256, 128, 128, "bfloat16", True),
)
LAYERS, PAGES, HEADS = 2, 64, 8


def make_case(
    page_size: int,
    dim: int,
    fine_rows: int,
    dtype: str,
    ordered: bool,
    tuning: Tuning | None = None,
) -> Case:
    """All pages of small pools, each once."""
    name = f"seal_page/{page_size}x{dim}/{fine_rows}/{dtype}{'' if ordered else '/unordered'}"
    build = functools.partial(_build, page_size, dim, fine_rows, dtype, ordered, tuning)
    _, arguments = build()
    raw, pools, *tables = arguments
    return Case(
        name=name,
        op="seal_page",
        build=build,
        floor_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((raw, pools, tables))),
        needs_tensor_cores=False,
        donate=(1,),
    )


def _build(
    page_size: int, dim: int, fine_rows: int, dtype: str, ordered: bool, tuning: Tuning | None
) -> tuple[Any, tuple[Any, ...]]:
    pools = jax.eval_shape(
        lambda: init_pools(
            layers=LAYERS,
            pages=PAGES,
            chunks=LAYERS * PAGES if fine_rows else 0,
            heads=HEADS,
            page_size=page_size,
            dim=dim,
            fine_rows=fine_rows,
        )
    )
    table = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    arguments: tuple[Any, ...] = (
        jax.ShapeDtypeStruct((LAYERS, PAGES, 2, HEADS, page_size, dim), jnp.dtype(dtype)),
        pools,
        table((PAGES,)),
        table((PAGES,)),
        table((PAGES, LAYERS)),
        table(()),
        table((PAGES,)),
    )
    if ordered:
        arguments += (jax.ShapeDtypeStruct((PAGES, LAYERS, HEADS, page_size), jnp.float32),)

    def run(raw, pools, source, target, chunks, count, exact, worth=None):  # type: ignore[no-untyped-def]
        return seal_page_triton(
            raw,
            pools,
            source=source,
            target=target,
            chunks=chunks,
            count=count,
            exact=exact,
            worth=worth,
            tuning=tuning,
        )

    return run, arguments


CASES = tuple(make_case(*size) for size in SIZES)
