"""The embedded code, value by value: the formulas that references and kernels share.

    position = x / step - zero                          in steps, 0..15
    base     = floor(position + 1/2)                    0..15
    fine     = floor(16 * (position - base)) + 8        0..15, clipped
    x'       = (base + (fine - 7.5) / 16 + zero) * step, or (base + zero) * step without fine

They are those of `kvcompress_jax.codec`, to the bit: kernels import nothing of the package, so a
test compares the two. Everything here is elementwise and lowers to Triton as it is.
"""

import jax
import jax.numpy as jnp
from jax import lax

CODES = 16  # values of a 4-bit code
MAX_ZERO = 2048  # float16 counts exactly up to here
SMALLEST_STEP = 2.0**-126  # the smallest normal bfloat16


def fit(lo: jax.Array, hi: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale of groups with the ends lo <= hi, f32[...]: step bf16[...] and zero f16[...]."""
    # Divided before subtracting: hi - lo may overflow float32.
    extent = hi / (CODES - 1) - lo / (CODES - 1)
    reach = jnp.maximum(jnp.abs(lo), jnp.abs(hi))
    step = jnp.maximum(jnp.maximum(extent, reach / MAX_ZERO), SMALLEST_STEP)
    bits = lax.bitcast_convert_type(step, jnp.uint32) + jnp.uint32(0xFFFF)  # up to a bfloat16
    step = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    step = jnp.where(reach < SMALLEST_STEP, 0.0, step)
    zero = lo / jnp.where(step > 0, step, 1.0)
    # To the nearest float16, in integers: XLA drops a conversion and its reverse on GPUs.
    bits = lax.bitcast_convert_type(zero, jnp.uint32)
    odd = (bits >> jnp.uint32(13)) & jnp.uint32(1)
    bits = (bits + jnp.uint32(0xFFF) + odd) & jnp.uint32(0xFFFFE000)
    zero = lax.bitcast_convert_type(bits, jnp.float32)
    return step.astype(jnp.bfloat16), zero.astype(jnp.float16)


def encode(x: jax.Array, step: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes of f32[...] against scales that broadcast to it: base and fine, i32[...] 0..15."""
    step, zero = step.astype(jnp.float32), zero.astype(jnp.float32)
    position = x / jnp.where(step > 0, step, 1.0) - zero
    base = jnp.clip(jnp.floor(position + 0.5), 0.0, CODES - 1.0)
    fine = jnp.clip(jnp.floor(16.0 * (position - base)) + 8.0, 0.0, 15.0)
    return base.astype(jnp.int32), fine.astype(jnp.int32)


def fed(
    x: jax.Array,
    scale: tuple[jax.Array, jax.Array],
    debts: list[tuple[jax.Array, jax.Array]],
    coarse: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Codes of f32[...], where `coarse` holds to the code that undoes earlier errors best.

    Args:
      x: f32[...].
      scale: step and zero, that broadcast to x.
      debts: what earlier errors add up to in each direction, and what x owes per unit of it; their
        product broadcasts to x.
      coarse: bool, broadcastable to x; elsewhere codes are the nearest.

    Returns:
      As `encode`, and f32[...], by how much the base codes miss x.
    """
    shift = sum((debt * owed for debt, owed in debts), jnp.zeros((), jnp.float32))
    owes = coarse & (jnp.abs(shift) < jnp.inf)  # what overflows is not owed
    codes = encode(jnp.where(owes, x - shift, x), *scale)
    return codes, decode(codes[0], None, *scale) - x


def decode(base: jax.Array, fine: jax.Array | None, step: jax.Array, zero: jax.Array) -> jax.Array:
    """f32[...] that codes i32[...] stand for; `fine` is f32[...] in steps, see `refine`."""
    position = base.astype(jnp.float32)
    if fine is not None:
        position = position + fine
    return (position + zero.astype(jnp.float32)) * step.astype(jnp.float32)


def refine(fine: jax.Array) -> jax.Array:
    """What a fine code adds, in steps: i32[...] 0..15 to f32[...]."""
    return (fine.astype(jnp.float32) - 7.5) / 16.0


def pack(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two codes to a byte: i32[...] each to u8[...]."""
    return (low | (high << 4)).astype(jnp.uint8)
