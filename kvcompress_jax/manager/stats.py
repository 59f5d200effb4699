"""What the manager reports, and the check that it is true.

Keys of `compression_stats`, bytes of the device unless said otherwise:

    memory_saved_mb         (uncompressed_bytes - allocated_bytes) / 1e6
    avg_compression_ratio   uncompressed_bytes / allocated_bytes; 1.0 for an empty cache
    uncompressed_bytes      the same pages as plain keys and values of the model's dtype
    allocated_bytes         pages, chunks and slots in use, with scales, orders, statistics, tables
    pool_bytes              all pools, in use or not
    host_bytes              host memory of kept fine planes and preempted sequences
    effective_bits          stored bits per value of the sealed pages, all overheads; None without
    cache_bits              stored bits per value of all pages in use; None for an empty cache
    tokens                  tokens of the sequences on the device; shared ones count once
    sequences, preempted_sequences
    pages_level_0, pages_level_1, pages_level_2
    seals, rejected, demotions, promotions, refusals, unrefined, evictions, forks, preemptions,
    resumes                 see `kvcompress_jax.manager.counters.Counters`
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import TYPE_CHECKING

import jax
import numpy as np

from kvcompress_jax.manager.page import NONE, Page
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.layout import INDEX_BYTES

if TYPE_CHECKING:
    from kvcompress_jax.manager.kv_manager import KVCacheManager


def compression_stats(manager: KVCacheManager) -> dict[str, object]:
    """See the module's docstring for the keys."""
    layout = manager.layout
    pages = [p for p in manager.pages.values() if p.raw != NONE or p.sealed != NONE]
    entries = sum(len(s.pages) for s in manager.sequences.values() if s.swapped is None)
    allocated = (
        manager.raw.used * layout.raw_page_bytes
        + manager.sealed.used * layout.sealed_page_bytes
        + manager.chunks.used * layout.fine_chunk_bytes
        + manager.sinks.used * layout.sink_slot_bytes
        + entries * 2 * INDEX_BYTES
    )
    uncompressed = len(pages) * layout.uncompressed_page_bytes
    effective = layout.effective_bits(
        sealed_pages=manager.sealed.used, fine_chunks=manager.chunks.used
    )
    swapped = [s.swapped for s in manager.sequences.values() if s.swapped is not None]
    return {
        "memory_saved_mb": (uncompressed - allocated) / 1e6,
        "avg_compression_ratio": uncompressed / allocated if allocated else 1.0,
        "uncompressed_bytes": uncompressed,
        "allocated_bytes": allocated,
        "pool_bytes": manager.sizes.total_bytes(layout),
        "host_bytes": manager.host.used_bytes + sum(s.nbytes for s in swapped),
        "effective_bits": None if math.isnan(effective) else effective,
        "cache_bits": 8 * allocated / (len(pages) * layout.layers * layout.values_per_page)
        if pages
        else None,
        "tokens": sum(_tokens(manager, p) for p in pages),
        "sequences": len(manager.sequences) - len(swapped),
        "preempted_sequences": len(swapped),
        **{f"pages_level_{i}": sum(_level(p) == i for p in pages) for i in range(3)},
        **dataclasses.asdict(manager.counters),
    }


def _level(page: Page) -> int:
    return 0 if page.pending else page.level


def _tokens(manager: KVCacheManager, page: Page) -> int:
    size = manager.layout.page_size
    longest = max(manager.sequences[owner].length for owner in page.owners)
    return min(size, longest - page.index * size)


def verify(manager: KVCacheManager, cache: PagedCache) -> None:
    """Raises AssertionError with a line for everything that does not add up."""
    wrong: list[str] = []

    def expect(what: str, expected: object, got: object) -> None:
        if expected != got:
            wrong.append(f"{what}: expected {expected}, got {got}")

    pages = list(manager.pages.values())
    for pool, ids in (
        (manager.raw, [p.raw for p in pages]),
        (manager.sealed, [p.sealed for p in pages]),
        (manager.sinks, [p.sink for p in pages]),
        (manager.chunks, [c for p in pages for c in p.chunks]),
        (manager.rows, [s.row for s in manager.sequences.values()]),
    ):
        named = Counter(i for i in ids if i != NONE)
        expect(f"{pool.name} used twice", [], [i for i, n in named.items() if n > 1])
        expect(f"{pool.name} used but free", [], [i for i in named if not pool.is_used(i)])
        expect(f"{pool.name} in use", len(named), pool.used)
    for page in pages:
        owners = {s.id for s in manager.sequences.values() if page in s.pages}
        expect(f"page {page.uid}: owners", owners, page.owners)
    for sequence in manager.sequences.values():
        indices = [p.index for p in sequence.pages]
        expect(f"sequence {sequence.id}: order of pages", sorted(set(indices)), indices)
        pages_needed = -(-sequence.length // manager.layout.page_size)
        expect(f"sequence {sequence.id}: pages past its end", [], [i for i in indices if i >= pages_needed])
    expect("sizes of the pools", manager.sizes, cache.sizes)
    scalar = cache.rejected.nbytes
    live = sum(x.nbytes for x in jax.tree.leaves(cache)) - scalar
    expect("bytes of the pools", manager.sizes.total_bytes(manager.layout), live)
    fine_of, sealed = np.asarray(cache.fine_of), np.asarray(cache.sealed)
    for page in pages:
        if page.sealed != NONE and not page.pending:
            expect(f"page {page.uid}: fine_of", page.chunks, tuple(fine_of[:, page.sealed]))
            expect(f"page {page.uid}: sealed", True, bool(sealed[page.sealed]))
    if wrong:
        raise AssertionError("\n".join(wrong))
