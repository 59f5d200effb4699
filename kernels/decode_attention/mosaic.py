"""Attention on Mosaic GPU: what `mosaic_body.py` needs, laid out, and its launch.

For decoding on sm_90 and newer, from jax 0.12 on: earlier ones have no `mma` there. This module is
the one place that knows; it imports nothing of Mosaic until it is called.
"""

import math

import jax
import jax.numpy as jnp

from kvcompress_jax.kernels.decode_attention.inputs import (
    AttentionPools,
    PageLists,
    refuse_dtypes,
)
from kvcompress_jax.kernels.decode_attention.merge import merge, received_mass
from kvcompress_jax.kernels.decode_attention.queries import (
    list_pages,
    sliding_window,
    tile_queries,
)
from kvcompress_jax.kernels.decode_attention.sinks import sinks_share

OLDEST_JAX = (0, 12)
OLDEST_CAPABILITY = (9, 0)  # copies of blocks by the hardware
PAGE_SIZES = (64, 128)
FINE_ROWS = (0, 32, 64, 128)  # rows of bytes that shared memory can be swizzled for
# Queries times query heads of a KV head, by dim: more would not fit in registers.
MOST_COLUMNS = {128: 16, 256: 8}
PROGRAMS = 1024  # that the work is split into
# Shared memory of a block of threads for pages on their way, in bytes: three blocks fit on a core.
PAGES_ROOM, MOST_STAGES = 64 << 10, 4


def attention_mosaic(
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
    programs: int = PROGRAMS,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """See `kvcompress_jax.kernels.decode_attention.decode_attention`.

    Args:
      programs: to split the work into.
      interpret: run it in JAX on any device.
    """
    _refuse(q, pools, interpret=interpret)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kvcompress_jax.kernels.decode_attention.mosaic_body import Plan, attention_kernel, scratch

    rows, queries, all_heads, dim = q.shape
    codes, raw = pools.codes, pools.raw
    heads, page_size = raw.shape[3:5]
    n = queries * (all_heads // heads)
    columns = -(-n // 8) * 8
    half, fine_rows = dim // 2, codes.fine_rows
    pages = max(lists.sealed.shape[1] + lists.raw.shape[1], 1)
    plan = Plan(
        page_size=page_size,
        half=half,
        fine_rows=fine_rows,
        sink_tokens=pools.sink_tokens,
        columns=columns,
        splits=max(1, min(-(-programs // (rows * heads)), pages)),
        heads=heads,
        pages=codes.base.shape[1],
        raw_pages=raw.shape[1],
        scale=scale * math.log2(math.e),
        cap=None if soft_cap is None else soft_cap * math.log2(math.e),
        window=window is not None,
        mass=return_mass,
        sealed=bool(codes.base.shape[1] and lists.sealed.shape[1]),
        exact=raw.dtype,
        stages=_stages(2 * half * (page_size + fine_rows)),
        raw_stages=_stages(64 * 2 * dim * raw.dtype.itemsize),
        interpret=interpret,
    )
    seen = sliding_window(window, lists, query_lengths)
    tiled = tile_queries(q, lists, query_lengths, kv_heads=heads, tile=columns)
    listed = list_pages(pools, lists, layer, seen, sealed=plan.sealed, mass=return_mass)
    inputs = listed.arrays | {"raw": raw.reshape(-1, page_size, dim)}
    inputs |= {"q": tiled.q, "position": tiled.position}
    if pools.sink_tokens:
        inputs |= sinks_share(pools, lists, layer, tiled, seen, scale=plan.scale, cap=plan.cap)
    if plan.sealed:
        inputs |= {
            "base_keys": codes.base.reshape(-1, page_size, half),
            "base_values": codes.base.reshape(-1, half, page_size),
            "key_step": codes.key_step.reshape(-1, dim),
            "key_zero": codes.key_zero.reshape(-1, dim),
            "value_step": codes.value_step.reshape(-1, page_size),
            "value_zero": codes.value_zero.reshape(-1, page_size),
        }
        if plan.window:
            inputs |= {"order": codes.order.reshape(-1, page_size)}
        if fine_rows:
            inputs |= {
                "fine_keys": codes.fine.reshape(-1, fine_rows, half),
                "fine_values": codes.fine.reshape(-1, half, fine_rows),
            }

    outputs = {
        "out": (rows, heads, plan.splits, dim, columns),
        "lse": (rows, heads, plan.splits, columns),
    }
    if plan.mass:
        sealed, recents = (max(x.shape[1], 1) for x in (lists.sealed, lists.raw))
        outputs["page_lse"] = (rows, heads, sealed, columns)
        outputs["logits"] = (rows, heads, recents, page_size, columns)
    buffers = scratch(plan)
    names = [*inputs, *outputs, *buffers]

    def decode_attention(*refs):  # type: ignore[no-untyped-def]  # the kernel's name
        attention_kernel(dict(zip(names, refs, strict=True)), plan)

    results = plgpu.kernel(
        decode_attention,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs.values()],
        scratch_types=list(buffers.values()),
        grid=(plan.splits, heads, rows),
        grid_names=("split", "head", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=2048),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*inputs.values())
    shares = dict(zip(outputs, results, strict=True))
    out, lse = merge(shares["out"], shares["lse"], q, query_lengths=query_lengths)
    return out, lse, received_mass(shares, lse, listed=listed, lists=lists)


def _stages(nbytes: int) -> int:
    """Steps whose blocks fit in shared memory at a time."""
    return min(max(PAGES_ROOM // nbytes, 1), MOST_STAGES)


def _refuse(q: jax.Array, pools: AttentionPools, *, interpret: bool) -> None:
    if jax.__version_info__[:2] < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise NotImplementedError(f"jax: expected {oldest} or newer, got {jax.__version__}")
    capability = None if interpret else _capability()
    if capability is not None and capability < OLDEST_CAPABILITY:
        found = "".join(map(str, capability))
        raise NotImplementedError(f"device: expected sm_90 or newer, got sm_{found}")
    heads, page_size, dim = pools.raw.shape[3:]
    refuse_dtypes(q, pools, float32=False)
    if page_size not in PAGE_SIZES:
        raise NotImplementedError(f"page_size: expected one of {PAGE_SIZES}, got {page_size}")
    if dim not in MOST_COLUMNS:
        raise NotImplementedError(f"dim: expected one of {tuple(MOST_COLUMNS)}, got {dim}")
    rows = pools.codes.fine_rows
    if rows not in FINE_ROWS:
        raise NotImplementedError(f"fine_rows: expected one of {FINE_ROWS}, got {rows}")
    if pools.codes.fine_bits != 4:
        raise NotImplementedError(f"fine_bits: expected 4, got {pools.codes.fine_bits}")
    columns = q.shape[1] * (q.shape[2] // heads)
    if columns > MOST_COLUMNS[dim]:
        raise NotImplementedError(
            f"q: expected at most {MOST_COLUMNS[dim]} queries times query heads of a KV head"
            f" where dim is {dim}, got {columns}"
        )


def _capability() -> tuple[int, int] | None:
    """Of the device that is compiled for; None: it does not say."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if not hasattr(device, "compute_capability"):
        device = jax.devices()[0]
    if not hasattr(device, "compute_capability"):
        return None
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)
