"""Our own code, through the functions that the paged cache runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.codec import reconstruct, refine
from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.feedback import KeyFeedback, at_position
from kvcompress_jax.importance.policies.base import LayerTokens, attention_mass, queries_that_see
from kvcompress_jax.lab.methods.base import Compressed, Context
from kvcompress_jax.paged.layout import INDEX_BYTES
from kvcompress_jax.paged.page_code import (
    PageCode,
    PageFit,
    code_rows,
    fit_page,
    lay_out,
)
from kvcompress_jax.paged.plane_bytes import unpack_fine, unpack_planes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
    """Pages of base and fine planes (design.md), as `kvcompress_jax.paged` seals them after a
    prefill in one step. Bytes are those of the cache's layout. Where tokens were dropped before,
    a page has no position, and keys are rounded to the nearest.

    Attributes:
      config: of the compression; its window and sinks give way to those of the context.
      random_selection: seed of a random choice of the tokens that have 8 bits, in place of their
        importance; None: by importance. What the choice is worth is measured against it.
    """

    config: CompressionConfig
    random_selection: int | None = None

    def __call__(self, context: Context, /) -> Compressed:
        layers = context.k.shape[0]
        refined = self.config.floors(layers)
        if self.config.seal_level == 1:
            refined = frozenset(range(layers))
        rows = np.array([self.config.fine_rows if i in refined else 0 for i in range(layers)])
        return self.planes(context).refined(context, rows, even=self.config.refining_bits == 2)

    def planes(self, context: Context) -> "Planes":
        """Every token with one plane and with both, whatever the configuration's level."""
        page = self.config.page_size
        heads = context.k.shape[2]
        # Unfinished pages, and pages that reach into the window, stay raw.
        pages = (context.tokens - context.window) // page if self.config.compresses else 0
        sealed = pages * page
        exact = jnp.arange(sealed, dtype=jnp.int32) < context.sinks

        def by_page(x: jax.Array) -> jax.Array:
            return x[:sealed].reshape(pages, page, heads, -1).swapaxes(1, 2)

        def fit(layer: LayerTokens) -> PageFit:
            if self.config.tracks_attention:
                mass, seen = attention_mass(layer)[:sealed], queries_that_see(layer)[:sealed, 0]
            else:
                mass, seen = jnp.zeros((sealed, heads)), jnp.zeros((sealed,))
            fit = functools.partial(
                fit_page, rule=self.config.importance, refined=page - 1
            )  # for some of them, so that tokens are ordered
            return jax.vmap(fit)(
                by_page(layer.k),
                by_page(layer.v),
                by_page(mass)[..., 0],
                seen.reshape(pages, page),
                exact.reshape(pages, page),
            )

        fed = self.config.feeds_errors_back and not context.gathered
        feedback = context.feedback if fed else None
        first = jnp.arange(pages, dtype=jnp.int32) * page
        # How tokens are stored: as the base plane alone, with 8 bits, and with 6 if they may be.
        ways = [(page, 4, False), (page, 4, True)]
        if self.config.refining_bits == 2:
            ways.append((page // 2, 2, True))

        def code(
            inputs: tuple[LayerTokens, PageFit, KeyFeedback | None],
        ) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array]:
            layer, fit, feedback = inputs
            keys, values = by_page(layer.k), by_page(layer.v)
            turned = None
            if feedback is not None:
                turned = jax.vmap(functools.partial(at_position, feedback))(first)
            vectors = []
            for rows, bits, refines in ways:
                stored = jnp.full((pages,), refines)
                coded = jax.vmap(functools.partial(code_rows, fine_rows=rows, fine_bits=bits))(
                    keys, values, fit, turned, stored
                )
                laid_out = jax.vmap(functools.partial(lay_out, fine_rows=rows, fine_bits=bits))(
                    coded, fit
                ).joined()
                vectors.append(_decode(laid_out, bits if refines else 0))
            return vectors, self._rank(laid_out, layer.index)

        if not pages:
            nothing = context.k[:, :0]
            empty = (nothing, nothing)
            return Planes(self, empty, empty, empty, jnp.zeros(nothing.shape[:3], jnp.int32))
        layers = context.per_layer()
        # Two loops: fused, what a token is worth is computed again for every comparison, not always
        # to the same bits, and the order is no permutation.
        fits = jax.lax.map(fit, layers)
        (coarse, fine, *even), rank = jax.lax.map(code, (layers, fits, feedback))
        return Planes(self, coarse, fine, even[0] if even else None, rank)

    def _rank(self, code: PageCode, layer: jax.Array) -> jax.Array:
        """i32[pages * page_size, heads]: so many tokens of the page are refined before this one."""
        pages, heads, page = code.order.shape
        rank = _slot_of_token(code)
        if self.random_selection is not None:
            key = jax.random.fold_in(jax.random.key(self.random_selection), layer)
            draw = jax.random.uniform(key, (pages, heads, page))
            rank = jnp.argsort(jnp.argsort(draw, axis=-1), axis=-1)
        return rank.swapaxes(1, 2).reshape(pages * page, heads)

    def stored_bits(self, context: Context, rows: np.ndarray) -> int:
        """Of the context, with `rows` [layers] of the fine plane in every page of each layer."""
        layers, tokens, heads, dim = context.k.shape
        layout = self.config.layout(
            layers=layers, kv_heads=heads, head_dim=dim, dtype=context.kv_dtype
        )
        layout = dataclasses.replace(layout, sink_tokens=context.sinks)
        page = self.config.page_size
        pages = (tokens - context.window) // page if self.config.compresses else 0
        plain = dataclasses.replace(layout, fine_bits=4)  # a row has its bytes, whatever is in it
        chunks = [dataclasses.replace(plain, fine_rows=int(n)).fine_chunk_bytes for n in rows]
        stored = -(-tokens // page) * 2 * INDEX_BYTES  # the sequence's table
        stored += pages * (layout.sealed_page_bytes + sum(chunks))
        stored += layout.sink_slot_bytes if pages else 0
        stored += (tokens - pages * page) * layout.raw_page_bytes // page
        return 8 * stored


def _slot_of_token(code: PageCode) -> jax.Array:
    return jnp.argsort(code.order.astype(jnp.int32), axis=-1)


def _decode(code: PageCode, fine_bits: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [pages * page_size, heads, dim] in token order, refined by so many bits."""
    pages, heads, page = code.order.shape
    dim = code.key_scale.step.shape[-1]
    slot = _slot_of_token(code)[..., None]
    position = [x.astype(jnp.float32) for x in unpack_planes(code.base, dim)]
    if fine_bits:
        detail = unpack_fine(code.fine, dim, fine_bits)
        position = [x + refine(y) for x, y in zip(position, detail, strict=True)]
    keys = reconstruct(position[0], code.key_scale, axis=-2)
    values = reconstruct(position[1], code.value_scale, axis=-1)

    def by_token(x: jax.Array) -> jax.Array:
        x = jnp.take_along_axis(x, slot, axis=-2)
        return x.swapaxes(1, 2).reshape(pages * page, heads, -1)

    return by_token(keys), by_token(values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planes:
    """The sealed tokens of a context, with 4, 6 and 8 bits, so that any mixture is a selection.

    `rank` says how many tokens of the same page and head are refined before a token.
    """

    method: Embedded = dataclasses.field(metadata={"static": True})
    coarse: tuple[jax.Array, jax.Array]  # f32[layers, sealed, heads, dim], keys and values
    fine: tuple[jax.Array, jax.Array]  # like coarse
    even: tuple[jax.Array, jax.Array] | None  # like coarse; None: no token is refined by 2 bits
    rank: jax.Array  # i32[layers, sealed, heads]

    def refined(self, context: Context, rows: np.ndarray, *, even: bool = False) -> Compressed:
        """The context with the first tokens of every page refined.

        Args:
          context: that the planes are of.
          rows: int[layers], of the fine plane of a page and head.
          even: tokens are refined by 2 bits, two to a row.
        """
        sealed = self.rank.shape[1]
        of_layer = jnp.asarray(rows, jnp.int32)[:, None, None]
        chosen = self.rank < (2 * of_layer if even else of_layer)
        refined = self.fine
        if even:
            assert self.even is not None
            refined = self.even
        first = jnp.arange(context.tokens, dtype=jnp.int32) < context.sinks

        def mixed(whole: jax.Array, coarse: jax.Array, fine: jax.Array) -> jax.Array:
            coded = jnp.where(chosen[..., None], fine, coarse)
            coded = jnp.concatenate([coded, whole[:, sealed:]], axis=1)
            return jnp.where(first[None, :, None, None], whole, coded)

        return Compressed(
            keys=mixed(context.k, self.coarse[0], refined[0]),
            values=mixed(context.v, self.coarse[1], refined[1]),
            keep=None,
            stored_bits=self.method.stored_bits(context, rows),
        )
