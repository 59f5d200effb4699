"""Integer codes with one scale per group: the quantiser that most baselines share."""

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.lab.methods.base import SCALE_BITS, Context


def round_affine(
    x: jax.Array, *, bits: int, axis: int, where: jax.Array, symmetric: bool = False
) -> jax.Array:
    """Rounds the values along `axis` to the 2 ** bits levels of one scale.

        asymmetric   lo + round((x - lo) / step) * step     step = (hi - lo) / (2 ** bits - 1)
        symmetric    round(x / step) * step                 step = max |x| / (2 ** (bits - 1) - 1)

    Step and minimum are float16; values are clipped to the levels.

    Args:
      x: f32[..., n, ...].
      bits: 2 to 8; symmetric codes use one level less.
      axis: the axis whose n values share a scale.
      where: bool, broadcastable to x: values that count; the others come back as some level.
      symmetric: see above.

    Returns:
      f32 of x's shape.
    """
    where = jnp.broadcast_to(where, x.shape)
    if symmetric:
        top = jnp.max(jnp.abs(x), axis=axis, keepdims=True, where=where, initial=0.0)
        most = 2 ** (bits - 1) - 1
        step = _half(top / most)
        code = jnp.round(x / jnp.where(step > 0, step, 1.0))
        return jnp.clip(code, -most, most) * step
    lo = jnp.min(x, axis=axis, keepdims=True, where=where, initial=jnp.inf)
    hi = jnp.max(x, axis=axis, keepdims=True, where=where, initial=-jnp.inf)
    lo, hi = (jnp.where(lo > hi, 0.0, end) for end in (lo, hi))  # a group without a value
    step, lo = _half((hi - lo) / (2**bits - 1)), _half(lo)
    code = jnp.round((x - lo) / jnp.where(step > 0, step, 1.0))
    return lo + jnp.clip(code, 0, 2**bits - 1) * step


def _half(x: jax.Array) -> jax.Array:
    """Rounded to float16, as it is stored."""
    return x.astype(jnp.float16).astype(jnp.float32)


def round_per_token(
    x: jax.Array, *, bits: int, group_channels: int, symmetric: bool = False
) -> jax.Array:
    """One scale per token, head and `group_channels` neighbouring channels.

    Args:
      x: f32[..., dim].
      bits: of a code.
      group_channels: divides dim.
      symmetric: see `round_affine`.
    """
    grouped = x.reshape(*x.shape[:-1], -1, group_channels)
    rounded = round_affine(
        grouped, bits=bits, axis=-1, where=jnp.ones((), bool), symmetric=symmetric
    )
    return rounded.reshape(x.shape)


def round_per_channel(
    x: jax.Array, exact: np.ndarray, *, bits: int, group_tokens: int
) -> jax.Array:
    """One scale per head, channel and `group_tokens` neighbouring tokens; the last group may have
    fewer.

    Args:
      x: f32[layers, tokens, heads, dim].
      exact: bool[tokens], tokens that do not count.
      bits: of a code.
      group_tokens: of a group.
    """
    grouped, counted = token_groups(x, exact, group_tokens)
    rounded = round_affine(
        grouped, bits=bits, axis=2, where=jnp.asarray(counted)[None, :, :, None, None]
    )
    return rounded.reshape(x.shape[0], -1, *x.shape[2:])[:, : x.shape[1]]


def token_groups(
    x: jax.Array, exact: np.ndarray, group_tokens: int
) -> tuple[jax.Array, np.ndarray]:
    """Neighbouring tokens together, padded with zeros: f32[layers, groups, group_tokens, heads,
    dim], and bool[groups, group_tokens], those that are there and not exact."""
    tokens = x.shape[1]
    missing = -tokens % group_tokens
    padded = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
    counted = np.pad(~exact, (0, missing)).reshape(-1, group_tokens)
    return padded.reshape(x.shape[0], -1, group_tokens, *x.shape[2:]), counted


def per_token_bits(context: Context, *, bits: float, group_channels: int, scales: int) -> int:
    """Stored bits of keys or of values with one scale per token and group of channels.

    Args:
      context: that is coded.
      bits: of a code.
      group_channels: of a group.
      scales: numbers of 16 bits per group: 2 asymmetric, 1 symmetric.
    """
    groups = context.dim // group_channels
    vector = round(bits * context.dim) + groups * scales * SCALE_BITS
    return context.coded_tokens * context.heads_in_all_layers * vector


def per_channel_bits(context: Context, *, bits: int, group_tokens: int) -> int:
    """Stored bits of keys or of values with scale and minimum per channel and group of tokens."""
    codes = context.coded_tokens * bits
    counted = np.pad(~context.exact, (0, -context.tokens % group_tokens))
    groups = int(np.sum(np.any(counted.reshape(-1, group_tokens), axis=1)))
    return context.heads_in_all_layers * context.dim * (codes + groups * 2 * SCALE_BITS)
