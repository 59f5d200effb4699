"""One step of a serving loop on the device: tokens in, logits and a new cache out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.decoder import decode, logits
from kvcompress_jax.models.params import DecoderParams
from kvcompress_jax.models.sharding import param_specs
from kvcompress_jax.paged import (
    PagedCache,
    PageTable,
    append,
    attend,
    cool,
    observe,
    order_by_level,
)
from kvcompress_jax.paged.heads import gather_heads
from kvcompress_jax.paged.host_arrays import HostArray
from kvcompress_jax.paged.measure import measure
from kvcompress_jax.paged.raw_bits import hold_bits, release_bits
from kvcompress_jax.paged.sharding import REPLICATED, HeadSharding, cache_specs, whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Sequences that get the same number of query slots in a step."""

    table: PageTable
    query_lengths: HostArray  # i32[rows]: new tokens of each; the rest of its slots is padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Tokens of one step: first those of the decoding rows, one each, then a chunk for each
    prefilling row."""

    tokens: HostArray  # i32[decoding + prefilling * chunk]
    positions: HostArray  # i32, like tokens
    slots: HostArray  # i32, like tokens; -1 for padding
    decoding: Rows | None
    prefilling: Rows | None
    wanted: HostArray  # i32[n] indices into tokens whose logits are returned
    shadows: HostArray | None = None  # sealed page of each shadow, in steps that are measured


@functools.partial(
    jax.jit,
    static_argnames=("config", "track_mass", "decay", "sharding"),
    donate_argnames="cache",
)
def run_step(
    params: DecoderParams,
    cache: PagedCache,
    step: Step,
    *,
    config: DecoderConfig,
    track_mass: bool,
    decay: float,
    sharding: HeadSharding | None = None,
) -> tuple[jax.Array, PagedCache]:
    """Appends a step's tokens and attends to the cache, layer by layer.

    Args:
      params: weights of the decoder.
      cache: donated.
      step: tokens, where they go, and whom they belong to.
      config: of the decoder.
      track_mass: whether attention mass is observed, for importance and heat.
      decay: what is left of the pages' heat after a step.
      sharding: of the cache's heads and of the weights (`kvcompress_jax.models.sharding`).

    Returns:
      f32[n, vocab] logits of `step.wanted`, and the cache.
    """
    one = functools.partial(_one_step, config=config, track_mass=track_mass, decay=decay)
    if sharding is None:
        return one(params, cache, step)
    layout, specs = cache.layout, cache_specs(sharding, cache)

    def on_device(
        params: DecoderParams, cache: PagedCache, step: Step
    ) -> tuple[jax.Array, PagedCache]:
        out, cache = one(params, sharding.shard(cache), step, split_weights=sharding.split_weights)
        return out, whole(cache, layout)

    out, cache = sharding.run(
        on_device,
        params,
        cache,
        step,
        in_specs=(param_specs(sharding, params), specs, REPLICATED),
        out_specs=(REPLICATED, specs),
    )
    return out, cache


def _one_step(
    params: DecoderParams,
    cache: PagedCache,
    step: Step,
    *,
    config: DecoderConfig,
    track_mass: bool,
    decay: float,
    split_weights: bool = False,
) -> tuple[jax.Array, PagedCache]:
    """See `run_step`: all of it, or the part of one device."""
    split, windowed = cache.split, any(config.layer_windows)

    def ordered(rows: Rows | None) -> Rows | None:
        if rows is None or windowed:  # a window leaves out other pages in each layer
            return rows
        return dataclasses.replace(rows, table=order_by_level(cache, rows.table))

    step = dataclasses.replace(
        step, decoding=ordered(step.decoding), prefilling=ordered(step.prefilling)
    )
    groups = [rows for rows in (step.decoding, step.prefilling) if rows is not None]

    def attention(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        cache: PagedCache,
    ) -> tuple[jax.Array, PagedCache]:
        if split is not None and not split_weights:
            q, k, v = (split.own(x, 1) for x in (q, k, v))
        cache = append(cache, layer, k, v, step.slots)
        outs, first = [], 0
        for rows in groups:
            sequences = rows.query_lengths.shape[0]
            queries = 1 if rows is step.decoding else (q.shape[0] - first) // sequences
            part = q[first : first + sequences * queries]
            first += sequences * queries
            part = part.reshape(sequences, queries, *q.shape[1:])
            out, lse, mass = attend(
                part,
                cache,
                layer,
                rows.table,
                query_lengths=rows.query_lengths,
                scale=config.query_scale,
                window=window if windowed else None,
                soft_cap=config.soft_cap,
                return_mass=track_mass,
            )
            if mass is not None:
                cache = observe(cache, layer, rows.table, rows.query_lengths, mass)
            if step.shadows is not None:
                cache = measure(
                    cache,
                    layer,
                    part,
                    rows.table,
                    step.shadows,
                    out,
                    lse,
                    query_lengths=rows.query_lengths,
                    scale=config.query_scale,
                    window=window if windowed else None,
                    soft_cap=config.soft_cap,
                )
            outs.append(out.reshape(sequences * queries, *q.shape[1:]))
        joined = jnp.concatenate(outs)
        return joined if split_weights else gather_heads(split, joined, 1), cache

    if track_mass:
        cache = cool(cache, decay)
    hidden, cache = decode(
        params,
        config,
        step.tokens,
        step.positions,
        attention,
        hold_bits(cache),
        gather=(lambda x: gather_heads(split, x, x.ndim - 1)) if split_weights else lambda x: x,
    )
    return logits(params, config, hidden[step.wanted]), release_bits(cache)
