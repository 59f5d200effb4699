"""Our own code, through the functions that the paged cache runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvcompress_jax.codec import reconstruct, refine, unpack
from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.importance.policies.base import LayerTokens, attention_mass, queries_that_see
from kvcompress_jax.lab.methods.base import Compressed, Context
from kvcompress_jax.paged.layout import INDEX_BYTES
from kvcompress_jax.paged.page_code import PageCode, encode_page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
    """Pages of base and fine planes (design.md), as `kvcompress_jax.paged` seals them after a
    prefill in one step. Bytes are those of the cache's layout.

    Attributes:
      config: of the compression; its window and sinks give way to those of the context.
      random_selection: seed of a random choice of the tokens that have 8 bits, in place of their
        importance; None: by importance. What the choice is worth is measured against it.
    """

    config: CompressionConfig
    random_selection: int | None = None

    def __call__(self, context: Context, /) -> Compressed:
        page = self.config.page_size
        layers, _, heads, _ = context.k.shape
        # Unfinished pages, and pages that reach into the window, stay raw.
        pages = (context.tokens - context.window) // page if self.config.compresses else 0
        sealed = pages * page
        exact = jnp.arange(sealed, dtype=jnp.int32) < context.sinks
        refined = [i % layers for i in self.config.floor_layers]
        if self.config.seal_level == 1:
            refined = list(range(layers))
        rows = jnp.asarray([self.config.fine_rows if i in refined else 0 for i in range(layers)])

        # The tokens are in order of importance only where the fine plane covers some of them, as in
        # the cache; a random choice needs the fine plane of all.
        fine_rows = self.config.fine_rows if self.random_selection is None else page
        encoder = functools.partial(encode_page, rule=self.config.importance, fine_rows=fine_rows)

        def one_layer(inputs: tuple[LayerTokens, jax.Array]) -> tuple[jax.Array, jax.Array]:
            layer, rows = inputs
            if self.config.tracks_attention:
                mass, seen = attention_mass(layer)[:sealed], queries_that_see(layer)[:sealed, 0]
            else:
                mass, seen = jnp.zeros((sealed, heads)), jnp.zeros((sealed,))
            keys, values, mass = (
                x[:sealed].reshape(pages, page, heads, -1).swapaxes(1, 2)
                for x in (layer.k, layer.v, mass)
            )
            code = jax.vmap(encoder)(
                keys, values, mass[..., 0], seen.reshape(pages, page), exact.reshape(pages, page)
            )
            return self._decode(code, rows, layer.index)

        if pages:
            keys, values = jax.lax.map(one_layer, (context.per_layer(), rows))
        else:
            keys = values = context.k[:, :0]
        raw = context.k[:, sealed:], context.v[:, sealed:]
        first = jnp.arange(context.tokens, dtype=jnp.int32) < context.sinks
        keys, values = (
            jnp.where(first[None, :, None, None], whole, jnp.concatenate([coded, rest], axis=1))
            for whole, coded, rest in zip((context.k, context.v), (keys, values), raw, strict=True)
        )
        return Compressed(
            keys=keys,
            values=values,
            keep=None,
            stored_bits=self._stored_bits(context, pages, len(set(refined))),
        )

    def _decode(
        self, code: PageCode, rows: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [pages * page_size, heads, dim] in token order."""
        pages, heads, page = code.order.shape
        slot_of_token = jnp.argsort(code.order.astype(jnp.int32), axis=-1)
        fine = refine(unpack(code.fine))  # [pages, 2, heads, fine_rows, dim]
        if self.random_selection is None:
            slots = jnp.arange(fine.shape[-2], dtype=jnp.int32) < rows
        else:
            key = jax.random.fold_in(jax.random.key(self.random_selection), layer)
            draw = jax.random.uniform(key, (pages, heads, page))
            slots = jnp.argsort(jnp.argsort(draw, axis=-1), axis=-1) < rows
        slots = jnp.broadcast_to(slots, (pages, heads, fine.shape[-2]))[:, None, :, :, None]
        refined, coarse = jnp.split(
            unpack(code.base).astype(jnp.float32), [fine.shape[-2]], axis=-2
        )
        position = jnp.concatenate([refined + jnp.where(slots, fine, 0.0), coarse], axis=-2)
        decoded = (
            reconstruct(position[:, 0], code.key_scale, axis=-2),
            reconstruct(position[:, 1], code.value_scale, axis=-1),
        )
        keys, values = (
            jnp.take_along_axis(x, slot_of_token[..., None], axis=-2)
            .swapaxes(1, 2)
            .reshape(pages * page, heads, -1)
            for x in decoded
        )
        return keys, values

    def _stored_bits(self, context: Context, pages: int, refined_layers: int) -> int:
        layers, tokens, heads, dim = context.k.shape
        layout = self.config.layout(
            layers=layers, kv_heads=heads, head_dim=dim, dtype=context.kv_dtype
        )
        layout = dataclasses.replace(layout, sink_tokens=context.sinks)
        page = self.config.page_size
        stored = -(-tokens // page) * 2 * INDEX_BYTES  # the sequence's table
        stored += pages * layout.sealed_page_bytes + (layout.sink_slot_bytes if pages else 0)
        if self.config.compresses:
            stored += pages * refined_layers * layout.fine_chunk_bytes
        stored += (tokens - pages * page) * layout.raw_page_bytes // page
        return 8 * stored
