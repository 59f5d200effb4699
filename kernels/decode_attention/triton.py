"""Attention on Pallas's Triton route: what `body.py` needs, laid out, and its launch."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvcompress_jax.kernels.decode_attention.body import SINK_ROWS, Plan, attention_kernel
from kvcompress_jax.kernels.decode_attention.inputs import (
    AttentionPools,
    PageLists,
    refuse_dtypes,
)
from kvcompress_jax.kernels.decode_attention.merge import merge
from kvcompress_jax.kernels.decode_attention.queries import list_pages, tile_queries
from kvcompress_jax.kernels.pools import check_addressable
from kvcompress_jax.kernels.tuning import Tuning, find_tuning


def attention_triton(
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
    op: str = "decode_attention",
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """See `kvcompress_jax.kernels.decode_attention.decode_attention`.

    Args:
      op: whose settings are looked up.
      tuning: num_warps of tiles of 8 queries, and num_warps_wide of wider ones, which need more
        registers; num_stages, `programs` to split the work into, `columns` of a tile (a
        power of two), `widest` piece of channels. None: what suits the shape and the device.
      interpret: run it in JAX on any device.
    """
    rows, queries, all_heads, dim = q.shape
    codes, raw = pools.codes, pools.raw
    heads, page_size = raw.shape[3:5]
    _refuse(q, pools, dim)
    tuning = tuning or find_tuning(op, f"{page_size}x{dim}")
    group = all_heads // heads
    n = queries * group
    tile = min(tuning["columns"], max(8, 1 << (n - 1).bit_length()))
    tiles = -(-n // tile)
    pages = max(lists.sealed.shape[1] + lists.raw.shape[1], 1)
    splits = -(-tuning["programs"] // (rows * heads * tiles))
    plan = Plan(
        page_size=page_size,
        half=dim // 2,
        fine_rows=codes.fine_rows,
        sink_tokens=pools.sink_tokens,
        columns=tile,
        splits=max(1, min(splits, pages)),
        heads=heads,
        scale=scale * math.log2(math.e),
        cap=None if soft_cap is None else soft_cap * math.log2(math.e),
        window=window is not None,
        mass=return_mass,
        sealed=bool(codes.base.shape[1] and lists.sealed.shape[1]),
        interpret=interpret,
        widest=tuning["widest"],
    )

    tiled = tile_queries(q, lists, query_lengths, kv_heads=heads, window=window, tile=tile)
    listed = list_pages(pools, lists, layer, tiled, sealed=plan.sealed)
    inputs = listed.arrays | {"raw": raw}
    if plan.sink_tokens:
        inputs |= {"sinks": pools.sinks, "sink": lists.sink}
    if plan.sealed:
        inputs |= {
            "base": codes.base,
            "key_step": codes.key_step,
            "key_zero": codes.key_zero,
            "value_step": codes.value_step,
            "value_zero": codes.value_zero,
        }
        if plan.window:
            inputs |= {"order": codes.order}
        if plan.fine_rows:
            inputs |= {"fine": codes.fine}
    check_addressable(**inputs)

    width = tiles * tile
    # One share needs no merging, and can be as short as the result.
    dtype = jnp.float32 if plan.splits > 1 else q.dtype
    outputs = {
        "out": jax.ShapeDtypeStruct((rows, heads, plan.splits, dim, width), dtype),
        "lse": jax.ShapeDtypeStruct((rows, heads, plan.splits, width), jnp.float32),
    }
    if plan.mass:
        columns, recents = lists.sealed.shape[1], lists.raw.shape[1]
        shape = (rows, heads, max(columns, 1), width)
        outputs["page_lse"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        shape = (rows, heads, max(recents, 1), page_size, width)
        outputs["logits"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    somewhere = pl.BlockSpec(memory_space=pl.ANY)
    names = [*inputs, *outputs]
    results = pl.pallas_call(
        lambda *refs: attention_kernel(dict(zip(names, refs, strict=True)), plan),
        name=op,
        grid=(plan.splits, heads * tiles, rows),
        in_specs=[somewhere] * len(inputs),
        out_specs=[somewhere] * len(outputs),
        out_shape=list(outputs.values()),
        compiler_params=plt.CompilerParams(
            num_warps=tuning["num_warps" if tile <= 8 else "num_warps_wide"],
            num_stages=tuning["num_stages"],
        ),
        interpret=interpret,
    )(*inputs.values())
    return merge(
        dict(zip(outputs, results, strict=True)),
        q,
        kv_heads=heads,
        query_lengths=query_lengths,
        past=listed.past,
        recent=listed.recent,
        columns=(lists.sealed.shape[1], lists.raw.shape[1]),
    )


def _refuse(q: jax.Array, pools: AttentionPools, dim: int) -> None:
    refuse_dtypes(q, pools)
    if dim % 32:
        raise NotImplementedError(f"dim: expected a multiple of 32, got {dim}")
    if pools.sink_tokens > SINK_ROWS:
        raise NotImplementedError(
            f"sink_tokens: expected at most {SINK_ROWS}, got {pools.sink_tokens}"
        )
