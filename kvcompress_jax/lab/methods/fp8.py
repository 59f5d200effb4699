"""Eight-bit floats: the everyday baseline."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.lab.methods.base import Compressed, Context, assemble

LARGEST = 448.0  # of e4m3fn
SCALE_BITS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8:
    """Keys and values as float8 e4m3fn with one float32 scale per layer and head, taken from the
    largest value of the context (Micikevicius et al., "FP8 Formats for Deep Learning", 2022,
    arXiv:2209.05433; as vLLM's `fp8` cache with calibrated scales, which has one per layer)."""

    def __call__(self, context: Context, /) -> Compressed:
        coded = jnp.asarray(~context.exact)[None, :, None, None]

        def round_trip(x: jax.Array) -> jax.Array:
            top = jnp.max(jnp.abs(x), axis=(1, 3), keepdims=True, where=coded, initial=0.0)
            scale = jnp.where(top > 0, top / LARGEST, 1.0)
            # Clipped: the format has no infinity, and what is out of range becomes NaN.
            scaled = jnp.clip(x / scale, -LARGEST, LARGEST)
            return scaled.astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale

        numbers = context.coded_tokens * context.dim
        return assemble(
            context,
            round_trip(context.k),
            round_trip(context.v),
            coded_bits=2 * context.heads_in_all_layers * (8 * numbers + SCALE_BITS),
        )
