"""Values to base and fine plane and back.

    t     = x / step - zero                      position in steps, 0..15
    base  = floor(t + 1/2)                       0..15, the base plane
    fine  = floor(16 * (t - base)) + 8           0..15, the fine plane, clipped

    base alone     x' = (base + zero) * step                       |x - x'| <= step / 2
    base and fine  x' = (base + (fine - 7.5) / 16 + zero) * step   |x - x'| <= step / 32

The base plane alone is an ordinary 4-bit code with exact end points; the fine plane cuts each of
its cells into 16 (successive refinement: Equitz and Cover, 1991). Dropping the fine plane is
therefore a demotion from 8 to 4 bits without coding anything again, and adding it back restores
the very same 8 bits.
"""

import jax
import jax.numpy as jnp

from kvcompress_jax.codec.scale import CODES, Scale

FINE_CELLS = 16  # a cell of the base plane is cut into this many
FINE_MIDDLE = (FINE_CELLS - 1) / 2  # the fine code that would stand for no correction


def encode(x: jax.Array, scale: Scale, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Codes x against a scale that was fitted along `axis`.

    Args:
      x: bf16, f16 or f32 [..., n, ...]; values beyond the scale's range are clipped to its ends.
      scale: fields of x's shape without `axis`.
      axis: the axis along which one scale holds.

    Returns:
      base and fine, u8 of x's shape, values 0..15. Not packed.
    """
    base, fine = _encode(x, scale, axis)
    return base.astype(jnp.uint8), fine.astype(jnp.uint8)


def encode_bytes(x: jax.Array, scale: Scale, *, axis: int) -> jax.Array:
    """Like `encode`, both codes in one byte: base in the high nibble, fine in the low one.

    What makes planes of these bytes reads memory, and computes no code a second time.
    """
    base, fine = _encode(x, scale, axis)
    return (FINE_CELLS * base + fine).astype(jnp.uint8)  # exact; one conversion instead of two


def _encode(x: jax.Array, scale: Scale, axis: int) -> tuple[jax.Array, jax.Array]:
    step = jnp.expand_dims(scale.step.astype(jnp.float32), axis)
    zero = jnp.expand_dims(scale.zero.astype(jnp.float32), axis)
    divisor = jnp.where(step > 0, step, 1.0)  # a group of zeros keeps code 0, not NaN
    position = x.astype(jnp.float32) / divisor - zero
    base = jnp.clip(jnp.floor(position + 0.5), 0, CODES - 1)
    fine = jnp.clip(jnp.floor(FINE_CELLS * (position - base)) + FINE_CELLS // 2, 0, FINE_CELLS - 1)
    return base, fine


def refine(fine: jax.Array) -> jax.Array:
    """What a fine plane adds to the base codes, in steps: u8[...] 0..15 to f32[...]."""
    return (fine.astype(jnp.float32) - FINE_MIDDLE) / FINE_CELLS


def refined_position(codes: jax.Array, refined: jax.Array) -> jax.Array:
    """Positions in steps, to the bit those of `base + refine(fine)`, with one conversion for both.

    Args:
      codes: u8[...], as `encode_bytes` gives them.
      refined: bool, broadcastable to codes: where it is False, the fine code must be 0 and means
        nothing.

    Returns:
      f32[...].
    """
    return (codes.astype(jnp.float32) - jnp.where(refined, FINE_MIDDLE, 0.0)) / FINE_CELLS


def reconstruct(position: jax.Array, scale: Scale, *, axis: int) -> jax.Array:
    """Values at f32[..., n, ...] positions in steps; `scale` as in `decode`."""
    step = jnp.expand_dims(scale.step.astype(jnp.float32), axis)
    zero = jnp.expand_dims(scale.zero.astype(jnp.float32), axis)
    return (position + zero) * step


def decode(base: jax.Array, scale: Scale, *, axis: int, fine: jax.Array | None = None) -> jax.Array:
    """The values that the codes stand for.

    Args:
      base: u8[..., n, ...], 0..15.
      scale: fields of base's shape without `axis`.
      axis: the axis along which one scale holds.
      fine: u8 of base's shape, 0..15, or None for the base plane alone.

    Returns:
      f32 of base's shape.
    """
    position = base.astype(jnp.float32)
    if fine is not None:
        position = position + refine(fine)
    return reconstruct(position, scale, axis=axis)
