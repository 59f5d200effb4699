"""Sizes of `open_page`: at level 1 (refined slots) and 2 (none)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.open_page.triton import open_page_triton
from kvcompress_jax.kernels.pools import init_pools
from kvcompress_jax.kernels.tuning import Tuning

# page size, dim, slots that are refined, dtype of the result
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
LAYERS, PAGES, HEADS = 2, 64, 8


def make_case(
    page_size: int, dim: int, fine_rows: int, dtype: str, tuning: Tuning | None = None
) -> Case:
    """All pages of small pools, each once."""
    build = functools.partial(_build, page_size, dim, fine_rows, dtype, tuning)
    _, arguments = build()
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
    opened = LAYERS * PAGES * 2 * HEADS * page_size * dim * jnp.dtype(dtype).itemsize
    return Case(
        name=f"open_page/{page_size}x{dim}/{fine_rows}/{dtype}",
        op="open_page",
        build=build,
        floor_bytes=stored + opened,
        needs_tensor_cores=False,
    )


def _build(
    page_size: int, dim: int, fine_rows: int, dtype: str, tuning: Tuning | None
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

    def run(pools, pages, chunks, count):  # type: ignore[no-untyped-def]
        return open_page_triton(
            pools, pages=pages, chunks=chunks, count=count, dtype=jnp.dtype(dtype), tuning=tuning
        )

    return run, (pools, table((PAGES,)), table((PAGES, LAYERS)), table(()))


CASES = tuple(make_case(*size) for size in SIZES)
