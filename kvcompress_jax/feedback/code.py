"""Rounding keys with error feedback: what rounding some channels did to the logits of a typical
query, rounding the next ones undoes.

A query q sees the error e of a key as `q . e`. To the nearest code, the errors of all channels are
independent, and their variances add up. Here they are not: with the second moment of the queries
`H = E[q q']`, the channels are rounded one after the other, each to the code nearest to

    x_i - sum over j < i of  u_ij e_j        H = U' D U,  U unit lower triangular

which leaves `e' H e = sum_i D_i d_i^2` of rounding errors d_i, the least that feedback of earlier
errors can (Frantar et al., "GPTQ", 2022; Chee et al., "QuIP", 2023, who round weights so). Codes,
scales and everything that reads them stay what they are.

Two things make it cheap. H is taken as diagonal plus rank `RANK`, `L + V V'`, so that all earlier
errors of a token are known by `RANK` numbers, `V' e`. And it is the moment that keys see *before*
RoPE, averaged over how far queries are away: turned to the position of a page, L (equal in both
channels of a rotary pair) and the factor stay, and V and what it is answered with turn like keys.
The channels go in blocks of a few rotary pairs, the slowest first: fast pairs have the smallest
errors left to undo others' with.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.codec.planes import decode, encode
from kvcompress_jax.codec.scale import Scale

RANK = 4
PAIRS = 4  # rotary pairs (channels d and d + dim/2) that are rounded at a time, at most


def block_pairs(dim: int) -> int:
    """Rotary pairs of a block, for heads of so many channels."""
    return math.gcd(dim // 2, PAIRS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyFeedback:
    """How errors of keys are fed back, in all layers or, indexed, in one.

    Invariant: `answer[d] = M^-1 carry[d] / l_d` with M the sum of `carry carry' / l` over d's block
    and all later ones, plus 1. Middle axis: channel d, channel d + dim/2.
    """

    carry: jax.Array  # f32[layers, heads, 2, dim/2, RANK]: V before RoPE
    answer: jax.Array  # like carry: what a channel owes per unit of V' e
    frequencies: jax.Array  # f32[layers, dim/2]: angles of RoPE per position


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageFeedback:
    """`KeyFeedback` of one page, turned to its position."""

    carry: jax.Array  # f32[..., heads, 2, dim/2, RANK]
    answer: jax.Array  # like carry


# Where the heads are in a `PageFeedback` of all layers.
HEAD_AXIS = 1


def at_position(feedback: KeyFeedback, first: jax.Array) -> PageFeedback:
    """The feedback for the page whose first token is at position i32[]."""
    angle = jnp.asarray(first).astype(jnp.float32) * feedback.frequencies
    cos, sin = (f(angle)[..., None, :, None] for f in (jnp.cos, jnp.sin))

    def turn(x: jax.Array) -> jax.Array:
        low, high = x[..., 0, :, :], x[..., 1, :, :]
        return jnp.stack([low * cos - high * sin, high * cos + low * sin], axis=-3)

    return PageFeedback(carry=turn(feedback.carry), answer=turn(feedback.answer))


def encode_with_feedback(
    x: jax.Array, scale: Scale, coarse: jax.Array, feedback: PageFeedback
) -> tuple[jax.Array, jax.Array]:
    """Codes of keys, of which some tokens have the base plane alone.

    Args:
      x: bf16, f16 or f32 [heads, tokens, dim].
      scale: [heads, dim], of the tokens.
      coarse: bool[heads, tokens]: tokens that nothing refines. The others are rounded to the
        nearest: a fine code cannot reach a base that is off by more than half a step.
      feedback: [heads, ...].

    Returns:
      base and fine as of `encode`; the fine code of a coarse token means nothing.
    """
    heads, tokens, dim = x.shape
    half, pairs = dim // 2, block_pairs(dim)
    columns = x.astype(jnp.float32).reshape(heads, tokens, 2, half).transpose(0, 2, 3, 1)
    step, zero = (s.reshape(heads, 2, half) for s in (scale.step, scale.zero))

    def body(
        i: jax.Array, carry: tuple[tuple[jax.Array, ...], jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        debts, base, fine = carry  # RANK of [heads, tokens]: V' e of the blocks before
        start = half - (i + 1) * pairs

        def block(a: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, start, pairs, axis=2)

        # Sums of named terms, in one order: a reduction has the order that XLA likes.
        owed = block(feedback.answer)[..., None]  # [heads, 2, pairs, RANK, 1]
        shift = sum(owed[:, :, :, r] * debts[r][:, None, None] for r in range(RANK))
        numbers = block(columns)
        # What overflows is not owed: such keys are rounded to the nearest.
        fed = coarse[:, None, None] & (jnp.abs(shift) < jnp.inf)
        target = jnp.where(fed, numbers - shift, numbers)
        of_block = Scale(step=block(step), zero=block(zero))
        codes, finer = encode(target, of_block, axis=-1)
        error = decode(codes, of_block, axis=-1) - numbers
        v = block(feedback.carry)[..., None]
        debts = tuple(
            debts[r] + sum(v[:, j, p, r] * error[:, j, p] for j in range(2) for p in range(pairs))
            for r in range(RANK)
        )
        put = lambda to, what: lax.dynamic_update_slice_in_dim(to, what, start, axis=2)  # noqa: E731
        return debts, put(base, codes), put(fine, finer)

    nothing = jnp.zeros((heads, 2, half, tokens), jnp.uint8)
    debts = tuple(jnp.zeros((heads, tokens), jnp.float32) for _ in range(RANK))
    _, base, fine = lax.fori_loop(0, half // pairs, body, (debts, nothing, nothing))
    rows = [c.transpose(0, 3, 1, 2).reshape(heads, tokens, dim) for c in (base, fine)]
    return rows[0], rows[1]
