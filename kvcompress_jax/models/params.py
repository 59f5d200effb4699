"""The weights of a decoder, as a pytree."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvcompress_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerParams:
    """Weights of all layers, stacked; `decode` scans over the first axis.

    Matrices are stored to be multiplied from the right. Norm weights are float32 and what the
    normalised vector is multiplied by (Gemma's offset of 1 is in them). Which optional fields are
    there follows from the configuration.
    """

    attention_norm: jax.Array  # f32[layers, hidden]
    query: jax.Array  # dtype[layers, hidden, num_heads * dim]
    key: jax.Array  # dtype[layers, hidden, num_kv_heads * dim]
    value: jax.Array  # dtype[layers, hidden, num_kv_heads * dim]
    output: jax.Array  # dtype[layers, num_heads * dim, hidden]
    mlp_norm: jax.Array  # f32[layers, hidden]
    gate: jax.Array  # dtype[layers, hidden, intermediate]
    up: jax.Array  # dtype[layers, hidden, intermediate]
    down: jax.Array  # dtype[layers, intermediate, hidden]
    query_bias: jax.Array | None = None  # dtype[layers, num_heads * dim]
    key_bias: jax.Array | None = None  # dtype[layers, num_kv_heads * dim]
    value_bias: jax.Array | None = None  # dtype[layers, num_kv_heads * dim]
    output_bias: jax.Array | None = None  # dtype[layers, hidden]
    query_norm: jax.Array | None = None  # f32[layers, dim]
    key_norm: jax.Array | None = None  # f32[layers, dim]
    post_attention_norm: jax.Array | None = None  # f32[layers, hidden]
    post_mlp_norm: jax.Array | None = None  # f32[layers, hidden]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderParams:
    """Weights of a decoder."""

    embedding: jax.Array  # dtype[vocab, hidden]
    layers: LayerParams
    final_norm: jax.Array  # f32[hidden]
    unembedding: jax.Array | None = None  # dtype[vocab, hidden]; None: the embedding


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Fields of `LayerParams` that a configuration has, with the shape of one layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "query": (hidden, queries),
        "key": (hidden, keys),
        "value": (hidden, keys),
        "output": (queries, hidden),
        "mlp_norm": (hidden,),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }
    if config.qkv_bias:
        shapes |= {"query_bias": (queries,), "key_bias": (keys,), "value_bias": (keys,)}
    if config.output_bias:
        shapes |= {"output_bias": (hidden,)}
    if config.qk_norm:
        shapes |= {"query_norm": (config.head_dim,), "key_norm": (config.head_dim,)}
    if config.post_norms:
        shapes |= {"post_attention_norm": (hidden,), "post_mlp_norm": (hidden,)}
    return shapes


def model_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Fields of `DecoderParams` outside the layers that a configuration has, with their shapes."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"embedding": table, "final_norm": (config.hidden_size,)}
    return shapes if config.tie_embeddings else shapes | {"unembedding": table}


def field_dtype(field: str, dtype: DTypeLike) -> jnp.dtype:
    """Norm weights are float32 in every model: they are small, and 1 + w loses bits in bfloat16."""
    return jnp.dtype(jnp.float32) if field.endswith("norm") else jnp.dtype(dtype)


def init_params(
    config: DecoderConfig, key: jax.Array, dtype: DTypeLike = jnp.float32
) -> DecoderParams:
    """Random weights that keep the size of activations, for tests and benchmarks.

    Args:
      config: of the decoder.
      key: of the random numbers.
      dtype: of everything but the norms.

    Returns:
      Matrices with variance 1 / inputs, biases with variance 1, norm weights around 1.
    """

    def draw(field: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        x = jax.random.normal(key, shape, jnp.float32)
        if field.endswith("norm"):
            x = 1 + 0.1 * x
        elif field == "embedding" and not config.tie_embeddings:
            x = x / config.embedding_scale
        elif field in ("embedding", "unembedding"):
            x = x / math.sqrt(config.hidden_size)
        elif not field.endswith("bias"):
            x = x / math.sqrt(shape[-2])
        return x.astype(field_dtype(field, dtype))

    layer_keys = jax.random.split(jax.random.fold_in(key, 0), len(layer_shapes(config)))
    layers = {
        field: draw(field, (config.num_layers, *shape), k)
        for k, (field, shape) in zip(layer_keys, layer_shapes(config).items(), strict=True)
    }
    model_keys = jax.random.split(jax.random.fold_in(key, 1), len(model_shapes(config)))
    model = {
        field: draw(field, shape, k)
        for k, (field, shape) in zip(model_keys, model_shapes(config).items(), strict=True)
    }
    return DecoderParams(layers=LayerParams(**layers), **model)
