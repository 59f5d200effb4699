"""`decode_attention` on CPUs, in C++."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.kernels.decode_attention.inputs import AttentionPools, PageLists
from kvcompress_jax.kernels.decode_attention.queries import tile_queries, untile_queries
from kvcompress_jax.kernels.dispatch import UnsuitedError
from kvcompress_jax.kernels.native import call, kind_of, refuse_shapes

MOST_QUERIES = 16  # times query heads of a KV head: with more, a product of matrices is faster


def attention_cpu(
    q: jax.Array,
    pools: AttentionPools,
    layer: jax.Array | int,
    lists: PageLists,
    *,
    query_lengths: jax.Array,
    scale: float,
    window: jax.Array | int | None,
    soft_cap: float | None,
    return_mass: bool,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """See `kvcompress_jax.kernels.decode_attention.decode_attention`; raw pages may be float32,
    and queries of any floating dtype.

    Raises:
      UnsuitedError: more queries than `MOST_QUERIES`.
      NotImplementedError: shapes that the kernel has no loops for, or no compiler.
    """
    rows, queries, all_heads, dim = q.shape
    codes = pools.codes
    heads, page_size = pools.raw.shape[3:5]
    n = queries * all_heads // heads
    if n > MOST_QUERIES:
        raise UnsuitedError(f"queries: expected at most {MOST_QUERIES}, got {n}")
    refuse_shapes(dim, page_size)
    scaled = q.astype(jnp.float32) * scale
    tiled = tile_queries(scaled, lists, query_lengths, kv_heads=heads, tile=1)
    # Those of padding lie past the end.
    position = jnp.where(tiled.position < lists.length[:, None], tiled.position, -1)
    columns = (lists.sealed.shape[1], lists.raw.shape[1]) if return_mass else (0, 0)
    out, lse, sealed_mass, raw_mass = call(
        Path(__file__).with_name("cpu.cc"),
        "kvcompress_attend",
        [
            jax.ShapeDtypeStruct((rows, heads, n, dim), jnp.float32),
            jax.ShapeDtypeStruct((rows, heads, n), jnp.float32),
            jax.ShapeDtypeStruct((rows, heads, columns[0]), jnp.float32),
            jax.ShapeDtypeStruct((rows, heads, columns[1], page_size), jnp.float32),
        ],
        tiled.q,
        position,
        jnp.asarray(layer, jnp.int32),
        jnp.asarray(0 if window is None else window, jnp.int32),
        codes.base,
        codes.fine,
        pools.fine_of,
        codes.key_step,
        codes.key_zero,
        codes.value_step,
        codes.value_zero,
        codes.order,
        pools.raw,
        pools.sinks,
        lists.sealed,
        lists.sealed_index,
        lists.sealed_count,
        lists.raw,
        lists.raw_index,
        lists.raw_count,
        lists.sink,
        lists.length,
        soft_cap=np.float32(soft_cap or 0.0),
        fine_bits=np.int32(codes.fine_bits),
        kind=np.int32(kind_of(pools.raw.dtype)),
        mass=return_mass,
    )
    mass = (sealed_mass, raw_mass) if return_mass else None
    return untile_queries(out, queries).astype(q.dtype), untile_queries(lse, queries), mass
