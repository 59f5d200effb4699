"""What the queries of a model are like, found when they are first needed.

The model reads 2,048 tokens of the language reference that comes with CPython. What matters of its
queries, where their mean lies and along which few directions they spread, hardly depends on what
they ask about: even random tokens do half as well (a divergence of 0.77 of that without feedback,
where text gets 0.63).
"""

import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.feedback import KeyFeedback, fit_feedback
from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.decoder import decode
from kvcompress_jax.models.default_text import default_text
from kvcompress_jax.models.dense import dense_attention
from kvcompress_jax.models.params import DecoderParams
from kvcompress_jax.models.rope import layer_frequencies, turn_back
from kvcompress_jax.models.tokenizer import Tokenizer

SAMPLES = 4  # from all over the text
SAMPLE_TOKENS = 512
CHARACTERS = 8 * SAMPLE_TOKENS  # of a sample; of what is more than 512 tokens, the rest is dropped
LEAST_TOKENS = 128  # a sample of fewer says too little, and so does a model of so few positions
REPEATS = 4  # of random tokens, so that there are queries that find what they look for
STEP_TOKENS = 64  # of a group of keys, for the size of its steps
SKIPPED = 16  # first tokens, which are like no others

_Sums = tuple[jax.Array, jax.Array]
_logger = logging.getLogger(__name__)


def probe_feedback(
    params: DecoderParams, config: DecoderConfig, tokenizer: Tokenizer | None
) -> KeyFeedback:
    """How errors of this model's keys are fed back; the same for the same model and Python.

    Args:
      params: weights.
      config: of the decoder.
      tokenizer: None: random tokens are read instead of text, and a line in the log says so.
    """
    samples = _samples(config, tokenizer)
    found = [jax.device_get(_moments(params, jnp.asarray(s), config=config)) for s in samples]
    moment = np.mean([moment for moment, _ in found], axis=0)
    step = np.sqrt(np.mean([step**2 for _, step in found], axis=0))
    frequencies = np.asarray(layer_frequencies(config))
    return fit_feedback(moment, step, frequencies, windows=config.layer_windows)


def _samples(config: DecoderConfig, tokenizer: Tokenizer | None) -> Sequence[np.ndarray]:
    """i32[tokens] each, all of one length."""
    most = min(SAMPLE_TOKENS, config.max_positions)
    text = None if tokenizer is None else default_text()
    if tokenizer is not None and text is not None:
        starts = [(2 * i + 1) * len(text) // (2 * SAMPLES) for i in range(SAMPLES)]
        read = [tokenizer.encode(text[i : i + CHARACTERS], add_special=True) for i in starts]
        length = min(most, *(len(tokens) for tokens in read))
        if length >= min(LEAST_TOKENS, most):
            return [np.array(tokens[:length], np.int32) for tokens in read]
    _logger.warning(
        "error feedback: no text that this model reads, so that its queries are taken from random"
        " tokens, which does half as well"
    )
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, max(1, most // REPEATS))
    return [np.tile(drawn, REPEATS).astype(np.int32)]


@functools.partial(jax.jit, static_argnames="config")
def _moments(params: DecoderParams, tokens: jax.Array, *, config: DecoderConfig) -> _Sums:
    """f32[layers, kv_heads, dim, dim], mean of q q' before RoPE, and f32[layers, kv_heads, dim/2],
    the root mean square of what 4-bit codes of a rotary pair would have as steps."""
    n = tokens.shape[0]
    heads, dim = config.num_kv_heads, config.head_dim
    position = jnp.arange(n, dtype=jnp.int32)
    frequencies = layer_frequencies(config)

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, window: jax.Array, sums: _Sums
    ) -> tuple[jax.Array, _Sums]:
        out = dense_attention(
            q[None],
            k[None],
            v[None],
            scale=config.query_scale,
            window=window,
            soft_cap=config.soft_cap,
        )[0]
        back = turn_back(q.astype(jnp.float32), frequencies[layer])
        back = back[min(SKIPPED, n // 2) :].reshape(-1, heads, config.num_heads // heads, dim)
        moment = jnp.einsum("nhgd,nhge->hde", back, back, precision=jax.lax.Precision.HIGHEST) / (
            back.shape[0] * back.shape[2]
        )
        group = min(STEP_TOKENS, n)
        keys = k.astype(jnp.float32)[n % group :].reshape(-1, group, heads, 2, dim // 2)
        reach = (jnp.max(keys, axis=1) - jnp.min(keys, axis=1)) / 15
        step = jnp.sqrt(jnp.mean(reach**2, axis=(0, 2)))
        moments, steps = sums
        return out, (moments.at[layer].set(moment), steps.at[layer].set(step))

    shape = (config.num_layers, heads, dim)
    empty = (jnp.zeros((*shape, dim), jnp.float32), jnp.zeros((*shape[:2], dim // 2), jnp.float32))
    return decode(params, config, tokens, position, attention, empty)[1]
