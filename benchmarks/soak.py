"""Hours of traffic at a full pool: nothing leaks, every byte is accounted for, no step stalls.

    .venv/bin/python benchmarks/soak.py                  # ten minutes
    .venv/bin/python benchmarks/soak.py --seconds 20

A small random decoder serves chats, documents and agents of three tenants through the engine: with
a prefix cache, host tier, preemptions, cancelled requests, and pools that are too small for all who
want to run. At the end every request is gone, `verify()` must find every byte where it is said to
be, and what is left must be what the prefix cache holds. A step's time counts when no new program
was compiled in it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import OutOfPagesError
from kvcompress_jax.models.config import DecoderConfig, Rope
from kvcompress_jax.models.engine import Engine
from kvcompress_jax.models.load import Model
from kvcompress_jax.models.params import init_params
from kvcompress_jax.models.runner import Runner
from kvcompress_jax.paged import PoolSizes

sys.path.insert(0, str(Path(__file__).parent))
from traffic import TRAFFIC, turns

SHORTER = 16  # traffic is made for pages of 64 tokens and models that take their time
STEP_SECONDS = 0.03  # of simulated time, of a model that serves people
DECODER = DecoderConfig(
    architecture="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    norm_eps=1e-6,
    tie_embeddings=True,
    query_scale=32**-0.5,
    rope=Rope(theta=1e4),
    layer_windows=(0, 0),
    max_positions=4096,
)


def make_engine() -> Engine:
    """Pools that are too small for everybody."""
    model = Model(
        config=DECODER,
        params=init_params(DECODER, jax.random.key(0)),
        tokenizer=None,
        name="soak",
        fingerprint="soak",
    )
    config = CompressionConfig(
        page_size=16, window_tokens=16, host_bytes=1 << 20, prefix_cache_bytes=1 << 22
    )
    sizes = PoolSizes(raw_pages=20, sealed_pages=72, fine_chunks=80, sink_slots=24)
    runner = Runner(
        model,
        config,
        sizes,
        max_sequences=6,
        kv_dtype="float32",
        chunk_tokens=32,
        tenant_shares={"a": 0.34},
    )
    return Engine(runner)


def arrivals(seed: int):
    """Turns of all kinds of users, by step: short ones, one tenant each."""
    coming: dict[int, list] = {}
    for tenant, (name, traffic) in zip("abc", sorted(TRAFFIC.items()), strict=True):
        for when, found in turns(traffic, 20_000, seed=seed).items():
            for turn in found:
                prompt = [token % 97 for token in turn.prompt[::SHORTER]]
                answer = max(1, turn.answer // SHORTER)
                coming.setdefault(when // 8, []).append((tenant, name, prompt[:320], answer))
    return coming


def soak(seconds: float, *, warm_seconds: float, seed: int) -> dict:
    """Serves for so long; what was seen.

    Raises:
      AssertionError: something leaked or does not add up.
    """
    engine = make_engine()
    manager, runner = engine.runner.manager, engine.runner
    random = np.random.default_rng(seed)
    coming = arrivals(seed)
    times, fullest, steps, refused, now, programs = [], 0.0, 0, 0, 0, -1
    live: list = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < warm_seconds + seconds:
        for tenant, _, prompt, answer in coming.pop(now, []):
            if len(engine.waiting) < 40:
                live.append(engine.submit(prompt, max_new_tokens=answer, tenant=tenant))
        now = (now + 1) if coming else 0
        if not coming:
            coming = arrivals(seed := seed + 1)
        if live and random.random() < 0.01:
            engine.cancel(live[int(random.integers(len(live)))])
        started = time.perf_counter()
        try:
            engine.step()
        except OutOfPagesError:
            refused += 1
        elapsed = time.perf_counter() - started
        compiled = compiled_programs()
        if compiled == programs and started - begin > warm_seconds:
            times.append(elapsed)
        programs = compiled
        steps += 1
        live = [r for r in live if r.finish_reason is None]
        fullest = max(fullest, manager.sealed.used / manager.sealed.capacity)
        if steps % 200 == 0:
            manager.verify(runner.cache)
    for request in live:
        engine.cancel(request)
    manager.verify(runner.cache)
    stats = manager.get_compression_stats()
    kept = {page.uid for f in manager.prefixes.prefixes.values() for page in f.pages}
    assert not manager.sequences and set(manager.pages) == kept, "pages of nobody"
    assert manager.raw.used == 0 == manager.rows.used, "raw pages or rows of nobody"
    claimed = manager.sizes.total_bytes(manager.layout)
    held = sum(x.nbytes for x in jax.tree.leaves(runner.cache)) - runner.cache.rejected.nbytes
    assert claimed == held == stats["pool_bytes"], "bytes"
    assert times, "no step without a new program after the warm-up: make it longer"
    quantile = np.quantile(times, [0.5, 0.99])
    return {
        "steps": steps,
        "simulated minutes": steps * STEP_SECONDS / 60,
        "fullest pool of sealed pages": fullest,
        "median step, ms": 1e3 * quantile[0],
        "p99 step, ms": 1e3 * quantile[1],
        "p99 over median": quantile[1] / quantile[0],
        "requests that could never fit": refused,
        "pool bytes": claimed,
        **{
            name: stats[name]
            for name in (
                "seals", "demotions", "promotions", "refusals", "preemptions", "resumes",
                "prefix_hits", "prefix_hit_tokens", "prefix_evictions", "pages_merged",
                "windows_dropped", "planes_dropped",
            )
        },
    }  # fmt: skip


def compiled_programs() -> int:
    """How many programs this process compiled so far."""
    return _compiled[0]


_compiled = [0]


def _count(event: str, duration: float, **_: object) -> None:
    _compiled[0] += event == "/jax/core/compile/backend_compile_duration"


def main() -> None:
    """Soaks and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--warm-seconds", type=float, default=60, help="before that, not timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    jax.monitoring.register_event_duration_secs_listener(_count)
    found = soak(arguments.seconds, warm_seconds=arguments.warm_seconds, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    main()
