"""Shapes and bytes of the paged cache: the single source of truth for both.

Pools of one cache (layers share page ids):

    raw     [layers, raw_pages, 2, heads, page_size, dim]         dtype   level 0
    mass    [layers, raw_pages, heads, page_size]                 f32     attention received
    seen    [layers, raw_pages, page_size]                        f32     queries that could see it
    base    [layers, sealed_pages, 2, heads, page_size * dim/2]   u8      levels 1 and 2
    scales  keys   step, zero [layers, sealed_pages, heads, dim]          bf16, f16
            values step, zero [layers, sealed_pages, heads, page_size]    bf16, f16
    order   [layers, sealed_pages, heads, page_size]              u8      token of each slot
    fine    [fine_chunks, 2, heads, fine_rows * dim/2]            u8      level 1
    fine_of [layers, sealed_pages]                                i32     chunk id or -1
    sinks   [layers, sink_slots, 2, heads, sink_tokens, dim]      dtype   exact first tokens
    sealed, heat [sealed_pages]                                   bool, f32
    shadow  [layers, shadow_pages, 2, heads, page_size, dim]      dtype   raw copies, for telemetry

With a calibrated code (level 3) there are no scales, order and fine chunks, and instead

    base     [layers, sealed_pages, heads, page_size, row_bytes]                u8
    refined  [layers, sealed_pages, heads, refined_tokens, 2, refined_bytes]    u8
    first    [sealed_pages]                   i32, position of the page's first token

`mass` and `seen` have no pages in a cache without statistics. How codes lie in the bytes of `base`
and `fine`, `plane_bytes.py` says.

Index 0 of an axis of 2 is the key, 1 the value. A fine chunk belongs to one layer of one page,
so that a layer can have a level of its own.
"""

import dataclasses
import math

import jax.numpy as jnp

from kvcompress_jax.calibrated.row import RowLayout
from kvcompress_jax.importance import ImportanceRule
from kvcompress_jax.paged.plane_bytes import refined_slots

PAGE_SIZES = (16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")
SCALE_BYTES = 4  # step and zero, 16 bits each
INDEX_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """What one page of one model's cache looks like. Hashable: a static argument of jit.

    Attributes:
      layers: decoder layers.
      kv_heads: key/value heads of a layer.
      head_dim: channels of a head; even.
      page_size: tokens of a page; at most 256, so that a slot's token fits a byte.
      dtype: of level 0: bfloat16, float16 or float32.
      fine_rows: rows of a fine chunk, per head; 0 = no level 1.
      fine_bits: by which a fine chunk refines a token: 4, one token to a row, or 2, two to a row.
      sink_tokens: first tokens of a sequence that stay exact; 0 = none.
      importance: how the tokens of a page are ordered.
      statistics: whether raw pages keep count of the attention that their tokens receive; without,
        a page's tokens are ordered by their error alone.
      rows: of the calibrated code that sealed pages have; None: base and fine planes.
    """

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int = 64
    dtype: str = "bfloat16"
    fine_rows: int = 32
    fine_bits: int = 4
    sink_tokens: int = 4
    importance: ImportanceRule = ImportanceRule()
    statistics: bool = True
    rows: RowLayout | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size: expected one of {PAGE_SIZES}, got {self.page_size}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES}, got {self.dtype!r}")
        if not 0 <= self.fine_rows <= self.page_size:
            raise ValueError(
                f"fine_rows: expected 0 to {self.page_size} (page_size), got {self.fine_rows}"
            )
        halved = self.fine_bits == 2 and self.fine_rows <= self.page_size // 2
        if self.fine_bits != 4 and not halved:
            raise ValueError(
                f"fine_bits: expected 4, or 2 with fine_rows of at most {self.page_size // 2}"
                f" (page_size / 2), got {self.fine_bits} with fine_rows={self.fine_rows}"
            )
        if not 0 <= self.sink_tokens < self.page_size:
            raise ValueError(
                f"sink_tokens: expected 0 to {self.page_size - 1} (page_size - 1),"
                f" got {self.sink_tokens}"
            )

        if self.rows is not None and self.fine_rows:
            raise ValueError(f"fine_rows: expected 0 with a calibrated code, got {self.fine_rows}")

    @property
    def jax_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def refined_slots(self) -> int:
        """Slots of a page that a fine chunk refines: the first ones."""
        return refined_slots(self.fine_rows, self.fine_bits)

    @property
    def values_per_page(self) -> int:
        """Numbers that one page of one layer holds: keys and values of all heads."""
        return 2 * self.kv_heads * self.page_size * self.head_dim

    @property
    def uncompressed_page_bytes(self) -> int:
        """One page of all layers as plain keys and values of `dtype`."""
        return self.layers * self.values_per_page * self.jax_dtype.itemsize

    @property
    def raw_page_bytes(self) -> int:
        """A level 0 page of all layers, with its statistics."""
        counts = (self.kv_heads + 1) * self.page_size * 4 if self.statistics else 0
        return self.uncompressed_page_bytes + self.layers * counts

    @property
    def sealed_page_bytes(self) -> int:
        """A sealed page of all layers without fine chunks: base plane, scales, order, tables."""
        if self.rows is not None:
            return self.layers * (self._row_page_bytes + INDEX_BYTES) + 1 + 4 + INDEX_BYTES
        base = self.values_per_page // 2
        scales = self.kv_heads * (self.head_dim + self.page_size) * SCALE_BYTES
        order = self.kv_heads * self.page_size
        return self.layers * (base + scales + order + INDEX_BYTES) + 1 + 4  # sealed, heat

    @property
    def _row_page_bytes(self) -> int:
        """One layer of a page at level 3."""
        assert self.rows is not None
        tokens = self.page_size * self.rows.row_bytes(self.head_dim)
        refined = self.rows.refined_tokens(self.page_size)
        return self.kv_heads * (tokens + refined * 2 * self.rows.refined_bytes(self.head_dim))

    @property
    def fine_chunk_bytes(self) -> int:
        """The fine plane of one layer of one page."""
        return self.kv_heads * self.fine_rows * self.head_dim

    @property
    def telemetry_bytes(self) -> int:
        """The sums that telemetry keeps, all layers."""
        return self.layers * 6 * 4

    @property
    def sink_slot_bytes(self) -> int:
        """The exact first tokens of one sequence, all layers."""
        per_token = 2 * self.kv_heads * self.head_dim * self.jax_dtype.itemsize
        return self.layers * self.sink_tokens * per_token

    def effective_bits(self, *, sealed_pages: int, fine_chunks: int) -> float:
        """Stored bits per key or value of sealed pages, all overheads counted.

        An entry of the page table (4 bytes of id and 4 of position) is counted for every page.
        """
        if sealed_pages == 0:
            return math.nan
        table = 2 * INDEX_BYTES
        stored = sealed_pages * (self.sealed_page_bytes + table)
        stored += fine_chunks * self.fine_chunk_bytes
        return 8 * stored / (sealed_pages * self.layers * self.values_per_page)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolSizes:
    """How many pages of each kind a cache has room for. Hashable."""

    raw_pages: int
    sealed_pages: int
    fine_chunks: int
    sink_slots: int
    shadow_pages: int = 0  # raw copies for telemetry; 0: no telemetry
    learned_bytes: int = 0  # weights of the trained importance

    def __post_init__(self) -> None:
        if self.raw_pages < 1:
            raise ValueError(f"raw_pages: expected at least 1, got {self.raw_pages}")
        for name in ("sealed_pages", "fine_chunks", "sink_slots", "shadow_pages", "learned_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")

    def total_bytes(self, layout: CacheLayout) -> int:
        """Device bytes of all pools, to the byte what `init_cache` allocates (scalars aside)."""
        return (
            self.raw_pages * layout.raw_page_bytes
            + self.sealed_pages * layout.sealed_page_bytes
            + self.fine_chunks * layout.fine_chunk_bytes
            + self.sink_slots * layout.sink_slot_bytes
            + self.shadow_pages * layout.uncompressed_page_bytes
            + (layout.telemetry_bytes if self.shadow_pages else 0)
            + self.learned_bytes
        )
