"""Level 3 of the paged cache: the code that `kvcompress calibrate` fitted to the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.calibrated.pages import received_attention, there_and_back
from kvcompress_jax.calibrated.profile import load_profile
from kvcompress_jax.lab.methods.base import Compressed, Context, assemble
from kvcompress_jax.paged.layout import INDEX_BYTES, CacheLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Rows of a calibrated code.

    Attributes:
      profile: file of the code.
      fingerprint: of the model, which the profile must have.
      page_size: tokens of a page; a last page that is not full stays exact.
    """

    profile: str
    fingerprint: str
    page_size: int = 64

    def __call__(self, context: Context, /) -> Compressed:
        """Raises ValueError for contexts that are not whole, with tokens dropped before."""
        if context.gathered:
            raise ValueError("context: expected tokens at positions 0, 1, ..., got a selection")
        decoder = context.decoder
        profile = load_profile(self.profile, decoder, self.fingerprint)
        code = profile.code(jnp.asarray(context.rope_frequencies))
        pages = (context.tokens - context.window) // self.page_size
        past = pages * self.page_size

        @functools.partial(jax.lax.map, xs=jnp.arange(decoder.num_layers, dtype=jnp.int32))
        def coded(layer: jax.Array) -> tuple[jax.Array, jax.Array]:
            q, k, v = (x[layer] for x in (context.q, context.k, context.v))
            received = received_attention(q[:past], k[:past], decoder, layer)
            return there_and_back(
                k[:past],
                v[:past],
                received,
                code.at(layer),
                profile.rows,
                self.page_size,
                context.sinks,
            )

        keys, values = (
            jnp.concatenate([new, old[:, past:]], axis=1)
            for new, old in zip(coded, (context.k, context.v), strict=True)
        )
        layout = CacheLayout(
            layers=decoder.num_layers,
            kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            page_size=self.page_size,
            fine_rows=0,
            sink_tokens=context.sinks,
            rows=profile.rows,
        )
        per_page = 8 * (layout.sealed_page_bytes + 2 * INDEX_BYTES)
        rest = context.tokens - past - context.window
        exact = 2 * context.heads_in_all_layers * context.dim * rest * context.exact_bits
        return assemble(context, keys, values, coded_bits=pages * per_page + exact)
