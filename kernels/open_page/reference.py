"""`open_page` in plain XLA: what the kernel must do, bit for bit."""

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels import embedded
from kvcompress_jax.kernels.pools import CodePools


def open_page_reference(
    pools: CodePools, *, pages: jax.Array, chunks: jax.Array, count: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """See `kvcompress_jax.kernels.open_page.open_page`; pages past `count` are opened too."""
    half, rows = pools.dim // 2, pools.fine_rows
    layers, n = pools.base.shape[0], pages.shape[0]
    heads = pools.base.shape[3]

    def codes(plane: jax.Array) -> tuple[jax.Array, jax.Array]:
        """i32[layers, n, heads, rows, dim] each, from u8[layers, n, 2, heads, bytes]."""
        packed = plane.astype(jnp.int32)
        keys = packed[:, :, 0].reshape(layers, n, heads, -1, half)
        values = packed[:, :, 1].reshape(layers, n, heads, half, -1).swapaxes(-1, -2)
        keys, values = (jnp.concatenate([x & 15, x >> 4], axis=-1) for x in (keys, values))
        return keys, values

    fine: tuple[jax.Array | None, jax.Array | None] = (None, None)
    if rows:
        chunk = jnp.maximum(chunks, 0).T
        there = (chunks >= 0).T[:, :, None, None, None]
        pad = ((0, 0),) * 3 + ((0, pools.page_size - pools.refined_slots), (0, 0))
        detail = codes(pools.fine[chunk])
        if pools.fine_bits == 2:
            detail = tuple(embedded.separate(x) for x in detail)
        keys, values = (jnp.pad(jnp.where(there, embedded.refine(x), 0.0), pad) for x in detail)
        fine = keys, values
    key_base, value_base = codes(pools.base[:, pages])
    keys = embedded.decode(
        key_base,
        fine[0],
        pools.key_step[:, pages][..., None, :],
        pools.key_zero[:, pages][..., None, :],
    )
    values = embedded.decode(
        value_base,
        fine[1],
        pools.value_step[:, pages][..., None],
        pools.value_zero[:, pages][..., None],
    )
    slot = jnp.argsort(pools.order[:, pages], axis=-1)[:, :, None, :, :, None]
    kv = jnp.stack([keys, values], axis=2).astype(dtype)
    return jnp.take_along_axis(kv, slot, axis=4)
