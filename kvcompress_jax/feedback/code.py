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
The channels go in blocks of a few rotary pairs, the slowest first: keys and queries are largest
there, and the other way round about half of the gain is lost (measured on SmolLM2).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.codec.planes import encode_bytes, reconstruct, refined_position
from kvcompress_jax.codec.scale import Scale

RANK = 4
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
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
    x: jax.Array, scale: Scale, cells: jax.Array, feedback: PageFeedback
) -> jax.Array:
    """Codes of keys, each as fine as it will be read.

    Args:
      x: bf16, f16 or f32 [heads, tokens, dim].
      scale: [heads, dim], of the tokens.
      cells: f32[heads, tokens], to a step, as in `encode_bytes`: 1 for tokens that nothing refines.
      feedback: [heads, ...].

    Returns:
      Codes as of `encode_bytes`.
    """
    heads, tokens, dim = x.shape
    half, pairs = dim // 2, block_pairs(dim)
    # Blocks of channels first: [blocks, heads, 2 * pairs, ...].
    numbers = _in_blocks(x.astype(jnp.float32).swapaxes(-1, -2), pairs)
    step, zero, carry, answer = (
        _in_blocks(a.reshape(heads, dim, -1), pairs)
        for a in (scale.step, scale.zero, feedback.carry, feedback.answer)
    )
    cells = cells[:, None]  # [heads, 1, tokens]
    alone = cells == 1

    def body(debts: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        numbers, step, zero, carry, answer = block
        shift = _matmul(answer, debts)
        # What overflows is not owed: such keys are rounded to the nearest.
        target = jnp.where(jnp.abs(shift) < jnp.inf, numbers - shift, numbers)
        of_block = Scale(step=step[..., 0], zero=zero[..., 0])
        code = encode_bytes(target, of_block, axis=-1, cells=cells)
        # In memory, or XLA computes a code once more for everyone who wants it.
        code = lax.optimization_barrier(code)
        error = reconstruct(refined_position(code, ~alone), of_block, axis=-1) - numbers
        return debts + _matmul(carry.swapaxes(-1, -2), error), code

    debts = jnp.zeros((heads, RANK, tokens), jnp.float32)
    _, codes = lax.scan(body, debts, (numbers, step, zero, carry, answer))
    # By block, and moved once it is whole: a transpose of all axes takes several times as long.
    blocks = codes[::-1].reshape(half // pairs, heads, 2, pairs, tokens)
    channels = [block[:, i] for i in (0, 1) for block in blocks]
    return jnp.concatenate(channels, axis=1).swapaxes(-1, -2)


def _in_blocks(x: jax.Array, pairs: int) -> jax.Array:
    """[heads, dim, n] to [blocks, heads, 2 * pairs, n], the last block first."""
    heads, dim, n = x.shape
    blocks = x.reshape(heads, 2, dim // 2 // pairs, pairs, n).transpose(2, 0, 1, 3, 4)
    return blocks[::-1].reshape(-1, heads, 2 * pairs, n)
