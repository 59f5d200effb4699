"""How the memory that vLLM gives one layer is divided among that layer's pools.

vLLM counts memory in blocks of equal size and hands out their ids; only the attention backend
reads or writes them. Therefore a layer's memory need not be a row of blocks: it is cut into one
region per pool of `kvcompress_jax.paged`. Pools of sealed pages (base plane, scales, order) have a
page for every block and are indexed by vLLM's block id. Raw pages, fine chunks and exact first
tokens are fewer, and have ids of their own. All of it is inside the one allocation, so that what
is stored can never be more than what vLLM was given.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.paged import CacheLayout, PagedCache, PoolSizes, init_cache

ALIGNMENT_BYTES = 64  # what an alias in JAX needs
BLOCKS_PER_SINK_SLOT = 24  # a sequence of 1,536 tokens in pages of 64

# Pools that lie in vLLM's memory. The others are index arrays that the host keeps.
POOLS = "base key_step key_zero value_step value_zero order fine sinks seen mass raw".split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """Where a pool of one layer is."""

    name: str
    offset_bytes: int
    shape: tuple[int, ...]  # of the pool, its axis of layers (of one) left out
    dtype: jnp.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carve:
    """One layer's memory.

    Invariants: regions are aligned, do not overlap, and end at or before `buffer_bytes`.
    """

    layout: CacheLayout  # of one layer
    sizes: PoolSizes
    blocks: int  # of vLLM
    buffer_bytes: int
    regions: tuple[Region, ...]


def layer_layout(config: CompressionConfig, *, heads: int, dim: int, dtype: str) -> CacheLayout:
    """The layout of one layer; `dtype` is the model's."""
    return config.layout(layers=1, kv_heads=heads, head_dim=dim, dtype=dtype)


def content_bytes(
    config: CompressionConfig, layout: CacheLayout, *, raw_share: float, fine_share: float
) -> int:
    """Bytes of vLLM's memory per token and KV head of a layer: what the backend asks for.

    Base plane, scales and order of the token, and its part of the fine chunks; of the whole,
    `raw_share` is for raw pages and exact first tokens.
    """
    tokens = layout.kv_heads * layout.page_size
    if not config.compresses:
        return 2 * layout.head_dim * layout.jax_dtype.itemsize
    stored = float(layout.sealed_page_bytes)
    if config.sealed_level == 1:
        stored += fine_share * layout.fine_chunk_bytes
    content = math.ceil(stored / (1 - raw_share) / tokens)
    step = ALIGNMENT_BYTES // math.gcd(ALIGNMENT_BYTES, tokens)  # a layer starts aligned
    return -(-content // step) * step


def carve(
    config: CompressionConfig, layout: CacheLayout, *, blocks: int, content: int, fine_share: float
) -> Carve:
    """Divides a layer's memory of `blocks` blocks with `content` bytes per token and head.

    Raises:
      ConfigError: there is no room for two raw pages.
    """
    buffer = blocks * layout.kv_heads * layout.page_size * content
    if not config.compresses:
        sizes = PoolSizes(raw_pages=blocks, sealed_pages=0, fine_chunks=0, sink_slots=0)
        return _place(layout, sizes, blocks, buffer)
    sizes = PoolSizes(
        raw_pages=1,
        sealed_pages=blocks,
        fine_chunks=int(fine_share * blocks) if config.sealed_level == 1 else 0,
        sink_slots=-(-blocks // BLOCKS_PER_SINK_SLOT) if layout.sink_tokens else 0,
    )
    without = _place(layout, sizes, blocks, buffer, check=False)
    last = without.regions[-1]
    assert last.name == "raw"
    per_page = layout.raw_page_bytes
    slack = ALIGNMENT_BYTES * len(POOLS)
    room = buffer - (last.offset_bytes + last.nbytes - per_page) - slack
    if room < 2 * per_page:
        raise ConfigError(
            f"KV cache memory: expected room for 2 raw pages of {per_page} bytes in each layer,"
            f" got {max(room, 0)} bytes beside {blocks} blocks: give vLLM more memory or raise"
            " VLLM_KV_COMPRESSION_RAW_SHARE"
        )
    sizes = dataclasses.replace(sizes, raw_pages=room // per_page)
    return _place(layout, sizes, blocks, buffer)


def _place(
    layout: CacheLayout, sizes: PoolSizes, blocks: int, buffer: int, *, check: bool = True
) -> Carve:
    shapes = pool_arrays(jax.eval_shape(functools.partial(init_cache, layout, sizes)))
    regions, end = [], 0
    for name in POOLS:
        array = shapes[name]
        shape = array.shape if name == "fine" else array.shape[1:]
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        regions.append(
            Region(name=name, offset_bytes=start, shape=shape, dtype=jnp.dtype(array.dtype))
        )
        end = start + regions[-1].nbytes
    if check and end > buffer:
        raise AssertionError(f"pools: expected at most {buffer} bytes, got {end}")
    return Carve(
        layout=layout, sizes=sizes, blocks=blocks, buffer_bytes=buffer, regions=tuple(regions)
    )


def pool_arrays(cache: PagedCache) -> dict[str, jax.Array]:
    """The arrays of a cache that lie in vLLM's memory, by the names in `POOLS`."""
    return {
        "base": cache.base,
        "key_step": cache.key_scale.step,
        "key_zero": cache.key_scale.zero,
        "value_step": cache.value_scale.step,
        "value_zero": cache.value_scale.zero,
        "order": cache.order,
        "fine": cache.fine,
        "sinks": cache.sinks,
        "seen": cache.seen,
        "mass": cache.mass,
        "raw": cache.raw,
    }
