"""A continuation on a compressed context: one compiled program for every method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.lab.methods.base import Compressed, Context
from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.decoder import decode, logits
from kvcompress_jax.models.dense import capture_forward
from kvcompress_jax.models.load import Model
from kvcompress_jax.models.params import DecoderParams

MASKED = -1e30

_matmul = functools.partial(
    jnp.matmul, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def capture(
    model: Model, tokens: list[int], *, sinks: int = 4, window: int = 0, kv_dtype: str = "bfloat16"
) -> Context:
    """Runs the uncompressed model over a text and keeps what its attention got.

    Args:
      model: weights and their configuration.
      tokens: of the text.
      sinks: first tokens that stay exact in every method.
      window: newest tokens that stay exact in every method.
      kv_dtype: of an uncompressed cache; keys and values are rounded to it.

    Raises:
      ValueError: sinks or window are negative, or more than the text.
    """
    if sinks < 0 or window < 0 or sinks + window >= len(tokens):
        raise ValueError(
            f"sinks and window: expected none negative and less than {len(tokens)} tokens together,"
            f" got {sinks} and {window}"
        )
    _, seen = capture_forward(model.params, model.config, jnp.asarray([tokens], jnp.int32))
    layers, _, count, heads, _ = seen.k.shape
    positions = jnp.arange(count, dtype=jnp.int32)[None, :, None]
    return Context(
        q=seen.q[:, 0].astype(jnp.float32),
        k=seen.k[:, 0].astype(kv_dtype).astype(jnp.float32),
        v=seen.v[:, 0].astype(kv_dtype).astype(jnp.float32),
        positions=jnp.broadcast_to(positions, (layers, count, heads)),
        decoder=model.config,
        sinks=sinks,
        window=window,
        kv_dtype=kv_dtype,
        feedback=model.key_feedback,
    )


def replay(
    params: DecoderParams,
    compressed: Compressed,
    tokens: jax.Array,
    *,
    config: DecoderConfig,
    kv_dtype: str,
) -> jax.Array:
    """Teacher-forces continuations of a compressed context.

    Each row attends to the context as the method left it and to its own tokens, whose keys and
    values are raw.

    Args:
      params: weights.
      compressed: the context.
      tokens: i32[rows, n]; every row continues the context on its own.
      config: of the decoder.
      kv_dtype: that the rows' keys and values are rounded to.

    Returns:
      f32[rows, n, vocab_size].
    """
    # How much was stored does not matter here, and would be compiled in.
    found = dataclasses.replace(compressed, stored_bits=0)
    return _replay(params, found, tokens, config=config, kv_dtype=kv_dtype)


@functools.partial(jax.jit, static_argnames=("config", "kv_dtype"))
def _replay(
    params: DecoderParams,
    compressed: Compressed,
    tokens: jax.Array,
    *,
    config: DecoderConfig,
    kv_dtype: str,
) -> jax.Array:
    rows, n = tokens.shape
    context = compressed.keys.shape[1]
    kv_heads, dim = config.num_kv_heads, config.head_dim
    group = config.num_heads // kv_heads
    position = context + jnp.arange(n, dtype=jnp.int32)

    def visible(query: jax.Array, key: jax.Array, window: jax.Array) -> jax.Array:
        distance = query[:, None] - key[None, :]
        return (distance >= 0) & ((window == 0) | (distance < window))

    def scores(q: jax.Array, keys: jax.Array) -> jax.Array:
        """[..., n * group, dim] and [..., tokens, dim] to [..., n, group, tokens]."""
        out = _matmul(q, keys.swapaxes(-1, -2)) * config.query_scale
        if config.soft_cap is not None:
            out = config.soft_cap * jnp.tanh(out / config.soft_cap)
        return out

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, window: jax.Array, state: None
    ) -> tuple[jax.Array, None]:
        q = q.astype(jnp.float32).reshape(rows, n, kv_heads, group, dim)
        q = q.transpose(2, 0, 1, 3, 4)  # [kv_heads, rows, n, group, dim]
        k, v = (
            x.astype(kv_dtype)
            .astype(jnp.float32)
            .reshape(rows, n, kv_heads, dim)
            .transpose(2, 0, 1, 3)  # [kv_heads, rows, n, dim]
            for x in (k, v)
        )
        keys, values = (
            x[layer].swapaxes(0, 1) for x in (compressed.keys, compressed.values)
        )  # [kv_heads, context, dim]
        past = scores(q.reshape(kv_heads, -1, dim), keys).reshape(kv_heads, rows, n, group, context)
        seen = visible(position, jnp.arange(context, dtype=jnp.int32), window)
        seen = jnp.broadcast_to(seen[None], (kv_heads, n, context))
        if compressed.keep is not None:
            seen = seen & compressed.keep[layer][:, None, :]
        past = jnp.where(seen[:, None, :, None], past, MASKED)
        own = scores(q.reshape(kv_heads, rows, -1, dim), k).reshape(kv_heads, rows, n, group, n)
        own = jnp.where(visible(position, position, window)[None, None, :, None], own, MASKED)
        top = jnp.maximum(jnp.max(past, axis=-1), jnp.max(own, axis=-1))[..., None]
        past, own = jnp.exp(past - top), jnp.exp(own - top)
        total = jnp.sum(past, axis=-1) + jnp.sum(own, axis=-1)
        out = _matmul(past.reshape(kv_heads, -1, context), values).reshape(q.shape)
        out = out + _matmul(own.reshape(kv_heads, rows, -1, n), v).reshape(q.shape)
        out = (out / total[..., None]).transpose(1, 2, 0, 3, 4)
        return out.reshape(rows * n, config.num_heads, dim), None

    positions = jnp.broadcast_to(position[None, :], (rows, n)).reshape(-1)
    hidden, _ = decode(params, config, tokens.reshape(-1), positions, attention, None)
    return logits(params, config, hidden.reshape(rows, n, -1))
