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
from kvcompress_jax.kernels.decode_attention.merge import received_mass
from kvcompress_jax.kernels.decode_attention.merge_kernel import merge_triton
from kvcompress_jax.kernels.decode_attention.queries import list_pages, sliding_window
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
      tuning: num_warps of tiles of 8 queries, num_warps_raw of them where no page is sealed, and
        num_warps_wide of wider ones, which need more registers; num_stages, `programs` to split
        the work into, programs_raw where no page is sealed, `columns` of a tile (a power of two),
        `widest` piece of channels. None: what suits the shape and the device.
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
    sealed = bool(codes.base.shape[1] and lists.sealed.shape[1])
    splits = -(-tuning["programs" if sealed else "programs_raw"] // (rows * heads * tiles))
    plan = Plan(
        page_size=page_size,
        half=dim // 2,
        fine_rows=codes.fine_rows,
        refined_slots=codes.refined_slots,
        sink_tokens=pools.sink_tokens,
        queries=queries,
        group=group,
        columns=tile,
        splits=max(1, min(splits, pages)),
        scale=scale * math.log2(math.e),
        cap=None if soft_cap is None else soft_cap * math.log2(math.e),
        window=window is not None,
        mass=return_mass,
        sealed=sealed,
        interpret=interpret,
        widest=tuning["widest"],
    )
    listed = list_pages(
        pools,
        lists,
        layer,
        sliding_window(window, lists, query_lengths),
        sealed=plan.sealed,
        mass=return_mass,
    )
    inputs = listed.arrays | {"q": q, "query_lengths": query_lengths, "raw": raw}
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
    outputs = {
        "out": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "lse": jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    }
    if plan.splits > 1:
        shape = (rows, heads, plan.splits, n)
        outputs["out"] = jax.ShapeDtypeStruct((*shape, dim), jnp.float32)
        outputs["lse"] = jax.ShapeDtypeStruct(shape, jnp.float32)
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
            num_warps=tuning[_warps(plan)], num_stages=tuning["num_stages"]
        ),
        interpret=interpret,
    )(*inputs.values())
    shares = dict(zip(outputs, results, strict=True))
    out, lse = shares["out"], shares["lse"]
    if plan.splits > 1:
        out, lse = merge_triton(out, lse, q, query_lengths=query_lengths, interpret=interpret)
    return out, lse, received_mass(shares, lse, listed=listed, lists=lists)


def _warps(plan: Plan) -> str:
    """The setting that says how many a program has."""
    if plan.columns > 8:
        return "num_warps_wide"
    return "num_warps" if plan.sealed else "num_warps_raw"


def _refuse(q: jax.Array, pools: AttentionPools, dim: int) -> None:
    refuse_dtypes(q, pools, float32=True)
    if dim % 32:
        raise NotImplementedError(f"dim: expected a multiple of 32, got {dim}")
    if pools.sink_tokens > SINK_ROWS:
        raise NotImplementedError(
            f"sink_tokens: expected at most {SINK_ROWS}, got {pools.sink_tokens}"
        )
