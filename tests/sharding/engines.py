"""A small model that is served by engines on meshes and by replicas."""

import dataclasses
import functools

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.models.engine import Engine
from kvcompress_jax.models.replicas import make_replicas
from kvcompress_jax.models.runner import make_runner
from tests.models.tiny import CONFIGS, random_tokens, tiny_model
from tests.sharding.scene import sharding_of

MODEL = tiny_model(
    dataclasses.replace(
        CONFIGS["llama"],
        num_heads=16,
        num_kv_heads=8,
        head_dim=32,
        query_scale=32**-0.5,
        hidden_size=64,
        num_layers=2,
        layer_windows=(0, 0),
    )
)
CONFIG = CompressionConfig(page_size=16, window_tokens=16, prefix_cache_bytes=1 << 20)
SIZES = {"tokens": 256, "max_sequences": 2, "chunk_tokens": 32, "kv_dtype": "float32"}
PROMPT = random_tokens(MODEL.config, 40, seed=1)
OTHER = random_tokens(MODEL.config, 40, seed=2)
NEW = 4


@functools.cache
def served(shards, split_weights=False):
    """An engine that has answered, and its answer."""
    sharding = sharding_of(shards, split_weights=split_weights)
    engine = Engine(make_runner(MODEL, CONFIG, sharding=sharding, **SIZES))
    request = engine.submit(PROMPT, max_new_tokens=NEW)
    engine.run()
    engine.runner.manager.verify(engine.runner.cache)
    return engine, request.generated


@functools.cache
def replicated():
    """Two replicas that have answered two prompts of three, and the requests."""
    replicas = make_replicas(MODEL, CONFIG, replicas=2, **SIZES)
    requests = [replicas.submit(p, max_new_tokens=NEW) for p in (PROMPT, OTHER, PROMPT)]
    placed = [[r in e.waiting for r in requests] for e in replicas.engines]
    replicas.cancel(requests.pop())
    finished = []
    while not replicas.idle:
        finished += replicas.step()
    assert sorted(map(id, finished)) == sorted(map(id, requests))
    return replicas, requests, placed
