"""`decode_attention` and `prefill_attention` in plain JAX: all pages decoded, one dense softmax.

The meaning of the kernels, for tests and small caches. It holds all keys and values of the batch
as float32; attention in bounded memory without a kernel is `kvcompress_jax.paged.attend`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.kernels import embedded
from kvcompress_jax.kernels.decode_attention.inputs import AttentionPools, PageLists

_einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def attention_reference(
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
    """See `kvcompress_jax.kernels.decode_attention.decode_attention`."""
    rows, queries, all_heads, dim = q.shape
    heads, page_size = pools.raw.shape[3:5]
    group = all_heads // heads
    slot = jnp.arange(page_size, dtype=jnp.int32)
    parts = []  # keys, values [rows, columns, heads, tokens, dim], position and existence of each
    max_sealed = lists.sealed.shape[1] if pools.codes.base.shape[1] else 0
    if max_sealed:
        live = _live(lists.sealed, lists.sealed_count)
        keys, values = _decode(pools, layer, jnp.where(live, lists.sealed, 0))
        order = pools.codes.order[layer, jnp.where(live, lists.sealed, 0)].astype(jnp.int32)
        token = lists.sealed_index[:, :, None, None] * page_size + order
        exact = (lists.sealed_index == 0) & (lists.sink >= 0)[:, None]
        coded = ~exact[:, :, None] | (slot >= pools.sinks.shape[4])[None, None, :]
        parts.append((keys, values, token, (live[:, :, None] & coded)[:, :, None]))
    if pools.sink_tokens:
        kv = pools.sinks[layer, jnp.maximum(lists.sink, 0)].astype(jnp.float32)[:, None]
        token = jnp.arange(kv.shape[4], dtype=jnp.int32)[None, None, None, :]
        exists = (lists.sink >= 0)[:, None, None, None] & (token < _last(lists.length))
        parts.append((kv[:, :, 0], kv[:, :, 1], token, exists))
    live = _live(lists.raw, lists.raw_count)
    kv = pools.raw[layer, jnp.where(live, lists.raw, 0)].astype(jnp.float32)
    token = (lists.raw_index[:, :, None] * page_size + slot[None, None, :])[:, :, None]
    exists = live[:, :, None, None] & (token < _last(lists.length))
    parts.append((kv[:, :, 0], kv[:, :, 1], token, exists))

    def join(i: int) -> jax.Array:
        """Of all parts, [rows, heads, all tokens, ...]."""
        whole = []
        for part in parts:
            shape = (*part[0].shape[:4], *part[i].shape[4:])
            x = jnp.broadcast_to(part[i], shape).swapaxes(1, 2)
            whole.append(x.reshape(rows, heads, -1, *shape[4:]))
        return jnp.concatenate(whole, axis=2)

    token, exists = join(2), join(3)
    keys, values = (jnp.where(exists[..., None], join(i), 0.0) for i in (0, 1))
    query = jnp.arange(queries, dtype=jnp.int32)[None, :]
    position = (lists.length - query_lengths)[:, None] + query
    back = position[:, None, :, None] - token[:, :, None, :]  # [rows, heads, queries, tokens]
    seen = exists[:, :, None, :] & (back >= 0)
    if window is not None:
        seen = seen & ((window <= 0) | (back < window))
    real = query < query_lengths[:, None]
    seen = (seen & real[:, None, :, None])[:, :, :, None]
    split = q.astype(jnp.float32).reshape(rows, queries, heads, group, dim) * scale
    logits = _einsum("rqhgd,rhtd->rhqgt", split, keys)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), -1e30)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total != 0  # NaN is handed on
    divisor = jnp.where(some, total, 1.0)
    weights = weights / divisor
    out = _einsum("rhqgt,rhtd->rqhgd", weights, values)
    lse = jnp.where(some, top + jnp.log(divisor), -jnp.inf)[..., 0].transpose(0, 2, 1, 3)
    mass = None
    if return_mass:
        counted = jnp.where(total > 0, weights, 0.0)
        received = jnp.sum(counted, axis=(2, 3))  # [rows, heads, all tokens]
        sealed = received[:, :, : max_sealed * page_size].reshape(rows, heads, -1, page_size)
        pad = lists.sealed.shape[1] - max_sealed
        sealed = jnp.pad(jnp.sum(sealed, axis=3), ((0, 0), (0, 0), (0, pad)))
        recent = received[:, :, received.shape[2] - lists.raw.shape[1] * page_size :]
        mass = sealed, recent.reshape(rows, heads, -1, page_size)
    shape = (rows, queries, all_heads)
    return out.reshape(*shape, dim).astype(q.dtype), lse.reshape(shape), mass


def _live(ids: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :] < count[:, None]


def _last(length: jax.Array) -> jax.Array:
    return length[:, None, None, None]


def _decode(
    pools: AttentionPools, layer: jax.Array | int, pages: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values f32[rows, columns, heads, page_size, dim] of sealed pages."""
    codes = pools.codes
    half, page_size, fine_rows = codes.dim // 2, codes.page_size, codes.fine_rows
    chunk = pools.fine_of[layer, pages]

    def plane(packed: jax.Array, kind: int, rows: int) -> jax.Array:
        x = packed[..., kind, :, :].astype(jnp.int32)
        shape = (rows, half) if kind == 0 else (half, rows)
        x = x.reshape(*x.shape[:-1], *shape)
        x = x if kind == 0 else x.swapaxes(-1, -2)
        return jnp.concatenate([x & 15, x >> 4], axis=-1)

    def decoded(kind: int, step: jax.Array, zero: jax.Array) -> jax.Array:
        base = plane(codes.base[layer, pages], kind, page_size)
        detail = jnp.zeros(base.shape, jnp.float32)
        if fine_rows:
            fine = plane(codes.fine[jnp.maximum(chunk, 0)], kind, fine_rows)
            if codes.fine_bits == 2:
                fine = embedded.separate(fine)
            fine = jnp.where((chunk >= 0)[..., None, None, None], embedded.refine(fine), 0.0)
            detail = detail.at[..., : codes.refined_slots, :].set(fine)
        axis = -2 if kind == 0 else -1
        return embedded.decode(
            base, detail, jnp.expand_dims(step, axis), jnp.expand_dims(zero, axis)
        )

    return (
        decoded(0, codes.key_step[layer, pages], codes.key_zero[layer, pages]),
        decoded(1, codes.value_step[layer, pages], codes.value_zero[layer, pages]),
    )
