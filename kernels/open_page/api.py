"""`open_page`: pages of the embedded code back to keys and values."""

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.dispatch import dispatch
from kvcompress_jax.kernels.open_page.reference import open_page_reference
from kvcompress_jax.kernels.open_page.triton import open_page_triton
from kvcompress_jax.kernels.pools import CodePools

IMPLEMENTATIONS = {"triton": open_page_triton, "xla": open_page_reference}


def open_page(
    pools: CodePools,
    *,
    pages: jax.Array,
    chunks: jax.Array,
    count: jax.Array,
    dtype: jnp.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """Decompresses pages of all layers, in token order: what raw pages of them would hold.

    Args:
      pools: of the codes.
      pages: i32[n], sealed pages; the first `count` are real, the rest is padding.
      chunks: i32[n, layers], fine chunk of each page and layer, -1: it is at level 2.
      count: i32[].
      dtype: of the result: bfloat16, float16 or float32.
      implementation: None chooses; a name never falls back to another.

    Returns:
      dtype[layers, n, 2, heads, page_size, dim]; what stands for padding means nothing.

    Raises:
      ValueError: shapes or dtypes that do not belong together, an unknown implementation.
      NotImplementedError: the implementation that was named cannot do this.
    """
    n, layers = pages.shape[0], pools.base.shape[0]
    for name, x, shape in (("pages", pages, (n,)), ("chunks", chunks, (n, layers))):
        if x.shape != shape or x.dtype != jnp.int32:
            raise ValueError(f"{name}: expected int32{list(shape)}, got {x.dtype}{list(x.shape)}")
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {dtype}")
    return dispatch(
        "open_page",
        IMPLEMENTATIONS,
        implementation,
        pools,
        pages=pages,
        chunks=chunks,
        count=count,
        dtype=jnp.dtype(dtype),
    )
