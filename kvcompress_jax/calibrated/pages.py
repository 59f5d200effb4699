"""A context through the calibrated code and back, without a cache: for fitting and measuring."""

import jax
import jax.numpy as jnp

from kvcompress_jax.calibrated.code import CalibratedCode, decode_rows, encode_rows
from kvcompress_jax.calibrated.row import RowLayout
from kvcompress_jax.models.config import DecoderConfig

QUERIES = 64  # that the attention of tokens is sampled with


def attend_plainly(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    position: jax.Array,
    window: jax.Array,
    config: DecoderConfig,
) -> tuple[jax.Array, jax.Array]:
    """Output like q [queries, num_heads, dim], and weights f32[heads, group, queries, tokens]."""
    queries = q.astype(jnp.float32).reshape(q.shape[0], keys.shape[1], -1, q.shape[2])
    found = jnp.einsum("nhgd,thd->hgnt", queries, keys) * config.query_scale
    if config.soft_cap is not None:
        found = config.soft_cap * jnp.tanh(found / config.soft_cap)
    back = position[:, None] - jnp.arange(keys.shape[0], dtype=jnp.int32)[None, :]
    visible = (back >= 0) & ((window == 0) | (back < window))
    weights = jax.nn.softmax(jnp.where(visible[None, None], found, -1e30), axis=-1)
    out = jnp.einsum("hgnt,thd->nhgd", weights, values)
    return out.reshape(q.shape), weights


def received_attention(
    q: jax.Array, k: jax.Array, config: DecoderConfig, layer: jax.Array
) -> jax.Array:
    """f32[heads, tokens]: mean attention that each token gets from a sample of the queries."""
    tokens = k.shape[0]
    position = jnp.linspace(tokens // 4, tokens - 1, QUERIES).astype(jnp.int32)
    window = jnp.asarray(config.layer_windows, jnp.int32)[layer]
    _, weights = attend_plainly(q[position], k, jnp.zeros_like(k), position, window, config)
    seen_by = jnp.sum(position[:, None] >= jnp.arange(tokens, dtype=jnp.int32)[None, :], axis=0)
    return jnp.sum(weights, axis=(1, 2)) / jnp.maximum(seen_by, 1)[None, :].astype(jnp.float32)


def there_and_back(
    keys: jax.Array,
    values: jax.Array,
    received: jax.Array,
    code: CalibratedCode,
    rows: RowLayout,
    page_size: int,
    sink_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values f32[tokens, heads, dim] of full pages from position 0 on, as coded."""
    tokens, heads, dim = keys.shape
    pages = tokens // page_size
    exact = jnp.arange(tokens, dtype=jnp.int32) < sink_tokens

    def one_page(
        keys: jax.Array, values: jax.Array, received: jax.Array, exact: jax.Array, first: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return decode_rows(
            *encode_rows(keys, values, received, exact, first, code, rows), first, code, rows
        )

    again = jax.vmap(one_page)(
        by_page(keys, page_size),
        by_page(values, page_size),
        by_page(received.T, page_size),
        exact.reshape(pages, page_size),
        jnp.arange(pages, dtype=jnp.int32) * page_size,
    )
    coded_keys, coded_values = (x.swapaxes(1, 2).reshape(tokens, heads, dim) for x in again)
    kept = exact[:, None, None]
    return jnp.where(kept, keys, coded_keys), jnp.where(kept, values, coded_values)


def by_page(x: jax.Array, page_size: int) -> jax.Array:
    """[tokens, heads, ...] to [pages, heads, page_size, ...]."""
    return x.reshape(-1, page_size, *x.shape[1:]).swapaxes(1, 2)
