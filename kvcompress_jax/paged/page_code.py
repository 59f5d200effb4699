"""One page of tokens to its embedded code: scales, order, planes.

In steps, so that the small results of the first (`fit_page`) exist before the second (`code_rows`)
reads them many times over, and those of the second before the third (`lay_out`) moves them: XLA
would else compute them again for every reader.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.codec import (
    Scale,
    decode,
    encode,
    encode_bytes,
    fit_scale,
    pack_high,
    pack_low,
)
from kvcompress_jax.codec.planes import FINE_CELLS
from kvcompress_jax.feedback import PageFeedback, encode_with_feedback
from kvcompress_jax.importance import (
    ImportanceRule,
    LearnedScore,
    TokenStatistics,
    token_error,
)
from kvcompress_jax.importance.combine import order_tokens
from kvcompress_jax.paged.plane_bytes import join_planes, refined_slots, share_fine


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageCode:
    """The code of a page, or of several along leading axes; slots are ordered by importance.

    Invariant: slot j of head h holds token `order[h, j]`, in every field; the fine plane refines
    slots 0 to fine_rows - 1 by 4 bits each, or as many again by 2. Where it refines all tokens or
    none, slot j holds token j.
    """

    base: jax.Array  # u8[..., 2, heads, page_size * dim/2]
    fine: jax.Array  # u8[..., 2, heads, fine_rows * dim/2]
    key_scale: Scale  # [..., heads, dim]
    value_scale: Scale  # [..., heads, page_size]
    order: jax.Array  # u8[..., heads, page_size]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageFit:
    """What coding a page needs to know of it, in token order."""

    key_scale: Scale  # [heads, dim]
    value_scale: Scale  # [heads, page_size]
    worth: jax.Array | None  # f32[heads, page_size], how much each token deserves more bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageRows:
    """The codes of a page before they are laid out, in token order.

    A byte holds a base code in its high nibble and, where the page has a fine plane, a fine code in
    the low one.
    """

    keys: jax.Array  # u8[heads, page_size, dim]
    values: jax.Array  # u8[heads, dim, page_size]
    order: jax.Array  # i32[heads, page_size], the token of each slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageParts:
    """The code of a page, keys and values of a plane for themselves; else as in `PageCode`.

    Joined into one array, every byte would ask which of the two it is of, and where in it: on CPUs
    more work than all the packing.
    """

    base: tuple[jax.Array, jax.Array]  # u8[heads, page_size, dim/2], u8[heads, dim/2, page_size]
    fine: tuple[jax.Array, jax.Array]  # u8[heads, fine_rows, dim/2], u8[heads, dim/2, fine_rows]
    key_scale: Scale
    value_scale: Scale
    order: jax.Array

    def joined(self) -> PageCode:
        return PageCode(
            base=join_planes(*self.base),
            fine=join_planes(*self.fine),
            key_scale=self.key_scale,
            value_scale=self.value_scale,
            order=self.order,
        )


# Where the heads are in the arguments of `fit_page`, with layers before them.
FIT_AXES = (1, 1, 1, None, None, 1)


def encode_page(
    keys: jax.Array,
    values: jax.Array,
    mass: jax.Array,
    seen: jax.Array,
    exact: jax.Array | None,
    learned: LearnedScore | None = None,
    feedback: PageFeedback | None = None,
    *,
    rule: ImportanceRule,
    fine_rows: int,
    fine_bits: int = 4,
) -> PageCode:
    """Codes a full page: keys per channel over the page, values per token.

    Keys have outlier channels, which per-channel scales isolate; values have none (KIVI: Liu et
    al., 2024).

    Args:
      keys: floating [heads, page_size, dim], finite.
      values: like keys.
      mass: f32[heads, page_size], attention that each token received so far.
      seen: f32[page_size], queries that could see it.
      exact: bool[page_size]: first tokens, never all, that are kept exactly elsewhere. They stay in
        the first slots and do not count in the keys' scales, which they would widen most. None:
        there are none.
      learned: trained score of this layer, or None.
      feedback: of this layer, at this page; keys are rounded with it. None: to the nearest.
      rule: orders the tokens.
      fine_rows: rows of the fine plane, of each head.
      fine_bits: of a refined token: 4, one token to a row, or 2, two.

    Returns:
      The code, without leading axes.
    """
    refined = refined_slots(fine_rows, fine_bits)
    fit = fit_page(keys, values, mass, seen, exact, learned, rule=rule, refined=refined)
    if fit.worth is not None:  # nothing else keeps it in memory before `code_page` orders by it
        order = jnp.argsort(-fit.worth, axis=-1, stable=True)
        fit = dataclasses.replace(fit, worth=-jnp.argsort(order, axis=-1).astype(jnp.float32))
    return code_page(keys, values, fit, feedback, fine_rows=fine_rows, fine_bits=fine_bits)


def fit_page(
    keys: jax.Array,
    values: jax.Array,
    mass: jax.Array,
    seen: jax.Array,
    exact: jax.Array | None,
    learned: LearnedScore | None = None,
    *,
    rule: ImportanceRule,
    refined: int,
) -> PageFit:
    """Scales of a page and what its tokens are worth, where `refined` of them, neither all nor
    none, are to be chosen; other arguments as in `encode_page`."""
    counted = None if exact is None else ~exact[None, :, None]
    key_scale = fit_scale(keys, axis=-2, where=counted)
    value_scale = fit_scale(values, axis=-1)
    worth = None
    if 0 < refined < keys.shape[1]:
        keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
        key_error = keys - _coarse(keys, key_scale, axis=-2)
        value_error = values - _coarse(values, value_scale, axis=-1)
        error = token_error(key_error, value_error, values).T  # [page_size, heads]
        statistics = TokenStatistics(
            keys=keys.swapaxes(0, 1),
            values=values.swapaxes(0, 1),
            mass=mass.T,
            seen=seen,
            error=error,
        )
        if exact is None:
            score = rule(statistics, learned=learned)
        else:
            ranked = jnp.broadcast_to(~exact[:, None], error.shape)
            # 0 * inf would be NaN, so the exact ones get both.
            score, error = (
                jnp.where(ranked, x, jnp.inf)
                for x in (rule(statistics, learned=learned, where=ranked), error)
            )
        worth = (score * error).T  # as `rank_tokens` weighs them
    return PageFit(key_scale=key_scale, value_scale=value_scale, worth=worth)


def _coarse(x: jax.Array, scale: Scale, *, axis: int) -> jax.Array:
    """What the base plane alone keeps."""
    return decode(encode(x, scale, axis=axis, cells=1)[0], scale, axis=axis)


def code_page(
    keys: jax.Array,
    values: jax.Array,
    fit: PageFit,
    feedback: PageFeedback | None = None,
    *,
    fine_rows: int,
    fine_bits: int = 4,
) -> PageCode:
    """The code of a page against its fit; arguments as in `encode_page`. `fit.worth` must be in
    memory: see `order_tokens`."""
    rows = code_rows(keys, values, fit, feedback, fine_rows=fine_rows, fine_bits=fine_bits)
    return lay_out(rows, fit, fine_rows=fine_rows, fine_bits=fine_bits).joined()


def code_rows(
    keys: jax.Array,
    values: jax.Array,
    fit: PageFit,
    feedback: PageFeedback | None = None,
    refines: jax.Array | None = None,
    *,
    fine_rows: int,
    fine_bits: int = 4,
) -> PageRows:
    """The first half of `code_page`: all that is computed with numbers. Each token is coded as fine
    as it will be stored.

    Args:
      keys, values, fit, fine_rows, fine_bits: as in `code_page`.
      feedback: keys are rounded with it; None: to the nearest.
      refines: bool[], whether the fine plane will be stored; None: it will.
    """
    if fit.worth is None:  # no token has more bits than another, so that order says nothing
        order = jnp.broadcast_to(jnp.arange(keys.shape[1], dtype=jnp.int32), keys.shape[:2])
    else:
        order = order_tokens(fit.worth.T).T
    slots = refined_slots(fine_rows, fine_bits)
    cells = _cells_of_tokens(order, slots, FINE_CELLS >> (4 - fine_bits), refines)
    if feedback is None:
        key_codes = encode_bytes(keys, fit.key_scale, axis=-2, cells=cells[..., None])
    else:
        key_codes = encode_with_feedback(keys, fit.key_scale, cells, feedback)
    return PageRows(
        keys=key_codes,
        values=encode_bytes(
            values.swapaxes(-1, -2), fit.value_scale, axis=-2, cells=cells[..., None, :]
        ),
        order=order,
    )


def _cells_of_tokens(
    order: jax.Array, slots: int, cells: int, refines: jax.Array | None
) -> jax.Array:
    """f32[heads, page_size], to a step: 1 where no fine code will stand beside the base code."""
    size = order.shape[1]
    stored = jnp.bool_(slots > 0) if refines is None else refines & (slots > 0)
    if 0 < slots < size:
        token = jnp.arange(size, dtype=jnp.int32)
        stored = stored & jnp.any(order[:, :slots, None] == token[None, None, :], axis=1)
    stored = jnp.broadcast_to(stored, order.shape)
    return jnp.where(stored, jnp.float32(cells), jnp.float32(1))


def lay_out(rows: PageRows, fit: PageFit, *, fine_rows: int, fine_bits: int = 4) -> PageParts:
    """The second half of `code_page`: all that moves bytes.

    It is much faster as a program of its own, or behind a condition, than fused with the first:
    every byte would be computed alone, where it is stored, with the arithmetic of its two numbers.
    """
    slots = refined_slots(fine_rows, fine_bits)
    keys, values, value_scale = rows.keys, rows.values, fit.value_scale
    if fit.worth is not None:
        keys = _take(keys, rows.order)
        values = jnp.take_along_axis(values, rows.order[:, None], axis=-1, mode="promise_in_bounds")
        value_scale = Scale(
            step=_take(value_scale.step, rows.order), zero=_take(value_scale.zero, rows.order)
        )
    fine = pack_low(keys[:, :slots]), pack_low(values[:, :, :slots], axis=-2)
    return PageParts(
        base=(pack_high(keys), pack_high(values, axis=-2)),
        fine=share_fine(*fine, fine_bits),
        key_scale=fit.key_scale,
        value_scale=value_scale,
        order=rows.order.astype(jnp.uint8),
    )


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
    """Rows of [heads, page_size, ...] in the order of i32[heads, slots], all of it in range."""
    index = order.reshape(order.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")
