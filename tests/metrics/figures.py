"""Figures as a manager and an engine report them, and a board that holds them."""

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import KVCacheManager
from kvcompress_jax.metrics.board import Board
from kvcompress_jax.paged import PoolSizes

ENGINE = {
    "requests_running": 3,
    "requests_waiting": 2,
    "requests_preempted": 1,
    "finished": {"stop": 4, "error": 1},
    "prompt_tokens": 640,
    "generated_tokens": 250,
    "failed_steps": 1,
    "recomputed_requests": 2,
}


def manager_stats() -> dict:
    """All fields, of a manager that has just begun, and some with something in them."""
    config = CompressionConfig(page_size=16)
    layout = config.layout(layers=2, kv_heads=1, head_dim=8)
    sizes = PoolSizes(raw_pages=4, sealed_pages=8, fine_chunks=16, sink_slots=2)
    manager = KVCacheManager(layout, sizes, config, max_sequences=2)
    return dict(manager.get_compression_stats()) | {
        "memory_saved_mb": 1.5,
        "avg_compression_ratio": 2.5,
        "effective_bits": 6.5,
        "pages_level_0": 1,
        "pages_level_1": 5,
        "pages_level_2": 10,
        "seals": 15,
        "telemetry_samples": 128,
        "telemetry_output_error_mean": 0.01,
        "telemetry_output_error_max": 0.1,
        "telemetry_lse_error_mean": 0.001,
        "host_bytes": 4096,
    }


def board(**changes) -> Board:
    full = Board()
    full.step(0.02, lambda: (manager_stats() | changes, ENGINE))
    return full
