"""`decode_attention` on CPUs, in C++."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.kernels.decode_attention.inputs import AttentionPools, PageLists
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
    group = all_heads // heads
    n = queries * group
    if n > MOST_QUERIES:
        raise UnsuitedError(f"queries: expected at most {MOST_QUERIES}, got {n}")
    refuse_shapes(dim, page_size)
    split = q.astype(jnp.float32).reshape(rows, queries, heads, group, dim) * scale
    split = split.transpose(0, 2, 1, 3, 4).reshape(rows, heads, n, dim)
    query = jnp.arange(queries, dtype=jnp.int32)[None, :]
    lengths = query_lengths[:, None]
    position = jnp.where(query < lengths, lists.length[:, None] - lengths + query, -1)
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
        split,
        jnp.repeat(position, group, axis=1),
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

    def unpack_heads(x: jax.Array) -> jax.Array:
        """[rows, heads, n, ...] to [rows, queries, all_heads, ...]."""
        x = x.reshape(rows, heads, queries, group, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2).reshape(rows, queries, all_heads, *x.shape[4:])

    mass = (sealed_mass, raw_mass) if return_mass else None
    return unpack_heads(out).astype(q.dtype), unpack_heads(lse), mass
