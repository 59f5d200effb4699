"""Batches with pages of all levels, and a float64 reference that reads the same bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import KVCacheManager
from kvcompress_jax.paged import PagedCache, PageTable, PoolSizes, append, init_cache

_append = jax.jit(append, donate_argnums=0)


@dataclasses.dataclass
class Batch:
    """A filled cache; `keys[s]` and `values[s]` are what was appended to sequence s, per layer."""

    manager: KVCacheManager
    cache: PagedCache
    ids: list[int]
    keys: list[np.ndarray]  # [layers, tokens, heads, dim], as stored at level 0
    values: list[np.ndarray]

    def table(self) -> PageTable:
        return self.manager.table(self.ids)


def make_batch(
    config: CompressionConfig,
    lengths: list[int],
    *,
    kv_heads: int = 2,
    head_dim: int = 64,
    layers: int = 2,
    dtype: str = "float32",
    seed: int = 0,
    settle: bool = True,
) -> Batch:
    """Sequences of random tokens, sealed as the configuration says, every other level 1 page of a
    sequence demoted, and NaN in everything that must not be read."""
    layout = config.layout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    pages = sum(-(-n // config.page_size) for n in lengths)
    sizes = PoolSizes(
        raw_pages=pages + 3,
        sealed_pages=pages + 2 if config.compresses else 0,
        fine_chunks=(pages + 1) * layers if config.compresses else 0,
        sink_slots=len(lengths) + 1 if config.compresses else 0,
    )
    manager = KVCacheManager(layout, sizes, config, max_sequences=len(lengths))
    cache = poison(init_cache(layout, sizes))
    rng = np.random.default_rng(seed)
    ids, keys, values = [], [], []
    for length in lengths:
        ids.append(manager.add())
        k, v = (rng.normal(size=(layers, length, kv_heads, head_dim)) for _ in range(2))
        k[..., 1] *= 20  # an outlier channel
        k[:, :4] *= 3  # sinks
        stored = [np.asarray(jnp.asarray(x, layout.jax_dtype).astype(jnp.float32)) for x in (k, v)]
        keys.append(stored[0])
        values.append(stored[1])
        slots = manager.append_slots(ids[-1], length)
        for layer in range(layers):
            cache = _append(cache, layer, stored[0][layer], stored[1][layer], slots)
    if settle:
        cache = manager.advance(cache)
        for sequence in ids:
            manager.demote_pages(sequence, range(0, max(lengths) // config.page_size + 1, 2))
        cache = manager.advance(cache)
    return Batch(manager, cache, ids, keys, values)


def poison(cache: PagedCache) -> PagedCache:
    """NaN and 255 everywhere: what is read without having been written shows."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    filled = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if floating(x) else jnp.full_like(x, 255),
        dataclasses.replace(cache, sealed=None, rejected=None, fine_of=None),
    )
    return dataclasses.replace(
        filled, sealed=cache.sealed, rejected=cache.rejected, fine_of=cache.fine_of
    )


def reference_page(cache: PagedCache, layer: int, page: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a sealed page in token order, float64[heads, page_size, dim]: straight
    from the documented format."""
    position = _codes(cache.base[layer, page], cache.layout.head_dim)
    chunk = int(cache.fine_of[layer, page])
    if chunk >= 0:
        fine = _codes(cache.fine[chunk], cache.layout.head_dim)
        if cache.layout.fine_bits == 2:  # two slots to a nibble, the first in its lower bits
            fine = 4 * np.concatenate([fine % 4, fine // 4], axis=2)
        position[:, :, : fine.shape[2]] += (fine - 8) / 16
    scale = lambda s: (  # noqa: E731
        np.asarray(s.step[layer, page], np.float64),
        np.asarray(s.zero[layer, page], np.float64),
    )
    (key_step, key_zero), (value_step, value_zero) = (
        scale(cache.key_scale),
        scale(cache.value_scale),
    )
    keys = (position[0] + key_zero[:, None]) * key_step[:, None]
    values = (position[1] + value_zero[..., None]) * value_step[..., None]
    token_of_slot = np.asarray(cache.order[layer, page]).astype(int)
    out = []
    for x in (keys, values):
        in_token_order = np.empty_like(x)
        for head, order in enumerate(token_of_slot):
            in_token_order[head, order] = x[head]
        out.append(in_token_order)
    return out[0], out[1]


def _codes(plane: jax.Array, dim: int) -> np.ndarray:
    """The codes in a plane u8[2, heads, rows * dim/2], as float64[2, heads, rows, dim]: keys lie
    row by row, values channel by channel."""
    keys, values = np.asarray(plane)
    keys = keys.reshape(len(keys), -1, dim // 2)
    values = values.reshape(len(values), dim // 2, -1).transpose(0, 2, 1)
    packed = np.stack([keys, values])
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float64)


def reference_tokens(
    cache: PagedCache, table: PageTable, row: int, layer: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All tokens of a row: positions [n], page of each (place in the table: sealed ones first,
    then raw ones) [n], keys and values float64[n, heads, dim]."""
    layout = cache.layout
    size, parts = layout.page_size, []
    for column in range(int(table.sealed_count[row])):
        first = int(table.sealed_index[row, column]) * size
        keys, values = reference_page(cache, layer, int(table.sealed[row, column]))
        if first == 0 and table.sink[row] >= 0:
            exact = np.asarray(cache.sinks[layer, table.sink[row]], np.float64)
            keys[:, : exact.shape[2]], values[:, : exact.shape[2]] = exact
        parts.append((first, column, keys, values))
    for column in range(int(table.raw_count[row])):
        first = int(table.raw_index[row, column]) * size
        kv = np.asarray(cache.raw[layer, int(table.raw[row, column])], np.float64)
        kv = kv[:, :, : int(table.length[row]) - first]
        parts.append((first, table.sealed.shape[1] + column, kv[0], kv[1]))
    position = np.concatenate([f + np.arange(k.shape[1]) for f, _, k, _ in parts])
    page = np.concatenate([np.full(k.shape[1], c) for _, c, k, _ in parts])
    keys = np.concatenate([k for _, _, k, _ in parts], axis=1).transpose(1, 0, 2)
    values = np.concatenate([v for _, _, _, v in parts], axis=1).transpose(1, 0, 2)
    return position, page, keys, values


def reference_attention(q, position, keys, values, first_query, *, scale, window=0, soft_cap=None):
    """Dense causal attention in float64 of the queries of one row.

    Returns out [queries, heads, dim], lse [queries, heads], weights [queries, heads, n].
    """
    q = np.asarray(q, np.float64)
    group = q.shape[1] // keys.shape[1]
    keys, values = (np.repeat(x, group, axis=1) for x in (keys, values))
    logits = np.einsum("qhd,nhd->qhn", q, keys) * scale
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    back = (first_query + np.arange(q.shape[0]))[:, None] - position[None, :]
    visible = (back >= 0) & ((window <= 0) | (back < window))
    logits = np.where(visible[:, None, :], logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights /= total
    lse = (top + np.log(total))[..., 0]
    return np.einsum("qhn,nhd->qhd", weights, values), lse, weights
