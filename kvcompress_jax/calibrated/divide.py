"""How many bits for keys and how many for values: measured, on the model's predictions.

Neither first-order costs nor the error of the attention output compare the two well: both say that
values deserve more than they do by KL (at 2.5 bits for SmolLM2 by a factor of three to six).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvcompress_jax.calibrated.code import CalibratedCode
from kvcompress_jax.calibrated.fit import WIDTHS
from kvcompress_jax.calibrated.pages import attend_plainly, received_attention, there_and_back
from kvcompress_jax.calibrated.row import RowLayout
from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.decoder import decode, logits
from kvcompress_jax.models.dense import AttentionInputs
from kvcompress_jax.models.params import DecoderParams
from kvcompress_jax.paged.layout import CacheLayout

VALUE_BITS = (2, 3, 4, 5, 6, 7, 8)


def candidates(
    config: DecoderConfig, *, bits: float, page_size: int, sink_tokens: int
) -> list[RowLayout]:
    """For every width of values, as many bits for keys as are left.

    Args:
      config: of the decoder.
      bits: stored bits per value of sealed pages, all overheads counted.
      page_size: of the cache.
      sink_tokens: of the cache.

    Returns:
      What does not exceed `bits`; may be empty.
    """
    found = []
    for value_bits in VALUE_BITS:
        key_bytes = config.head_dim * WIDTHS[-1] // 8  # more would stay empty
        while key_bytes:
            rows = RowLayout(key_bytes=key_bytes, value_bits=value_bits)
            layout = CacheLayout(
                layers=config.num_layers,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                page_size=page_size,
                fine_rows=0,
                sink_tokens=sink_tokens,
                rows=rows,
            )
            if layout.effective_bits(sealed_pages=1, fine_chunks=0) <= bits:
                found.append(rows)
                break
            key_bytes -= 1
    return found


@functools.partial(jax.jit, static_argnames=("rows", "config", "page_size", "sink_tokens"))
def trial(
    params: DecoderParams,
    tokens: jax.Array,
    seen: AttentionInputs,
    code: CalibratedCode,
    *,
    rows: RowLayout,
    config: DecoderConfig,
    page_size: int,
    sink_tokens: int,
) -> jax.Array:
    """Mean divergence of the model's predictions when the pages of a text are coded.

    The first three quarters of the text are coded, the rest is read with them as its past.

    Args:
      params: of the decoder.
      tokens: i32[tokens], a sample.
      seen: what the attention got for it, batch of 1.
      code: of all layers.
      rows: of the code.
      config: of the decoder.
      page_size: of the cache.
      sink_tokens: first tokens, which are exact.

    Returns:
      f32[], nats.
    """
    past = tokens.shape[0] * 3 // 4 // page_size * page_size

    def coded(layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, k, v = (x[layer, 0].astype(jnp.float32) for x in (seen.q, seen.k, seen.v))
        received = received_attention(q[:past], k[:past], config, layer)
        return there_and_back(
            k[:past], v[:past], received, code.at(layer), rows, page_size, sink_tokens
        )

    def plain(layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys, values = (x[layer, 0, :past].astype(jnp.float32) for x in (seen.k, seen.v))
        return keys, values

    read = functools.partial(read_on, params, config, tokens, past)
    return predicted_divergence(read(plain), read(coded))


def read_on(
    params: DecoderParams,
    config: DecoderConfig,
    tokens: jax.Array,
    past: int,
    past_of: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """What a model predicts for the rest of a text whose beginning it has from somewhere else.

    Args:
      params, config: of the decoder.
      tokens: i32[tokens].
      past: tokens that are not read.
      past_of: their keys and values f32[past, heads, dim], of a layer i32[].

    Returns:
      f32[tokens - past, vocabulary], logarithms of probabilities.
    """
    position = jnp.arange(past, tokens.shape[0], dtype=jnp.int32)

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, window: jax.Array, _: None
    ) -> tuple[jax.Array, None]:
        keys, values = (
            jnp.concatenate([old, new.astype(jnp.float32)])
            for old, new in zip(past_of(layer), (k, v), strict=True)
        )
        return attend_plainly(q, keys, values, position, window, config)[0], None

    hidden, _ = decode(params, config, tokens[past:], position, attention, None)
    return jax.nn.log_softmax(logits(params, config, hidden))


def predicted_divergence(reference: jax.Array, other: jax.Array) -> jax.Array:
    """Mean of KL(reference, other) over f32[tokens, vocabulary], in nats; exact for small ones."""
    d = other - reference
    return jnp.mean(jnp.sum(jnp.exp(reference) * (jnp.expm1(d) - d), axis=-1))
