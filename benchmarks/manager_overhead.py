"""What the manager costs the host in a decode step: 256 sequences of 128 pages each.

    .venv/bin/python benchmarks/manager_overhead.py

Times everything that the manager does before a step of a model is on the device (advance,
append_step, table), and what it does while the device computes (look_ahead), with a device that
does nothing, so that what is left is the manager's own work. The lengths of the sequences are
spread over a page: in a step, as many pages are begun and sealed as in a busy server.
"""

import argparse
import json
import statistics
import time
from types import SimpleNamespace

import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import KVCacheManager
from kvcompress_jax.paged import PoolSizes

LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128
CONFIG = CompressionConfig()
CHUNK = 512  # tokens of a prompt in a step


class NoDevice:
    """Every seal succeeds, at once."""

    def __init__(self, sealed_pages):
        self.all_sealed = np.ones(sealed_pages, bool)
        self.planes = SimpleNamespace(nbytes=1)

    def apply(self, cache, plan):
        return cache, None if plan.seals is None else self.all_sealed[plan.seals.page]

    def sealed(self, cache):
        return self.all_sealed

    def fine_planes(self, cache, chunks):
        return self.planes

    def heat(self, cache):
        return np.random.default_rng(0).exponential(size=len(self.all_sealed)).astype(np.float32)


def filled(sequences: int, pages: int, *, pressure: float, config=CONFIG):
    """A manager with sequences of so many pages, and their ids.

    Args:
      sequences: on the device.
      pages: of each.
      pressure: share of the fine chunks that all pages at level 1 would need, that there are.
      config: of the compression.
    """
    total = sequences * (pages + 8)
    sizes = PoolSizes(
        raw_pages=sequences * 4 + CHUNK // config.page_size,
        sealed_pages=total,
        fine_chunks=int(total * LAYERS * pressure),
        sink_slots=sequences,
    )
    layout = config.layout(layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    device = NoDevice(total)
    manager = KVCacheManager(layout, sizes, config, max_sequences=sequences, device=device)
    ids = []
    for i in range(sequences):
        ids.append(manager.add())
        left = pages * config.page_size + i % config.page_size
        while left:
            step = min(left, CHUNK)
            manager.advance(None)
            manager.append_slots(ids[-1], step)
            left -= step
    return manager, ids


def step(manager, ids):
    """One decode step; seconds of each part."""
    start = time.perf_counter()
    manager.advance(None)
    advanced = time.perf_counter()
    manager.append_step(ids)
    appended = time.perf_counter()
    manager.table(ids)
    ready = time.perf_counter()
    manager.look_ahead(None)
    end = time.perf_counter()
    return advanced - start, appended - advanced, ready - appended, end - ready


def measure(sequences: int, pages: int, steps: int, *, pressure: float) -> dict[str, float]:
    """Microseconds a step, and what was done in it."""
    manager, ids = filled(sequences, pages - 2 - steps // CONFIG.page_size, pressure=pressure)
    for _ in range(10):
        step(manager, ids)
    before = manager.counters.seals, manager.counters.demotions
    times = np.array([step(manager, ids) for _ in range(steps)]) * 1e6
    before_step, total = times[:, :3].sum(axis=1), times.sum(axis=1)
    parts = [statistics.median(x) for x in times.T]
    return {
        "advance": parts[0],
        "append_step": parts[1],
        "table": parts[2],
        "before the step": statistics.median(before_step),
        "before the step, p99": float(np.quantile(before_step, 0.99)),
        "look_ahead": parts[3],
        "fastest": float(total.min()),
        "median": statistics.median(total),
        "p99": float(np.quantile(total, 0.99)),
        "seals_a_step": (manager.counters.seals - before[0]) / steps,
        "demotions_a_step": (manager.counters.demotions - before[1]) / steps,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--pages", type=int, default=128, help="of each sequence at the end")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = {
        name: measure(arguments.sequences, arguments.pages, arguments.steps, pressure=pressure)
        for name, pressure in (("room for all", 1.0), ("half of the chunks", 0.5))
    }
    if arguments.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(name + ":", ", ".join(f"{key} {value:.1f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
