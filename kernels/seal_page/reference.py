"""`seal_page` in plain XLA: what the kernel must do, byte for byte."""

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels import embedded
from kvcompress_jax.kernels.pools import CodePools


def seal_page_reference(
    raw: jax.Array,
    pools: CodePools,
    *,
    source: jax.Array,
    target: jax.Array,
    chunks: jax.Array,
    count: jax.Array,
    exact: jax.Array,
    worth: jax.Array | None,
    feedback: jax.Array | None = None,
    pairs: int = 0,
) -> tuple[CodePools, jax.Array]:
    """See `kvcompress_jax.kernels.seal_page.seal_page`."""
    layers, _, _, heads, page_size, _ = raw.shape
    n, fine_rows = source.shape[0], pools.fine_rows
    token = jnp.arange(page_size, dtype=jnp.int32)
    kv = raw[:, source].astype(jnp.float32)  # [layers, n, 2, heads, page_size, dim]
    finite = jnp.all(jnp.isfinite(kv), axis=(0, 2, 3, 4, 5))
    finite = finite & (jnp.arange(n, dtype=jnp.int32) < count)
    if worth is None:
        order = jnp.broadcast_to(token, (layers, n, heads, page_size))
    else:
        ranked = jnp.where(jnp.isnan(worth), -jnp.inf, worth).swapaxes(0, 1)
        order = jnp.argsort(-ranked, axis=-1, stable=True).astype(jnp.int32)
    kv = jnp.take_along_axis(kv, order[:, :, None, :, :, None], axis=4)
    keys, values = kv[:, :, 0], kv[:, :, 1]

    counted = (order >= exact[None, :, None, None])[..., None]
    key_step, key_zero = embedded.fit(
        jnp.min(keys, axis=-2, where=counted, initial=jnp.inf),
        jnp.max(keys, axis=-2, where=counted, initial=-jnp.inf),
    )
    value_step, value_zero = embedded.fit(jnp.min(values, axis=-1), jnp.max(values, axis=-1))
    refined = (token[None, None, :] < pools.refined_slots) & (
        chunks.T[:, :, None] >= 0
    )  # [layers, n, page_size]
    key_scale = key_step[..., None, :], key_zero[..., None, :]
    cells = jnp.where(refined, pools.cells, 1.0)[:, :, None, :, None]
    if feedback is None:
        key_codes = embedded.encode(keys, *key_scale, cells)
    else:
        key_codes = _feed(keys, key_scale, cells, feedback.swapaxes(0, 1), pairs)
    value_codes = embedded.encode(values, value_step[..., None], value_zero[..., None], cells)
    planes = zip(embedded.split(key_codes), embedded.split(value_codes), strict=True)
    base, fine = (
        (k[..., :rows, :], v[..., :rows, :])
        for (k, v), rows in zip(planes, (page_size, pools.refined_slots), strict=True)
    )
    if pools.fine_bits == 2:
        first, second = (slice(0, fine_rows), slice(fine_rows, None))
        fine = tuple((x[..., first, :] >> 2) | x[..., second, :] for x in fine)
    base, fine = _plane(*base), _plane(*fine)

    page = jnp.where(finite, target, pools.base.shape[1])  # out of range: dropped
    chunk = jnp.where(finite[:, None] & (chunks >= 0), chunks, pools.fine.shape[0]).T

    def put(pool: jax.Array, x: jax.Array) -> jax.Array:
        return pool.at[:, page].set(x.astype(pool.dtype), mode="drop")

    written = CodePools(
        base=put(pools.base, base),
        fine=pools.fine.at[chunk].set(fine, mode="drop") if fine_rows else pools.fine,
        key_step=put(pools.key_step, key_step),
        key_zero=put(pools.key_zero, key_zero),
        value_step=put(pools.value_step, value_step),
        value_zero=put(pools.value_zero, value_zero),
        order=put(pools.order, order),
    )
    return written, finite


def _plane(keys: jax.Array, values: jax.Array) -> jax.Array:
    """Codes i32[layers, n, heads, rows, dim] each to u8[layers, n, 2, heads, bytes]."""
    packed = [embedded.pack(*jnp.split(x, 2, axis=-1)) for x in (keys, values)]
    packed[1] = packed[1].swapaxes(-1, -2)
    return jnp.stack([x.reshape(*x.shape[:-2], -1) for x in packed], axis=2)


def _feed(
    keys: jax.Array,
    scale: tuple[jax.Array, jax.Array],
    cells: jax.Array,
    feedback: jax.Array,
    pairs: int,
) -> jax.Array:
    """Codes of f32[layers, n, heads, page_size, dim], from the last block of channels to the first,
    as `embedded.encode` gives them."""
    dim = keys.shape[-1]
    half, rank = dim // 2, feedback.shape[-2]
    debts = [jnp.zeros((*keys.shape[:-1], 1)) for _ in range(rank)]
    codes = jnp.zeros(keys.shape, jnp.int32)
    for start in range(half - pairs, -1, -pairs):
        owed = list(debts)
        for columns in (slice(start + j * half, start + j * half + pairs) for j in range(2)):
            carry, answer = (feedback[..., kind, :, None, columns] for kind in range(2))
            new, error = embedded.fed(
                keys[..., columns],
                (scale[0][..., columns], scale[1][..., columns]),
                [(debts[r], answer[..., r, :, :]) for r in range(rank)],
                cells,
            )
            codes = codes.at[..., columns].set(new)
            for r in range(rank):
                term = jnp.sum(error * carry[..., r, :, :], axis=-1, keepdims=True)
                owed[r] = owed[r] + term
        debts = owed
    return codes
