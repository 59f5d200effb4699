"""One page of tokens to its embedded code: scales, order, planes."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.codec import Scale, decode, encode, fit_scale, pack
from kvcompress_jax.importance import (
    ImportanceRule,
    LearnedScore,
    TokenStatistics,
    rank_tokens,
    token_error,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageCode:
    """The code of a page, or of several along leading axes; slots are ordered by importance.

    Invariant: slot j of head h holds token `order[h, j]`, in every field; the fine plane covers
    slots 0 to fine_rows - 1.
    """

    base: jax.Array  # u8[..., 2, heads, page_size, dim/2]
    fine: jax.Array  # u8[..., 2, heads, fine_rows, dim/2]
    key_scale: Scale  # [..., heads, dim]
    value_scale: Scale  # [..., heads, page_size]
    order: jax.Array  # u8[..., heads, page_size]


def encode_page(
    keys: jax.Array,
    values: jax.Array,
    mass: jax.Array,
    seen: jax.Array,
    exact: jax.Array,
    learned: LearnedScore | None = None,
    *,
    rule: ImportanceRule,
    fine_rows: int,
) -> PageCode:
    """Codes a full page: keys per channel over the page, values per token.

    Keys have outlier channels, which per-channel scales isolate; values have none (KIVI: Liu et
    al., 2024).

    Args:
      keys: floating [heads, page_size, dim], finite.
      values: like keys.
      mass: f32[heads, page_size], attention that each token received so far.
      seen: f32[page_size], queries that could see it.
      exact: bool[page_size]: tokens that are kept exactly elsewhere. They take the first slots and
        do not count in the keys' scales, which they would widen most.
      learned: trained score of this layer, or None.
      rule: orders the tokens.
      fine_rows: tokens of each head that the fine plane covers.

    Returns:
      The code, without leading axes.
    """
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    key_scale = fit_scale(keys, axis=-2, where=~exact[None, :, None])
    value_scale = fit_scale(values, axis=-1)
    key_base, key_fine = encode(keys, key_scale, axis=-2)
    value_base, value_fine = encode(values, value_scale, axis=-1)
    key_error = keys - decode(key_base, key_scale, axis=-2)
    value_error = values - decode(value_base, value_scale, axis=-1)
    order = _order(rule, keys, values, key_error, value_error, mass, seen, exact, learned)

    def sort(x: jax.Array) -> jax.Array:  # [heads, page_size, ...]
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)

    return PageCode(
        base=jnp.stack([pack(sort(key_base)), pack(sort(value_base))]),
        fine=jnp.stack(
            [pack(sort(key_fine)[:, :fine_rows]), pack(sort(value_fine)[:, :fine_rows])]
        ),
        key_scale=key_scale,
        value_scale=Scale(step=sort(value_scale.step), zero=sort(value_scale.zero)),
        order=order.astype(jnp.uint8),
    )


def _order(
    rule: ImportanceRule,
    keys: jax.Array,
    values: jax.Array,
    key_error: jax.Array,
    value_error: jax.Array,
    mass: jax.Array,
    seen: jax.Array,
    exact: jax.Array,
    learned: LearnedScore | None,
) -> jax.Array:
    """i32[heads, page_size], the token of each slot: exact ones, then by importance x error."""
    keys, values, key_error, value_error = (
        x.swapaxes(0, 1) for x in (keys, values, key_error, value_error)
    )
    error = token_error(key_error, value_error, values)
    statistics = TokenStatistics(keys=keys, values=values, mass=mass.T, seen=seen, error=error)
    counted = jnp.broadcast_to(~exact[:, None], error.shape)
    score = rule(statistics, learned=learned, where=counted)
    # 0 * inf would be NaN, so the exact ones get both.
    score, error = (jnp.where(counted, x, jnp.inf) for x in (score, error))
    return rank_tokens(score, error).T
