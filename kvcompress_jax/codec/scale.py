"""The range of a group of values as two 16-bit numbers.

A code n stands for the value `(n + zero) * step`. The step is bfloat16, for its range: groups of
1e-30 and of 1e30 are coded alike. The zero point is float16, for its precision, and counts in
steps. Together they take the 32 bits that a pair (low end, step) would take, and serve every
input dtype.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

CODES = 16  # values of the 4-bit base plane: 0..15
MAX_ZERO = 2048  # float16 counts exactly up to here: the zero point is off by half a step at most
SMALLEST_STEP = 2.0**-126  # the smallest normal bfloat16; below it processors may flush to zero


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    """Affine scale of groups of values: code n stands for `(n + zero) * step`.

    Invariants, for the group's ends lo <= hi: `step >= (hi - lo) / 15` and at most 2**-7 of it
    larger, or as large as keeps `|zero| <= 2048` (the group is then nearly constant, and half a
    step is a relative error of 2**-12, as in float16); `step == 0` only for a group of zeros.
    """

    step: jax.Array  # bf16[groups]
    zero: jax.Array  # f16[groups]


def fit_scale(x: jax.Array, *, axis: int, where: jax.Array | None = None) -> Scale:
    """Fits one scale to the values along `axis`, end points included.

    Args:
      x: bf16, f16 or f32 [..., n, ...], finite.
      axis: the axis whose n values share a scale; it is dropped from the result.
      where: bool, broadcastable to x; values where it is False do not count. A group without a
        single value that counts gets a scale of zero.

    Returns:
      The scale, fields of x's shape without `axis`.
    """
    if where is None:  # in x's dtype, where ends are as exact and half the bytes are read
        lo, hi = (end(x, axis=axis).astype(jnp.float32) for end in (jnp.min, jnp.max))
    else:
        x = x.astype(jnp.float32)
        where = jnp.broadcast_to(where, x.shape)
        lo = jnp.min(x, axis=axis, where=where, initial=jnp.inf)
        hi = jnp.max(x, axis=axis, where=where, initial=-jnp.inf)
        empty = lo > hi
        lo, hi = jnp.where(empty, 0.0, lo), jnp.where(empty, 0.0, hi)
    # Divided before subtracting: hi - lo may overflow float32.
    extent = hi / (CODES - 1) - lo / (CODES - 1)
    reach = jnp.maximum(jnp.abs(lo), jnp.abs(hi))
    step = jnp.maximum(jnp.maximum(extent, reach / MAX_ZERO), SMALLEST_STEP)
    step = jnp.where(reach < SMALLEST_STEP, 0.0, _round_up_to_bfloat16(step))
    zero = _round_to_float16(lo / jnp.where(step > 0, step, 1.0))
    return Scale(step=step.astype(jnp.bfloat16), zero=zero.astype(jnp.float16))


def _round_up_to_bfloat16(x: jax.Array) -> jax.Array:
    """The smallest bfloat16 >= x, as f32, for positive finite x. Rounding down would put the
    top end of the range out of reach."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(
        (bits + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000), jnp.float32
    )


def _round_to_float16(x: jax.Array) -> jax.Array:
    """The nearest float16 number, ties to even, as f32; below 2**-14 as it is, and up to 2048.

    In integers: on GPUs, XLA takes a conversion to float16 and back for nothing, codes against the
    exact zero point, and stores another one.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> jnp.uint32(13)) & jnp.uint32(1)
    rounded = (bits + jnp.uint32(0xFFF) + odd) & jnp.uint32(0xFFFFE000)
    return lax.bitcast_convert_type(rounded, jnp.float32)
