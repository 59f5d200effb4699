"""What the manager reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, cast

from kvcompress_jax.manager.page import NONE, Page
from kvcompress_jax.paged.layout import INDEX_BYTES
from kvcompress_jax.storage.stats import DiskStats

if TYPE_CHECKING:
    from kvcompress_jax.manager.kv_manager import KVCacheManager


class CompressionStats(TypedDict):
    """Figures of the moment, and counts of what happened so far (`Counters`). Bytes are of the
    device unless said otherwise."""

    memory_saved_mb: float  # (uncompressed_bytes - allocated_bytes) / 1e6
    avg_compression_ratio: float  # uncompressed_bytes / allocated_bytes; 1 for an empty cache
    uncompressed_bytes: int  # the same pages as plain keys and values of the model's dtype
    allocated_bytes: int  # in use: pages, chunks, slots, scales, orders, statistics, tables
    pool_bytes: int  # all pools, in use or not
    devices: int  # of the pools; what each of them has counts each time
    device_pool_bytes: int  # all pools of one of these devices
    host_bytes: int  # host memory of fine planes, windows of prefixes, preempted sequences
    effective_bits: float | None  # stored bits per value of the sealed pages, all overheads
    cache_bits: float | None  # the same over all pages in use
    tokens: int  # of all pages; shared ones count once
    sequences: int
    preempted_sequences: int
    pages_level_0: int
    pages_level_1: int
    pages_level_2: int
    pages_level_3: int
    seals: int
    rejected: int
    demotions: int
    promotions: int
    refusals: int
    unrefined: int
    evictions: int
    prefix_hits: int  # sequences that began with a remembered prefix
    prefix_hit_tokens: int
    prefix_evictions: int
    prefixes: int  # remembered now
    pages_retained: int  # that only the prefix cache holds
    pages_merged: int
    windows_dropped: int
    planes_dropped: int  # fine planes that found no room below the device
    forks: int
    preemptions: int
    resumes: int
    disk_budget_bytes: int  # 0: there is no disk tier
    disk_bytes: int  # of page files
    disk_queue_bytes: int  # host memory of planes on their way to the disk, or just read
    disk_pages: int
    disk_pages_written: int
    disk_pages_read: int
    disk_hits: int
    disk_misses: int
    disk_pages_dropped: int  # for lack of room on disk
    disk_pages_refused: int  # not taken: too much waits to be written
    disk_pages_lost: int  # could not be written
    disk_pages_damaged: int  # could not be read back as they were written
    disk_files_skipped: int  # found at the start, and of no use
    disk_errors: int  # of the system
    telemetry_samples: int  # queries of query heads, all layers; 0: nothing was measured
    telemetry_output_error_mean: float | None  # relative error of the attention output
    telemetry_output_error_max: float | None
    telemetry_lse_error_mean: float | None  # error of the log-sum-exp of the logits
    telemetry_shadow_bytes: int  # device memory of the raw copies, part of allocated_bytes


def compression_stats(manager: KVCacheManager) -> CompressionStats:
    """The figures of a manager."""
    layout, device_layout = manager.layout, manager.device_layout
    devices = manager.devices
    pages = [p for p in manager.pages.values() if p.raw != NONE or p.sealed != NONE]
    entries = sum(len(s.pages) for s in manager.sequences.values() if s.swapped is None)
    shadow_bytes = manager.shadows.used * device_layout.uncompressed_page_bytes
    on_device = (
        manager.raw.used * device_layout.raw_page_bytes
        + manager.sealed.used * device_layout.sealed_page_bytes
        + manager.chunks.used * device_layout.fine_chunk_bytes
        + manager.sinks.used * device_layout.sink_slot_bytes
        + entries * 2 * INDEX_BYTES
        + shadow_bytes
        + manager.device_sizes.learned_bytes
    )
    allocated = devices * on_device
    uncompressed = len(pages) * layout.uncompressed_page_bytes
    effective = device_layout.effective_bits(
        sealed_pages=manager.sealed.used, fine_chunks=manager.chunks.used
    )
    swapped = [s.swapped for s in manager.sequences.values() if s.swapped is not None]
    levels = Counter(0 if p.pending else p.level for p in pages)
    cached_values = len(pages) * layout.layers * layout.values_per_page
    counts = manager.counters
    errors = manager.shadows.errors()
    samples = sum(errors.samples)
    disk = manager.host.disk.stats() if manager.host.disk is not None else DiskStats()
    return CompressionStats(
        memory_saved_mb=(uncompressed - allocated) / 1e6,
        avg_compression_ratio=uncompressed / allocated if allocated else 1.0,
        uncompressed_bytes=uncompressed,
        allocated_bytes=allocated,
        pool_bytes=devices * manager.device_sizes.total_bytes(device_layout),
        devices=devices,
        device_pool_bytes=manager.device_sizes.total_bytes(device_layout),
        host_bytes=manager.host.used_bytes
        + manager.prefixes.used_bytes
        + sum(s.nbytes for s in swapped),
        effective_bits=None if math.isnan(effective) else effective,
        cache_bits=8 * allocated / cached_values if pages else None,
        tokens=sum(_tokens(manager, p) for p in pages),
        sequences=len(manager.sequences) - len(swapped),
        preempted_sequences=len(swapped),
        pages_level_0=levels[0],
        pages_level_1=levels[1],
        pages_level_2=levels[2],
        pages_level_3=levels[3],
        seals=counts.seals,
        rejected=counts.rejected,
        demotions=counts.demotions,
        promotions=counts.promotions,
        refusals=counts.refusals,
        unrefined=counts.unrefined,
        evictions=counts.evictions,
        prefix_hits=counts.prefix_hits,
        prefix_hit_tokens=counts.prefix_hit_tokens,
        prefix_evictions=counts.prefix_evictions,
        prefixes=len(manager.prefixes.prefixes),
        pages_retained=sum(not p.owners for p in pages),
        pages_merged=counts.pages_merged,
        windows_dropped=counts.windows_dropped,
        planes_dropped=manager.host.dropped,
        forks=counts.forks,
        preemptions=counts.preemptions,
        resumes=counts.resumes,
        disk_budget_bytes=disk.budget_bytes,
        disk_bytes=disk.used_bytes,
        disk_queue_bytes=disk.queued_bytes + disk.arrived_bytes,
        disk_pages=disk.pages,
        disk_pages_written=disk.written,
        disk_pages_read=disk.read,
        disk_hits=disk.hits,
        disk_misses=disk.misses,
        disk_pages_dropped=disk.dropped,
        disk_pages_refused=disk.refused,
        disk_pages_lost=disk.lost,
        disk_pages_damaged=disk.damaged,
        disk_files_skipped=disk.skipped,
        disk_errors=disk.errors,
        telemetry_samples=samples,
        telemetry_output_error_mean=_mean(errors.output_mean, errors.samples),
        telemetry_output_error_max=max(errors.output_max) if samples else None,
        telemetry_lse_error_mean=_mean(errors.lse_mean, errors.samples),
        telemetry_shadow_bytes=devices * shadow_bytes,
    )


def _sealed_pages(part: CompressionStats) -> int:
    return part["pages_level_1"] + part["pages_level_2"] + part["pages_level_3"]


# What does not add up over caches.
_MEANS = ("telemetry_output_error_mean", "telemetry_lse_error_mean")
_LARGEST = ("telemetry_output_error_max", "device_pool_bytes")


def merge_stats(parts: list[CompressionStats]) -> CompressionStats:
    """The figures of several caches together. Their bits per value are means, weighted by the
    values that they hold; `device_pool_bytes` is the largest."""

    def mean(name: str, weight: Callable[[CompressionStats], float]) -> float | None:
        known = [(part[name], weight(part)) for part in parts if part[name] is not None]  # type: ignore[literal-required]
        total = sum(w for _, w in known)
        return sum(x * w for x, w in known) / total if total else None

    merged: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts if part[name] is not None]  # type: ignore[literal-required]
        if name in _LARGEST:
            merged[name] = max(values, default=None)
        elif name in _MEANS:
            merged[name] = mean(name, lambda part: part["telemetry_samples"])
        elif name == "effective_bits":
            merged[name] = mean(name, _sealed_pages)
        elif name == "cache_bits":
            merged[name] = mean(name, lambda part: part["uncompressed_bytes"])
        else:
            merged[name] = sum(values)
    allocated = merged["allocated_bytes"]
    merged["avg_compression_ratio"] = merged["uncompressed_bytes"] / allocated if allocated else 1.0
    return cast(CompressionStats, merged)


def _mean(means: list[float], samples: list[int]) -> float | None:
    """Over all samples of all layers."""
    if not sum(samples):
        return None
    return sum(m * n for m, n in zip(means, samples, strict=True)) / sum(samples)


def _tokens(manager: KVCacheManager, page: Page) -> int:
    size = manager.layout.page_size
    if not page.owners:
        return size
    longest = max(manager.sequences[owner].length for owner in page.owners)
    return min(size, longest - page.index * size)
