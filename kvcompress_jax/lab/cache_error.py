"""How far a compressed cache is from the uncompressed one: attention outputs, keys, values."""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.decoder import decode
from kvcompress_jax.models.params import DecoderParams
from kvcompress_jax.models.runner import Runner
from kvcompress_jax.paged import PagedCache, PageTable, append, attend, read_pages


def attention_output_error(
    reference: Runner, compressed: Runner, sequences: tuple[int, int], tokens: list[int]
) -> float:
    """Relative L2 error of the attention outputs, mean over layers: the same queries attend to
    both caches, layer by layer, and the uncompressed result goes on.

    Args:
      reference: holds the context uncompressed.
      compressed: holds the context compressed.
      sequences: the sequence in either.
      tokens: whose queries are taken; both sequences grow by them.
    """
    start = reference.manager.length(sequences[0])
    runners, tables, slots = (reference, compressed), [], []
    for runner, sequence in zip(runners, sequences, strict=True):
        runner.advance()
        slots.append(runner.manager.append_slots(sequence, len(tokens)))
        tables.append(runner.manager.table([sequence]))
    errors, reference.cache, compressed.cache = _compare_layers(
        reference.model.params,
        (reference.cache, compressed.cache),
        tuple(tables),
        tuple(slots),
        np.array(tokens, np.int32),
        np.arange(start, start + len(tokens), dtype=np.int32),
        config=reference.model.config,
    )
    return float(jnp.mean(errors))


_State: TypeAlias = tuple[PagedCache, PagedCache, jax.Array]


@functools.partial(jax.jit, static_argnames="config", donate_argnums=1)
def _compare_layers(
    params: DecoderParams,
    caches: tuple[PagedCache, PagedCache],
    tables: tuple[PageTable, PageTable],
    slots: tuple[jax.Array, jax.Array],
    tokens: jax.Array,
    positions: jax.Array,
    *,
    config: DecoderConfig,
) -> tuple[jax.Array, PagedCache, PagedCache]:
    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, window: jax.Array, state: _State
    ) -> tuple[jax.Array, _State]:
        first, second, errors = state
        grown, outs = [], []
        for cache, table, own_slots in zip((first, second), tables, slots, strict=True):
            grown.append(append(cache, layer, k, v, own_slots))
            out, _, _ = attend(
                q[None],
                grown[-1],
                layer,
                table,
                scale=config.query_scale,
                window=window if any(config.layer_windows) else None,
                soft_cap=config.soft_cap,
            )
            outs.append(out[0].astype(jnp.float32))
        error = jnp.linalg.norm(outs[1] - outs[0]) / jnp.linalg.norm(outs[0])
        return outs[0].astype(q.dtype), (grown[0], grown[1], errors.at[layer].set(error))

    errors = jnp.zeros((config.num_layers,), jnp.float32)
    _, (first, second, errors) = decode(
        params, config, tokens, positions, attention, (caches[0], caches[1], errors)
    )
    return errors, first, second


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
    plain = reference.manager.table([sequences[0]])
    in_order = plain.raw[0, np.argsort(plain.raw_index[0, : int(plain.raw_count[0])])]
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
