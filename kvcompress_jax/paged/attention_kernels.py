"""`attend` by the kernels: the cache's arrays as they take them."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.decode_attention import AttentionPools, PageLists, decode_attention
from kvcompress_jax.kernels.prefill_attention import prefill_attention
from kvcompress_jax.kernels.prefill_attention.api import IMPLEMENTATIONS as PREFILL_IMPLEMENTATIONS
from kvcompress_jax.paged.cache import PagedCache, code_pools
from kvcompress_jax.paged.table import PageTable

DECODE_QUERIES = 16  # queries x query heads of a KV head, at most, that make a step a decode step


def attend_kernels(
    q: jax.Array,
    cache: PagedCache,
    layer: jax.Array | int,
    table: PageTable,
    *,
    query_lengths: jax.Array,
    scale: float,
    window: jax.Array | int | None,
    soft_cap: float | None,
    return_mass: bool,
    implementation: str,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """See `kvcompress_jax.paged.attention.attend`.

    `implementation`: of the kernels. One that only decodes is asked for other steps all the same,
    and says what it refuses.

    Raises:
      NotImplementedError: a cache that the kernels do not read, see `kernel_inputs` and theirs.
    """
    pools, lists = kernel_inputs(cache, table)
    queries = q.shape[1] * q.shape[2] // cache.layout.kv_heads
    wide = queries > DECODE_QUERIES and implementation in PREFILL_IMPLEMENTATIONS
    op = prefill_attention if wide else decode_attention
    return op(
        q,
        pools,
        layer,
        lists,
        query_lengths=query_lengths,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        return_mass=return_mass,
        implementation=implementation,
    )


def kernel_inputs(cache: PagedCache, table: PageTable) -> tuple[AttentionPools, PageLists]:
    """The pools and lists of a cache and a table.

    Raises:
      NotImplementedError: sealed pages have the calibrated code (level 3).
    """
    if cache.layout.rows is not None:
        raise NotImplementedError(
            "cache: expected base and fine planes, got rows of the calibrated code (level 3)"
        )
    pools = AttentionPools(
        raw=cache.raw, codes=code_pools(cache), fine_of=cache.fine_of, sinks=cache.sinks
    )
    fields = {f.name: getattr(table, f.name) for f in dataclasses.fields(PageLists)}
    return pools, jax.tree.map(jnp.asarray, PageLists(**fields))
