"""Pages of codes to keys and values on CPUs, in C++."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.kernels.native import call, kind_of, refuse_shapes
from kvcompress_jax.kernels.pools import CodePools


def open_slots_cpu(
    pools: CodePools,
    layer: jax.Array | int,
    ids: jax.Array,
    chunks: jax.Array,
    *,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of pages of one layer in the order of their slots, bit for bit those of XLA.

    Args:
      pools: of the codes.
      layer: i32[].
      ids: i32[...], pages; -1 reads as zeros.
      chunks: i32[...], fine chunk of each page, -1: it is at level 2.
      dtype: of the result: bfloat16, float16 or float32.

    Returns:
      keys and values, [..., heads, page_size, dim].

    Raises:
      NotImplementedError: shapes that the kernel has no loops for, or no compiler.
    """
    refuse_shapes(pools.dim, pools.page_size)
    heads = pools.base.shape[3]
    like = jax.ShapeDtypeStruct((*ids.shape, heads, pools.page_size, pools.dim), dtype)
    keys, values = call(
        Path(__file__).with_name("cpu.cc"),
        "kvcompress_open",
        [like, like],
        jnp.asarray(layer, jnp.int32),
        ids,
        chunks,
        pools.base,
        pools.fine,
        pools.key_step,
        pools.key_zero,
        pools.value_step,
        pools.value_zero,
        fine_bits=np.int32(pools.fine_bits),
        kind=np.int32(kind_of(dtype)),
    )
    return keys, values
