"""A model with outlier key channels, made from one without: its outputs stay the same.

Models with QKV biases have a few key channels that are some ten times larger than the others. They
are what per-token codes and rotations break on. Scaling a channel of the keys up and the same
channel of the queries down leaves every logit as it is, and gives such a model at any size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.models.load import Model


def with_outlier_keys(
    model: Model, *, pairs: int = 2, smallest: float = 10.0, largest: float = 100.0, seed: int = 0
) -> Model:
    """Scales some pairs of key channels up and those of the queries down.

    RoPE turns channels d and d + dim / 2 into each other, so both get the same factor.

    Args:
      model: any.
      pairs: of channels per layer and KV head; with norms of queries and keys the heads of a layer
        share them, as they share the norms' weights.
      smallest, largest: of the factors, drawn evenly in their logarithm.
      seed: of channels and factors.

    Raises:
      ValueError: more pairs than there are, or factors that are not positive and in order.
    """
    config = model.config
    half = config.head_dim // 2
    if not 1 <= pairs <= half:
        raise ValueError(f"pairs: expected 1 to {half}, got {pairs}")
    if not 0 < smallest <= largest:
        raise ValueError(
            f"smallest and largest: expected 0 < smallest <= largest, got {smallest} and {largest}"
        )
    rng = np.random.default_rng(seed)
    heads = 1 if config.qk_norm else config.num_kv_heads
    factors = np.ones((config.num_layers, heads, half), np.float32)
    for row in factors.reshape(-1, half):
        chosen = rng.choice(half, pairs, replace=False)
        row[chosen] = np.exp(rng.uniform(np.log(smallest), np.log(largest), pairs))
    factors = np.concatenate([factors, factors], axis=-1)  # [layers, heads, dim]
    layers = model.params.layers
    changed: dict[str, Any]
    if config.qk_norm:  # the norms would undo a scaled projection
        changed = {
            "key_norm": _scaled(layers.key_norm, factors[:, 0]),
            "query_norm": _scaled(layers.query_norm, 1 / factors[:, 0]),
        }
    else:
        group = config.num_heads // config.num_kv_heads
        for_keys = factors.reshape(config.num_layers, -1)
        for_queries = 1 / np.repeat(factors, group, axis=1).reshape(config.num_layers, -1)
        changed = {
            "key": _scaled(layers.key, for_keys[:, None]),
            "query": _scaled(layers.query, for_queries[:, None]),
            "key_bias": _scaled(layers.key_bias, for_keys),
            "query_bias": _scaled(layers.query_bias, for_queries),
        }
    params = dataclasses.replace(model.params, layers=dataclasses.replace(layers, **changed))
    drawn = f"outliers-{pairs}-{smallest:g}-{largest:g}-{seed}"
    return dataclasses.replace(
        model,
        params=params,
        name=f"{model.name}, outlier keys",
        fingerprint=f"{model.fingerprint}-{drawn}",
    )


def _scaled(weight: jax.Array | None, factors: np.ndarray) -> jax.Array | None:
    if weight is None:
        return None
    return weight * jnp.broadcast_to(jnp.asarray(factors, weight.dtype), weight.shape)
