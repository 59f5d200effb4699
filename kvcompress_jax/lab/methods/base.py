"""What every method of the bench gets and returns, and how its bits are counted."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.feedback import KeyFeedback
from kvcompress_jax.importance.policies.base import LayerTokens
from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.rope import frequencies

SCALE_BITS = 16  # of every scale, zero point, norm and minimum, unless a method says otherwise
POSITION_BITS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Queries, keys and values of a text, as the attention of every layer got them.

    The first `sinks` and the newest `window` tokens are exact in every method, at the bits of
    `kv_dtype`; only the others are coded.
    """

    q: jax.Array  # f32[layers, queries, heads, dim], after RoPE, not scaled
    k: jax.Array  # f32[layers, tokens, kv_heads, dim], after RoPE, rounded to kv_dtype
    v: jax.Array  # f32[layers, tokens, kv_heads, dim], rounded to kv_dtype
    positions: jax.Array  # i32[layers, tokens, kv_heads]
    decoder: DecoderConfig = dataclasses.field(metadata={"static": True})
    sinks: int = dataclasses.field(metadata={"static": True})
    window: int = dataclasses.field(metadata={"static": True})
    kv_dtype: str = dataclasses.field(metadata={"static": True})
    feedback: KeyFeedback | None = None  # of the model, for methods that feed errors back
    gathered: bool = dataclasses.field(default=False, metadata={"static": True})
    """Tokens were dropped before, so that positions are not 0, 1, ..."""

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

    @property
    def exact(self) -> np.ndarray:
        """bool[tokens]: the tokens that every method keeps exactly."""
        index = np.arange(self.tokens)
        return (index < self.sinks) | (index >= self.tokens - self.window)

    @property
    def coded_tokens(self) -> int:
        """Tokens that are not exact."""
        return int(np.sum(~self.exact))

    @property
    def exact_bits(self) -> int:
        """Of one number of an exact token."""
        return 8 * jnp.dtype(self.kv_dtype).itemsize

    @property
    def heads_in_all_layers(self) -> int:
        """KV heads of all layers together."""
        return self.k.shape[0] * self.k.shape[2]

    @property
    def dim(self) -> int:
        return self.k.shape[3]

    @property
    def rope_frequencies(self) -> np.ndarray:
        """f32[layers, dim / 2]."""
        local = self.decoder.local_rope or self.decoder.rope
        return np.stack(
            [
                frequencies(local if window else self.decoder.rope, self.dim)
                for window in self.decoder.layer_windows
            ]
        )

    def per_layer(self) -> LayerTokens:
        """All layers, stacked, for `jax.lax.map`."""
        return LayerTokens(
            q=self.q,
            k=self.k,
            v=self.v,
            positions=self.positions,
            window=jnp.asarray(self.decoder.layer_windows, jnp.int32),
            frequencies=jnp.asarray(self.rope_frequencies),
            index=jnp.arange(self.k.shape[0], dtype=jnp.int32),
            scale=self.decoder.query_scale,
            soft_cap=self.decoder.soft_cap,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compressed:
    """What attention finds in place of a context.

    `stored_bits` counts everything that would have to be stored for the context: codes, scales,
    zero points, indices, tables, exact tokens. It follows from shapes and settings alone.
    """

    keys: jax.Array  # f32[layers, tokens, kv_heads, dim]
    values: jax.Array  # f32[layers, tokens, kv_heads, dim]
    keep: jax.Array | None  # bool[layers, kv_heads, tokens]; None: all tokens are there
    stored_bits: int = dataclasses.field(metadata={"static": True})


class Method(Protocol):
    """A way to compress. Pure, of static shapes: works under `jax.jit`. Hashable."""

    def __call__(self, context: Context, /) -> Compressed: ...


def assemble(
    context: Context, keys: jax.Array, values: jax.Array, *, coded_bits: int
) -> Compressed:
    """Puts the exact tokens back.

    Args:
      context: that was compressed.
      keys: f32[layers, tokens, kv_heads, dim]; what stands at exact tokens is not read.
      values: like keys.
      coded_bits: of all that is stored for the tokens that are not exact.
    """
    exact = jnp.asarray(context.exact)[None, :, None, None]
    numbers = (
        2 * context.heads_in_all_layers * context.dim * (context.tokens - context.coded_tokens)
    )
    return Compressed(
        keys=jnp.where(exact, context.k, keys),
        values=jnp.where(exact, context.v, values),
        keep=None,
        stored_bits=coded_bits + numbers * context.exact_bits,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uncompressed:
    """Every number in the dtype of the cache."""

    def __call__(self, context: Context, /) -> Compressed:
        numbers = 2 * context.heads_in_all_layers * context.dim * context.coded_tokens
        return assemble(context, context.k, context.v, coded_bits=numbers * context.exact_bits)


UNCOMPRESSED = Uncompressed()


def bits_per_value(compressed: Compressed) -> float:
    """Stored bits per number of the keys and values of the whole context."""
    return compressed.stored_bits / (2 * math.prod(compressed.keys.shape))
