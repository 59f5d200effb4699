"""The figures of compression inside vLLM."""

import math
from typing import Literal, TypedDict

import numpy as np

from kvcompress_jax.interop.vllm.blocks import BlockStates
from kvcompress_jax.interop.vllm.step import NONE


class VllmCompressionStats(TypedDict):
    """Figures of the moment, and counts of blocks so far. A block is *resident* while it holds keys
    and values: of a running sequence or for vLLM's prefix cache. Bytes are of all layers of all
    workers."""

    memory_saved_mb: float  # (uncompressed_bytes - allocated_bytes) / 1e6
    avg_compression_ratio: float  # uncompressed_bytes / allocated_bytes; 1 for an empty cache
    uncompressed_bytes: int  # the resident blocks as vLLM would store them
    allocated_bytes: int  # what they take: planes, scales, orders, raw pages with statistics
    pool_bytes: int  # all memory that vLLM gave, in use or not
    host_bytes: int  # host memory of kept fine planes
    effective_bits: float | None  # stored bits per value of sealed blocks, all overheads
    capacity_tokens: int  # that vLLM can hand out
    uncompressed_capacity_tokens: int  # in the same memory without compression
    tokens: int  # resident
    floor_layers: int  # that are at level 1 in all sealed blocks, whose level is the others'
    blocks_level_0: int
    blocks_level_1: int
    blocks_level_2: int
    blocks_level_3: int  # in a calibrated code, whose pages have no other level
    raw_pages: int  # capacity
    raw_pages_free: int
    seals: int
    early_seals: int
    unrefined: int
    demotions: int
    promotions: int
    refusals: int
    without_sink: int
    reused: int
    abandoned: int
    damaged: int
    offload_stores: int
    offload_loads: int


def compression_stats(
    states: BlockStates, *, damaged: int, moved: tuple[int, int] = (0, 0)
) -> VllmCompressionStats:
    """The figures of one worker.

    Args:
      states: of its blocks.
      damaged: sealed blocks that held a value that was not finite.
      moved: pages stored to the host and loaded from there.
    """
    carve, layers, floors = states.carve, states.layers, states.floors
    layout = carve.layout
    raw = int(np.count_nonzero(states.raw_of != NONE))
    sealed = int(np.count_nonzero(states.sealed))
    level_1 = int(np.count_nonzero(states.sealed & (states.chunk_of != NONE)))
    chunks = (layers - floors) * states.chunks.used + floors * sealed
    allocated = chunks * layout.fine_chunk_bytes + layers * (
        states.raw.used * layout.raw_page_bytes
        + sealed * layout.sealed_page_bytes
        + states.sinks.used * layout.sink_slot_bytes
    )
    uncompressed = layers * (raw + sealed) * layout.uncompressed_page_bytes
    # A page of each layer: every one of them has an entry in a table here.
    bits = layout.effective_bits(sealed_pages=layers * sealed, fine_chunks=chunks)
    pool = (layers - floors) * carve.buffer_bytes
    if states.carves.floor is not None:
        pool += floors * states.carves.floor.buffer_bytes
    size = layout.page_size
    counts = states.counters
    return VllmCompressionStats(
        memory_saved_mb=(uncompressed - allocated) / 1e6,
        avg_compression_ratio=uncompressed / allocated if allocated else 1.0,
        uncompressed_bytes=uncompressed,
        allocated_bytes=allocated,
        pool_bytes=pool,
        host_bytes=states.kept_bytes,
        effective_bits=None if math.isnan(bits) else bits,
        capacity_tokens=carve.blocks * size,
        uncompressed_capacity_tokens=(
            pool // (layers * layout.uncompressed_page_bytes) * size if layers else 0
        ),
        tokens=int(states.filled.sum()),
        floor_layers=floors,
        blocks_level_0=raw,
        blocks_level_1=level_1,
        blocks_level_2=sealed - level_1 if layout.rows is None else 0,
        blocks_level_3=sealed if layout.rows is not None else 0,
        raw_pages=states.raw.capacity,
        raw_pages_free=states.raw.free,
        seals=counts.seals,
        early_seals=counts.early_seals,
        unrefined=counts.unrefined,
        demotions=counts.demotions,
        promotions=counts.promotions,
        refusals=counts.refusals,
        without_sink=counts.without_sink,
        reused=counts.reused,
        abandoned=counts.abandoned,
        damaged=damaged,
        offload_stores=moved[0],
        offload_loads=moved[1],
    )


SUMMED: tuple[
    Literal["memory_saved_mb", "uncompressed_bytes", "allocated_bytes", "pool_bytes", "host_bytes"],
    ...,
] = ("memory_saved_mb", "uncompressed_bytes", "allocated_bytes", "pool_bytes", "host_bytes")


def merge(workers: list[VllmCompressionStats]) -> VllmCompressionStats:
    """The figures of all workers together: bytes add up; blocks are the same ones in all of them,
    and their counts are the first worker's.

    Raises:
      ValueError: there are none.
    """
    if not workers:
        raise ValueError("workers: expected at least one with compression, got none")
    total = workers[0].copy()
    for name in SUMMED:
        total[name] = sum(w[name] for w in workers)
    allocated = total["allocated_bytes"]
    total["avg_compression_ratio"] = total["uncompressed_bytes"] / allocated if allocated else 1.0
    return total
