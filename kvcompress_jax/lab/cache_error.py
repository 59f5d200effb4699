"""How far a compressed cache is from the uncompressed one: attention outputs, keys, values."""

import dataclasses
import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.lab.prefill import raw_pages
from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.decoder import decode
from kvcompress_jax.models.params import DecoderParams
from kvcompress_jax.models.runner import Runner
from kvcompress_jax.paged import PagedCache, PageTable, append, attend, read_pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attended:
    """Queries of some tokens in every layer, and what the uncompressed cache answered."""

    q: jax.Array  # [layers, tokens, heads, dim]
    k: jax.Array  # [layers, tokens, kv_heads, dim]
    v: jax.Array  # like k
    out: jax.Array  # f32, like q


def attend_uncompressed(reference: Runner, sequence: int, tokens: list[int]) -> Attended:
    """Feeds tokens to a fork of a sequence that is not compressed.

    Args:
      reference: its runner; it has room for one more sequence.
      sequence: holds the context.
      tokens: whose queries are taken.
    """
    fork = reference.manager.fork(sequence)
    start = reference.manager.length(fork)
    reference.advance()
    slots = reference.manager.append_slots(fork, len(tokens))
    attended, reference.cache = _record_layers(
        reference.model.params,
        reference.cache,
        reference.manager.table([fork]),
        slots,
        np.array(tokens, np.int32),
        np.arange(start, start + len(tokens), dtype=np.int32),
        config=reference.model.config,
    )
    reference.manager.free(fork)
    return attended


def attention_output_error(attended: Attended, compressed: Runner, sequence: int) -> float:
    """Relative L2 error of the attention outputs, mean over layers: the same queries attend to the
    compressed cache, layer by layer.

    Args:
      attended: what the uncompressed cache answered.
      compressed: its runner; it has room for one more sequence.
      sequence: holds the context compressed.
    """
    fork = compressed.manager.fork(sequence)
    compressed.advance()
    slots = compressed.manager.append_slots(fork, attended.q.shape[1])
    errors, compressed.cache = _compare_layers(
        compressed.cache,
        compressed.manager.table([fork]),
        slots,
        attended,
        config=compressed.model.config,
    )
    compressed.manager.free(fork)
    return float(jnp.mean(errors))


_State: TypeAlias = tuple[PagedCache, Attended]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _record_layers(
    params: DecoderParams,
    cache: PagedCache,
    table: PageTable,
    slots: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    config: DecoderConfig,
) -> tuple[Attended, PagedCache]:
    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, window: jax.Array, state: _State
    ) -> tuple[jax.Array, _State]:
        cache = append(state[0], layer, k, v, slots)
        out = _attend(q, cache, layer, table, window, config)
        here = Attended(q=q, k=k, v=v, out=out)
        record = jax.tree.map(lambda all_, x: all_.at[layer].set(x), state[1], here)
        return out.astype(q.dtype), (cache, record)

    def empty(heads: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((config.num_layers, tokens.shape[0], heads, config.head_dim), dtype)

    dtype = params.embedding.dtype
    record = Attended(
        q=empty(config.num_heads, dtype),
        k=empty(config.num_kv_heads, dtype),
        v=empty(config.num_kv_heads, dtype),
        out=empty(config.num_heads, jnp.dtype(jnp.float32)),
    )
    _, (cache, record) = decode(params, config, tokens, positions, attention, (cache, record))
    return record, cache


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _compare_layers(
    cache: PagedCache,
    table: PageTable,
    slots: jax.Array,
    attended: Attended,
    *,
    config: DecoderConfig,
) -> tuple[jax.Array, PagedCache]:
    windows = jnp.asarray(config.layer_windows, jnp.int32)

    def one_layer(
        cache: PagedCache, layer: tuple[jax.Array, jax.Array, Attended]
    ) -> tuple[PagedCache, jax.Array]:
        index, window, want = layer
        cache = append(cache, index, want.k, want.v, slots)
        out = _attend(want.q, cache, index, table, window, config)
        return cache, jnp.linalg.norm(out - want.out) / jnp.linalg.norm(want.out)

    layers = jnp.arange(config.num_layers, dtype=jnp.int32)
    cache, errors = jax.lax.scan(one_layer, cache, (layers, windows, attended))
    return errors, cache


def _attend(
    q: jax.Array,
    cache: PagedCache,
    layer: jax.Array,
    table: PageTable,
    window: jax.Array,
    config: DecoderConfig,
) -> jax.Array:
    """f32, like q: [tokens, heads, dim] of one sequence."""
    out, _, _ = attend(
        q[None],
        cache,
        layer,
        table,
        scale=config.query_scale,
        window=window if any(config.layer_windows) else None,
        soft_cap=config.soft_cap,
    )
    return out[0].astype(jnp.float32)


def cosines(
    reference: Runner, compressed: Runner, sequences: tuple[int, int]
) -> tuple[float, float] | None:
    """Mean cosine of keys and of values of all sealed tokens with the uncompressed ones; None when
    nothing is sealed. Reported because everybody does: it says little about quality.

    Args:
      reference: holds the context uncompressed.
      compressed: holds the context compressed.
      sequences: the sequence in either.
    """
    table = compressed.manager.table([sequences[1]])
    count = int(table.sealed_count[0])
    if not count:
        return None
    in_order = raw_pages(reference, sequences[0])
    size = compressed.layout.page_size
    token = table.sealed_index[0, :count, None] * size + np.arange(size)
    sinks = compressed.layout.sink_tokens if table.sink[0] >= 0 else 0
    key, value = _cosines(
        compressed.cache, reference.cache.raw, table.sealed[0, :count], in_order, token, sinks
    )
    return float(key), float(value)


@jax.jit
def _cosines(
    cache: PagedCache,
    raw: jax.Array,
    sealed: jax.Array,
    in_order: jax.Array,
    token: jax.Array,
    sinks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`in_order` are the raw pages of the uncompressed sequence, `token` [pages, page_size] the
    position of each sealed token."""
    counted = token >= sinks

    def one_layer(layer: jax.Array) -> jax.Array:
        coded = jnp.stack(read_pages(cache, layer, sealed), axis=1)
        pages = raw[layer, in_order].astype(jnp.float32)  # [pages, 2, heads, page_size, dim]
        plain = jnp.moveaxis(pages, 0, 2)
        plain = plain.reshape(*plain.shape[:2], -1, plain.shape[-1])[:, :, token]
        plain = jnp.moveaxis(plain, 2, 0)
        dot = jnp.sum(coded * plain, axis=-1)
        size = jnp.linalg.norm(coded, axis=-1) * jnp.linalg.norm(plain, axis=-1)
        cosine = dot / jnp.where(size > 0, size, 1.0)
        where = jnp.broadcast_to(counted[:, None, None, :], cosine.shape)
        return jnp.mean(cosine, axis=(0, 2, 3), where=where)

    means = jax.lax.map(one_layer, jnp.arange(raw.shape[0], dtype=jnp.int32))
    return jnp.mean(means[:, 0]), jnp.mean(means[:, 1])
