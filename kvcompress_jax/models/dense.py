"""Plain causal attention without a cache: the oracle path of the paged one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.decoder import decode, logits
from kvcompress_jax.models.params import DecoderParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """What the attention of every layer got: normalised and rotated, queries not scaled."""

    q: jax.Array  # [layers, batch, tokens, num_heads, head_dim]
    k: jax.Array  # [layers, batch, tokens, num_kv_heads, head_dim]
    v: jax.Array  # [layers, batch, tokens, num_kv_heads, head_dim]


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    window: jax.Array | int = 0,
    soft_cap: float | None = None,
) -> jax.Array:
    """Causal attention that holds all logits at once.

    Args:
      q: [batch, tokens, num_heads, head_dim].
      k: [batch, tokens, num_kv_heads, head_dim].
      v: [batch, tokens, num_kv_heads, head_dim].
      scale: factor of the logits.
      window: i32[] or int: a query sees the keys fewer than `window` positions back, itself
        included; 0 sees all before it.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap).

    Returns:
      Like `q`; logits, softmax and sums in float32.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    matmul = functools.partial(
        jnp.matmul, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    # One large product per KV head: CPUs are several times faster at it than at the einsum.
    rows = q.reshape(batch, tokens, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * tokens, dim)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = matmul(rows, k).reshape(batch, kv_heads, group, tokens, tokens) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    index = jnp.arange(tokens, dtype=jnp.int32)
    distance = index[:, None] - index[None, :]
    visible = (distance >= 0) & ((window == 0) | (distance < window))
    scores = jnp.where(visible[None, None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.reshape(batch, kv_heads, group * tokens, tokens)
    out = matmul(weights, v.astype(jnp.float32)).reshape(batch, kv_heads, group, tokens, dim)
    return (out / total).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


@functools.partial(jax.jit, static_argnames="config")
def dense_forward(params: DecoderParams, config: DecoderConfig, tokens: jax.Array) -> jax.Array:
    """Scores of every next token.

    Args:
      params: weights.
      config: of the decoder.
      tokens: i32[batch, tokens]; each row starts at position 0.

    Returns:
      f32[batch, tokens, vocab_size].
    """

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, window: jax.Array, state: None
    ) -> tuple[jax.Array, None]:
        return _attend(config, tokens, q, k, v, window), None

    hidden, _ = decode(params, config, tokens.reshape(-1), _positions(tokens), attention, None)
    return logits(params, config, hidden.reshape(*tokens.shape, -1))


@functools.partial(jax.jit, static_argnames="config")
def capture_forward(
    params: DecoderParams, config: DecoderConfig, tokens: jax.Array
) -> tuple[jax.Array, AttentionInputs]:
    """`dense_forward` that also returns what the attention of every layer got.

    Args:
      params: weights.
      config: of the decoder.
      tokens: i32[batch, tokens]; each row starts at position 0.

    Returns:
      f32[batch, tokens, vocab_size], and queries, keys and values in the dtype of the weights.
    """

    def attention(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        seen: AttentionInputs,
    ) -> tuple[jax.Array, AttentionInputs]:
        seen = AttentionInputs(
            q=seen.q.at[layer].set(q.reshape(seen.q.shape[1:])),
            k=seen.k.at[layer].set(k.reshape(seen.k.shape[1:])),
            v=seen.v.at[layer].set(v.reshape(seen.v.shape[1:])),
        )
        return _attend(config, tokens, q, k, v, window), seen

    def empty(heads: int) -> jax.Array:
        shape = (config.num_layers, *tokens.shape, heads, config.head_dim)
        return jnp.zeros(shape, params.embedding.dtype)

    seen = AttentionInputs(
        q=empty(config.num_heads), k=empty(config.num_kv_heads), v=empty(config.num_kv_heads)
    )
    hidden, seen = decode(params, config, tokens.reshape(-1), _positions(tokens), attention, seen)
    return logits(params, config, hidden.reshape(*tokens.shape, -1)), seen


def _positions(tokens: jax.Array) -> jax.Array:
    rows = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    return rows.reshape(-1)


def _attend(
    config: DecoderConfig,
    tokens: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: jax.Array,
) -> jax.Array:
    out = dense_attention(
        q.reshape(*tokens.shape, *q.shape[1:]),
        k.reshape(*tokens.shape, *k.shape[1:]),
        v.reshape(*tokens.shape, *v.shape[1:]),
        scale=config.query_scale,
        window=window,
        soft_cap=config.soft_cap,
    )
    return out.reshape(q.shape)
