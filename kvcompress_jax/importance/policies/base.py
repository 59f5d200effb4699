"""What a policy looks at, and the interface that all policies share."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerTokens:
    """The tokens of one layer after a prefill. Queries stand at positions 0, 1, ...; keys where
    `positions` says, which differ between heads once tokens were dropped."""

    q: jax.Array  # f32[queries, heads, dim], after RoPE, not scaled
    k: jax.Array  # f32[tokens, kv_heads, dim], after RoPE
    v: jax.Array  # f32[tokens, kv_heads, dim]
    positions: jax.Array  # i32[tokens, kv_heads], rising
    window: jax.Array  # i32[], sliding window of the layer; 0: none
    frequencies: jax.Array  # f32[dim / 2], of RoPE
    index: jax.Array  # i32[], of the layer
    scale: float = dataclasses.field(metadata={"static": True})  # of the logits
    soft_cap: float | None = dataclasses.field(metadata={"static": True})


class Policy(Protocol):
    """Which tokens of a cache stay. Scores in, a decision out: `keep_tokens` takes the scores and
    `recent_tokens`, and is the same for all."""

    def scores(self, layer: LayerTokens, /) -> jax.Array:
        """f32[tokens, kv_heads]: more is more important. Pure, of static shapes."""
        ...

    def recent_tokens(self, budget_tokens: int, /) -> int:
        """How many of the budget's tokens are the newest ones, whatever their score."""
        ...


def causal_weights(layer: LayerTokens, *, first_query: int = 0) -> jax.Array:
    """Attention weights of the queries from `first_query` on.

    Returns:
      f32[kv_heads, group, queries - first_query, tokens]; the rows of a query that sees no token
      are zeros.
    """
    _, kv_heads, dim = layer.k.shape
    q = layer.q[first_query:]
    group = q.shape[1] // kv_heads
    rows = q.reshape(q.shape[0], kv_heads, group, dim).transpose(1, 2, 0, 3)
    rows = rows.reshape(kv_heads, -1, dim) * layer.scale
    logits = jnp.matmul(
        rows, layer.k.transpose(1, 2, 0), precision=jax.lax.Precision.HIGHEST
    ).reshape(kv_heads, group, q.shape[0], -1)
    if layer.soft_cap is not None:
        logits = layer.soft_cap * jnp.tanh(logits / layer.soft_cap)
    at = first_query + jnp.arange(q.shape[0], dtype=jnp.int32)
    distance = at[None, :, None] - layer.positions.T[:, None, :]  # [kv_heads, queries, tokens]
    visible = (distance >= 0) & ((layer.window == 0) | (distance < layer.window))
    return jax.nn.softmax(logits, axis=-1, where=visible[:, None])


def attention_mass(layer: LayerTokens) -> jax.Array:
    """f32[tokens, kv_heads]: attention received, summed over queries and the heads of a group."""
    return jnp.sum(causal_weights(layer), axis=(1, 2)).T


def queries_that_see(layer: LayerTokens) -> jax.Array:
    """f32[tokens, kv_heads]: how many of the queries could see each token."""
    left = layer.q.shape[0] - layer.positions
    within = jnp.where(layer.window == 0, left, jnp.minimum(left, layer.window))
    return within.astype(jnp.float32)


def keep_tokens(
    scores: jax.Array, *, budget_tokens: int, sinks: int, recent_tokens: int
) -> jax.Array:
    """Which tokens stay: the first ones, the newest ones, and of the rest those that score best.

    Args:
      scores: f32[tokens, kv_heads], finite.
      budget_tokens: that stay in each head, first and newest ones included.
      sinks: first tokens that stay.
      recent_tokens: newest tokens that stay.

    Returns:
      bool[tokens, kv_heads], exactly `budget_tokens` True per head; of equals, the earlier one.

    Raises:
      ValueError: the budget is more than there is, or less than what must stay.
    """
    tokens = scores.shape[0]
    if not sinks + recent_tokens <= budget_tokens <= tokens:
        raise ValueError(
            f"budget_tokens: expected {sinks + recent_tokens} (sinks and recent tokens) to"
            f" {tokens}, got {budget_tokens}"
        )
    index = jnp.arange(tokens, dtype=jnp.int32)
    always = (index < sinks) | (index >= tokens - recent_tokens)
    ranked = jnp.where(always[:, None], jnp.inf, scores)
    place = jnp.argsort(jnp.argsort(-ranked, axis=0, stable=True), axis=0, stable=True)
    return place < budget_tokens
