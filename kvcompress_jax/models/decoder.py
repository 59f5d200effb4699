"""The decoder: one implementation of all architectures, agnostic of how attention is done."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.params import DecoderParams, LayerParams
from kvcompress_jax.models.rope import rope_table, rotate

State = TypeVar("State")


class Attention(Protocol[State]):
    """Attention of one layer, with a state that goes from layer to layer (a cache, a record)."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        state: State,
        /,
    ) -> tuple[jax.Array, State]:
        """Attends.

        Args:
          q: [tokens, num_heads, head_dim], normalised and rotated, not scaled. On several devices
            all heads here are those of one.
          k: [tokens, num_kv_heads, head_dim], normalised and rotated.
          v: [tokens, num_kv_heads, head_dim].
          layer: i32[].
          window: i32[], of this layer; 0 for none.
          state: pytree.

        Returns:
          [tokens, num_heads, head_dim] in any float dtype, and the state, of the same structure.
        """
        ...


def decode(
    params: DecoderParams,
    config: DecoderConfig,
    tokens: jax.Array,
    positions: jax.Array,
    attention: Attention[State],
    state: State,
    *,
    gather: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[jax.Array, State]:
    """Runs all layers. Tokens meet each other only in `attention`.

    Args:
      params: weights.
      config: of the decoder.
      tokens: i32[tokens].
      positions: i32[tokens].
      attention: called once in the traced body of a `jax.lax.scan` over layers.
      state: what the first layer's attention gets.
      gather: where every device has some columns of the weights' matrices, and so some heads:
        joins what the devices have along the last axis.

    Returns:
      Normalised hidden states [tokens, hidden_size] in the dtype of the embedding, and the state
      that the last layer's attention returned.
    """
    hidden = params.embedding[tokens]
    if config.embedding_scale != 1:
        hidden = hidden * jnp.asarray(config.embedding_scale, hidden.dtype)
    ropes = [config.rope] if config.local_rope is None else [config.rope, config.local_rope]
    tables = jnp.stack([rope_table(rope, config.head_dim, positions) for rope in ropes])

    def block(
        carry: tuple[jax.Array, State], layer: tuple[jax.Array, jax.Array, LayerParams]
    ) -> tuple[tuple[jax.Array, State], None]:
        hidden, state = carry
        index, window, weights = layer
        table = tables[jnp.minimum(window, len(ropes) - 1)]  # any window: the last rope
        q, k, v = _project_heads(config, weights, hidden, table)
        out, state = attention(q, k, v, index, window, state)
        out = gather(out.reshape(hidden.shape[0], -1).astype(hidden.dtype))
        out = gather(_linear(out, weights.output, weights.output_bias))
        hidden = hidden + _norm(out, weights.post_attention_norm, config.norm_eps)
        out = _mlp(config, weights, _norm(hidden, weights.mlp_norm, config.norm_eps), gather)
        hidden = hidden + _norm(out, weights.post_mlp_norm, config.norm_eps)
        return (hidden, state), None

    indices = jnp.arange(config.num_layers, dtype=jnp.int32)
    windows = jnp.asarray(config.layer_windows, jnp.int32)
    (hidden, state), _ = jax.lax.scan(block, (hidden, state), (indices, windows, params.layers))
    return _norm(hidden, params.final_norm, config.norm_eps), state


def logits(params: DecoderParams, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Scores of the next token.

    Args:
      params: weights.
      config: of the decoder.
      hidden: [..., hidden_size], of `decode`.

    Returns:
      f32[..., vocab_size].
    """
    table = params.embedding if params.unembedding is None else params.unembedding
    out = jnp.einsum(
        "...h,vh->...v",
        hidden,
        table,
        precision=_precision(table),
        preferred_element_type=jnp.float32,
    )
    if config.final_soft_cap is not None:
        out = config.final_soft_cap * jnp.tanh(out / config.final_soft_cap)
    return out


def _project_heads(
    config: DecoderConfig, weights: LayerParams, hidden: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values [tokens, heads, dim], as `Attention` gets them."""
    x = _norm(hidden, weights.attention_norm, config.norm_eps)
    heads = (x.shape[0], -1, config.head_dim)
    q = _linear(x, weights.query, weights.query_bias).reshape(heads)
    k = _linear(x, weights.key, weights.key_bias).reshape(heads)
    v = _linear(x, weights.value, weights.value_bias).reshape(heads)
    q = rotate(_norm(q, weights.query_norm, config.norm_eps), table)
    k = rotate(_norm(k, weights.key_norm, config.norm_eps), table)
    return q, k, v


def _mlp(
    config: DecoderConfig,
    weights: LayerParams,
    x: jax.Array,
    gather: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    gate, up = _linear(x, weights.gate), _linear(x, weights.up)
    gate = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return gather(_linear(gather(gate * up), weights.down))


def _norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """RMS norm over the last axis in float32, in the dtype of `x`; nothing without a weight."""
    if weight is None:
        return x
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * jnp.broadcast_to(weight, y.shape)).astype(x.dtype)


def _linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    out = jnp.matmul(x, weight, precision=_precision(weight))
    return out if bias is None else out + jnp.broadcast_to(bias, out.shape)


def _precision(weight: jax.Array) -> jax.lax.Precision | None:
    """Float32 weights mean float32 products: GPUs would use TF32 for them."""
    return jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
