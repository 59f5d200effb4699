"""How the memory that vLLM gives one layer is divided among that layer's pools.

vLLM counts memory in blocks of equal size and hands out their ids; only the attention backend
reads or writes them. Therefore a layer's memory need not be a row of blocks: it is cut into one
region per pool of `kvcompress_jax.paged`. Pools of sealed pages (base plane, scales, order) have a
page for every block and are indexed by vLLM's block id. Raw pages, fine chunks and exact first
tokens are fewer, and have ids of their own. All of it is inside the one allocation, so that what
is stored can never be more than what vLLM was given.

A floor layer never goes below level 1: it has a fine chunk for every block, by the block's id, and
therefore asks for more bytes. All else that layers share ids of is equally many in all of them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from kvcompress_jax.calibrated import CalibratedCode
from kvcompress_jax.calibrated.profile import read_origin
from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.paged import CacheLayout, PagedCache, PoolSizes, init_cache

ALIGNMENT_BYTES = 64  # what an alias in JAX needs
BLOCKS_PER_SINK_SLOT = 24  # a sequence of 1,536 tokens in pages of 64

# Pools that lie in vLLM's memory. The others are index arrays that the host keeps.
POOLS = (
    "base key_step key_zero value_step value_zero order refined fine sinks seen mass raw".split()
)


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
    floor: bool  # each block has a fine chunk of its own, with its id
    sizes: PoolSizes
    blocks: int  # of vLLM
    buffer_bytes: int
    regions: tuple[Region, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carves:
    """The memory of the layers that share block ids.

    Invariant: both have equally many blocks, raw pages and sink slots.
    """

    common: Carve
    floor: Carve | None  # of floor layers; None: the configuration has none, or they need no more


def layer_layout(config: CompressionConfig, *, heads: int, dim: int, dtype: str) -> CacheLayout:
    """The layout of one layer; `dtype` is the model's.

    Raises:
      ProfileError: the configuration names a profile that cannot be read.
    """
    rows = None
    if config.profile is not None and config.compresses:
        rows = read_origin(config.profile).rows
    return config.layout(layers=1, kv_heads=heads, head_dim=dim, dtype=dtype, rows=rows)


def sealed_pools(layout: CacheLayout) -> tuple[str, ...]:
    """The pools of which a sealed page has one entry each, by the id of its block."""
    if layout.rows is not None:
        return ("base", "refined")
    return ("base", "key_step", "key_zero", "value_step", "value_zero", "order")


def floors_differ(config: CompressionConfig, fine_share: float) -> bool:
    """Whether floor layers need memory of another size: not where every layer has a fine chunk for
    each block anyway."""
    refined = config.sealed_level == 1 and fine_share == 1
    return config.compresses and bool(config.floor_layers) and not refined


def content_bytes(
    config: CompressionConfig,
    layout: CacheLayout,
    *,
    raw_share: float,
    fine_share: float,
    floor: bool = False,
) -> int:
    """Bytes of vLLM's memory per token and KV head of a layer: what the backend asks for.

    Base plane, scales and order of the token, or its row of a calibrated code, and its part of the
    fine chunks; of the whole, `raw_share` is for raw pages and exact first tokens. A floor layer
    (`floors_differ`) has as much and the fine chunks that the others lack, so that the size tells
    which of them a layer is.
    """
    tokens = layout.kv_heads * layout.page_size
    if not config.compresses:
        return 2 * layout.head_dim * layout.jax_dtype.itemsize
    shared = fine_share if config.sealed_level == 1 else 0.0
    stored = layout.sealed_page_bytes + shared * layout.fine_chunk_bytes
    content = _whole_steps(stored / (1 - raw_share) / tokens, tokens)
    if floor:
        content += _whole_steps((1 - shared) * layout.fine_chunk_bytes / tokens, tokens)
    return content


def _whole_steps(content: float, tokens: int) -> int:
    """Rounds up so that a layer's memory starts aligned."""
    step = ALIGNMENT_BYTES // math.gcd(ALIGNMENT_BYTES, tokens)
    return -(-math.ceil(content) // step) * step


def carve_layers(
    config: CompressionConfig,
    layout: CacheLayout,
    *,
    blocks: int,
    raw_share: float,
    fine_share: float,
) -> Carves:
    """Divides the memory of `blocks` blocks, of each kind of layer.

    Raises:
      ConfigError: there is no room for two raw pages.
    """

    def one(*, floor: bool) -> Carve:
        content = content_bytes(
            config, layout, raw_share=raw_share, fine_share=fine_share, floor=floor
        )
        return carve(
            config, layout, blocks=blocks, content=content, fine_share=fine_share, floor=floor
        )

    common = one(floor=False)
    if not floors_differ(config, fine_share):
        return Carves(common=common, floor=None)
    floor = one(floor=True)
    raw_pages = min(common.sizes.raw_pages, floor.sizes.raw_pages)
    return Carves(common=_resized(common, raw_pages), floor=_resized(floor, raw_pages))


def carve(
    config: CompressionConfig,
    layout: CacheLayout,
    *,
    blocks: int,
    content: int,
    fine_share: float,
    floor: bool = False,
) -> Carve:
    """Divides a layer's memory of `blocks` blocks with `content` bytes per token and head.

    Raises:
      ConfigError: there is no room for two raw pages.
    """
    empty = Carve(
        layout=layout,
        floor=floor,
        sizes=PoolSizes(raw_pages=blocks, sealed_pages=0, fine_chunks=0, sink_slots=0),
        blocks=blocks,
        buffer_bytes=blocks * layout.kv_heads * layout.page_size * content,
        regions=(),
    )
    if not config.compresses:
        return _placed(empty)
    chunks = int(fine_share * blocks) if config.sealed_level == 1 else 0
    sizes = PoolSizes(
        raw_pages=1,
        sealed_pages=blocks,
        fine_chunks=blocks if floor else chunks,
        sink_slots=-(-blocks // BLOCKS_PER_SINK_SLOT) if layout.sink_tokens else 0,
    )
    without = _placed(dataclasses.replace(empty, sizes=sizes), check=False)
    last = without.regions[-1]
    assert last.name == "raw"
    per_page = layout.raw_page_bytes
    slack = ALIGNMENT_BYTES * len(POOLS)
    room = without.buffer_bytes - (last.offset_bytes + last.nbytes - per_page) - slack
    if room < 2 * per_page:
        raise ConfigError(
            f"KV cache memory: expected room for 2 raw pages of {per_page} bytes in each layer,"
            f" got {max(room, 0)} bytes beside {blocks} blocks: give vLLM more memory or raise"
            " VLLM_KV_COMPRESSION_RAW_SHARE"
        )
    return _resized(without, room // per_page)


def _resized(made: Carve, raw_pages: int) -> Carve:
    return _placed(
        dataclasses.replace(made, sizes=dataclasses.replace(made.sizes, raw_pages=raw_pages))
    )


def _placed(made: Carve, *, check: bool = True) -> Carve:
    """With the regions that follow from its layout and sizes."""
    init = functools.partial(init_cache, made.layout, made.sizes)
    shapes = pool_arrays(jax.eval_shape(init, _any_code(made.layout)))
    regions, end = [], 0
    for name in POOLS:
        array = shapes[name]
        shape = array.shape if name == "fine" else array.shape[1:]
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        regions.append(
            Region(name=name, offset_bytes=start, shape=shape, dtype=jnp.dtype(array.dtype))
        )
        end = start + regions[-1].nbytes
    if check and end > made.buffer_bytes:
        raise AssertionError(f"pools: expected at most {made.buffer_bytes} bytes, got {end}")
    return dataclasses.replace(made, regions=tuple(regions))


def _any_code(layout: CacheLayout) -> CalibratedCode | None:
    """What `init_cache` wants for a layout with rows; no pool depends on what is in it."""
    if layout.rows is None:
        return None
    return CalibratedCode(*[jnp.zeros(())] * len(dataclasses.fields(CalibratedCode)))


def pool_arrays(cache: PagedCache) -> dict[str, jax.Array]:
    """The arrays of a cache that lie in vLLM's memory, by the names in `POOLS`."""
    return {
        "base": cache.base,
        "key_step": cache.key_scale.step,
        "key_zero": cache.key_scale.zero,
        "value_step": cache.value_scale.step,
        "value_zero": cache.value_scale.zero,
        "order": cache.order,
        "refined": cache.refined,
        "fine": cache.fine,
        "sinks": cache.sinks,
        "seen": cache.seen,
        "mass": cache.mass,
        "raw": cache.raw,
    }
