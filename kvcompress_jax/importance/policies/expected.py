"""Expected attention: what queries to come will look at."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.importance.policies.base import LayerTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention:
    """Attention expected of the next queries, times the size of the value (Devoto et al.,
    "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution", 2025, arXiv:2510.00636).

    Queries before RoPE are taken as Gaussian, with mean and covariance of the context's. Turned to
    the average of the next positions, they give each key the expectation
    `exp(mean . key + key . covariance . key / 2)`, logits scaled.

    Attributes:
      future_tokens: positions that are averaged; 512 in the authors' code.
      skipped_tokens: first queries and keys that do not count, as sinks are unlike all others;
        these tokens get the best score.
      floor: added to the attention before the value counts; 0 in the authors' code.
    """

    future_tokens: int = 512
    skipped_tokens: int = 4
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.future_tokens < 1 or self.skipped_tokens < 0 or not self.floor >= 0:
            raise ValueError(
                f"need future_tokens >= 1, skipped_tokens >= 0 and floor >= 0, got {self}"
            )

    def scores(self, layer: LayerTokens, /) -> jax.Array:
        """f32[tokens, kv_heads]."""
        queries, heads, dim = layer.q.shape
        kv_heads = layer.k.shape[1]
        at = jnp.arange(queries, dtype=jnp.float32)
        q = _turn(layer.q, -at[:, None] * layer.frequencies[None, :])[self.skipped_tokens :]
        mean = jnp.mean(q, axis=0)  # [heads, dim]
        off = q - mean[None]
        covariance = jnp.einsum("qhd,qhe->hde", off, off) / off.shape[0]
        # The mean rotation of the next positions: a matrix of cosines and sines.
        later = queries + jnp.arange(self.future_tokens, dtype=jnp.float32)
        angles = later[:, None] * layer.frequencies[None, :]
        cos, sin = jnp.mean(jnp.cos(angles), axis=0), jnp.mean(jnp.sin(angles), axis=0)
        rotation = jnp.block([[jnp.diag(cos), -jnp.diag(sin)], [jnp.diag(sin), jnp.diag(cos)]])
        mean = jnp.einsum("de,he->hd", rotation, mean) * layer.scale
        covariance = jnp.einsum("de,hef,gf->hdg", rotation, covariance, rotation) * layer.scale**2
        group = heads // kv_heads
        mean = mean.reshape(kv_heads, group, dim)
        covariance = covariance.reshape(kv_heads, group, dim, dim)
        logits = jnp.einsum("kgd,tkd->kgt", mean, layer.k)
        logits = logits + jnp.einsum("tkd,kgde,tke->kgt", layer.k, covariance, layer.k) / 2
        counted = layer.positions >= self.skipped_tokens  # [tokens, kv_heads]
        attention = jax.nn.softmax(logits, axis=-1, where=counted.T[:, None])
        score = (jnp.mean(attention, axis=1).T + self.floor) * jnp.linalg.norm(layer.v, axis=-1)
        return jnp.where(counted, score, jnp.max(score, axis=0, keepdims=True))

    def recent_tokens(self, budget_tokens: int, /) -> int:
        return 0


def _turn(x: jax.Array, angles: jax.Array) -> jax.Array:
    """f32[tokens, heads, dim], channels d and d + dim / 2 turned by f32[tokens, dim / 2]."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
