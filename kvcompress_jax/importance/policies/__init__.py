"""Which tokens of a cache stay: eviction policies, one per file, all of one interface."""

from kvcompress_jax.importance.policies.base import LayerTokens, Policy, keep_tokens
from kvcompress_jax.importance.policies.expected import ExpectedAttention
from kvcompress_jax.importance.policies.h2o import H2O
from kvcompress_jax.importance.policies.keynorm import KeyNorm
from kvcompress_jax.importance.policies.random import Random
from kvcompress_jax.importance.policies.scissorhands import Scissorhands
from kvcompress_jax.importance.policies.snapkv import SnapKV
from kvcompress_jax.importance.policies.specification import Specification
from kvcompress_jax.importance.policies.streaming import Streaming

POLICIES: dict[str, Policy] = {
    "h2o": H2O(),
    "scissorhands": Scissorhands(),
    "snapkv": SnapKV(),
    "streaming": Streaming(),
    "keynorm": KeyNorm(),
    "expected": ExpectedAttention(),
    "random": Random(),
    "specification": Specification(),
}

__all__ = ["POLICIES", "LayerTokens", "Policy", "keep_tokens"]
