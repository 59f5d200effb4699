"""Our re-implementations beside the peers' own code, where that is installed.

    pip install -e '.[test,peers]'

Skipped elsewhere: none of it is a dependency of ours.
"""

import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.importance.policies.base import LayerTokens, keep_tokens
from kvcompress_jax.importance.policies.keynorm import KeyNorm
from kvcompress_jax.importance.policies.snapkv import SnapKV
from kvcompress_jax.importance.policies.streaming import Streaming
from kvcompress_jax.lab.methods.affine import round_per_token

TOKENS, KV_HEADS, GROUP, DIM = 192, 2, 2, 64
SINKS, KEPT = 4, 96


def module(name):
    sys.modules["kernels"] = None  # transformers would find our folder of that name
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as e:
        pytest.skip(f"{name} is not installed: {e}")
    finally:
        del sys.modules["kernels"]


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(TOKENS, KV_HEADS * GROUP, DIM))
    k = rng.normal(size=(TOKENS, KV_HEADS, DIM)) * rng.uniform(0.5, 2, size=(TOKENS, 1, 1))
    v = rng.standard_t(4, size=(TOKENS, KV_HEADS, DIM))
    position = np.broadcast_to(np.arange(TOKENS)[:, None], (TOKENS, KV_HEADS))
    return LayerTokens(
        q=jnp.asarray(q, jnp.float32),
        k=jnp.asarray(k, jnp.float32),
        v=jnp.asarray(v, jnp.float32),
        positions=jnp.asarray(position, jnp.int32),
        window=jnp.int32(0),
        frequencies=jnp.zeros(DIM // 2),
        index=jnp.int32(0),
        scale=DIM**-0.5,
        soft_cap=None,
    )


def theirs(press, layer):
    """Which tokens kvpress keeps: the best by its score. [tokens, kv_heads]"""
    torch = module("torch")
    q, k, v = (np.asarray(x, np.float64) for x in (layer.q, layer.k, layer.v))
    logits = np.einsum("nhgd,thd->hgnt", q.reshape(TOKENS, KV_HEADS, GROUP, DIM), k) * DIM**-0.5
    logits = np.where(np.tri(TOKENS, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = types.SimpleNamespace(num_attention_heads=KV_HEADS * GROUP)
    scores = press.score(
        types.SimpleNamespace(config=heads),
        torch.zeros(1, TOKENS, 1),
        torch.from_numpy(k.transpose(1, 0, 2)[None].copy()),
        torch.from_numpy(v.transpose(1, 0, 2)[None].copy()),
        torch.from_numpy(weights.reshape(1, KV_HEADS * GROUP, TOKENS, TOKENS)),
        {},
    )
    kept = scores[0].topk(KEPT, dim=-1).indices.numpy()
    mask = np.zeros((TOKENS, KV_HEADS), bool)
    for head, tokens in enumerate(kept):
        mask[tokens, head] = True
    return mask


def ours(policy, layer, *, sinks=0):
    return np.asarray(
        keep_tokens(
            policy.scores(layer),
            budget_tokens=KEPT,
            sinks=sinks,
            recent_tokens=policy.recent_tokens(KEPT),
        )
    )


def test_evictions_keep_what_kvpress_keeps(layer):
    kvpress = module("kvpress")
    ratio = 1 - KEPT / TOKENS
    knorm = theirs(kvpress.KnormPress(ratio), layer)
    assert np.array_equal(knorm, ours(KeyNorm(), layer))
    assert not np.array_equal(knorm, ours(KeyNorm(high=True), layer))
    streaming = theirs(kvpress.StreamingLLMPress(ratio, n_sink=SINKS), layer)
    assert np.array_equal(streaming, ours(Streaming(), layer, sinks=SINKS))
    snapkv = theirs(kvpress.SnapKVPress(ratio, window_size=32, kernel_size=5), layer)
    same = snapkv == ours(SnapKV(observed=32, pooled=5), layer)
    # Theirs pools over what is left of the observed tokens, ours over all: the last two differ.
    assert (~same).sum() <= 4
    other = snapkv == ours(SnapKV(observed=32, pooled=1), layer)
    assert (~other).sum() > 10


@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_per_token_codes_are_those_of_transformers(layer, backend, package):
    """transformers' quantised cache, groups of 64: one per token and head."""
    module(package)
    torch, transformers = module("torch"), module("transformers")
    from transformers.cache_utils import QuantizedCache

    cache = QuantizedCache(
        backend, transformers.PretrainedConfig(num_hidden_layers=1), nbits=4, q_group_size=64
    )
    keys, values = (
        np.asarray(x, np.float32).transpose(1, 0, 2)[None].copy() for x in (layer.k, layer.v)
    )
    with torch.inference_mode():
        cache.update(torch.from_numpy(keys), torch.from_numpy(values), 0)
        code = cache.layers[0]
        found = code._dequantize(code._quantized_values).float().numpy()

    def error(rounded):
        return float(np.sqrt(np.mean((np.asarray(rounded) - values) ** 2)))

    same, coarser = (
        error(round_per_token(jnp.asarray(values), bits=bits, group_channels=64)) for bits in (4, 3)
    )
    # hqq moves zero points for a robust error, quanto's scales are float32: not the same bits.
    assert abs(error(found) / same - 1) < 0.1
    assert abs(error(found) / coarser - 1) > 0.3
