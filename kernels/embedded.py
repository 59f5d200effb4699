"""The embedded code, value by value: the formulas that references and kernels share.

    n    = floor(cells * (x / step - zero) + 1/2)    16 cells to a step, 4, or 1 without a fine code
    code = 16 / cells * (n + cells // 2)             0..255, clipped; base = code // 16
    x'   = ((code - 8) / 16 + zero) * step           or (base + zero) * step without a fine code

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


def encode(x: jax.Array, step: jax.Array, zero: jax.Array, cells: jax.Array) -> jax.Array:
    """Codes of f32[...] against scales that broadcast to it: i32[...] 0..255, the base codes in the
    upper nibble. `cells` to a step: f32, broadcastable to x, of 16, 4 or 1."""
    step, zero = step.astype(jnp.float32), zero.astype(jnp.float32)
    position = x / jnp.where(step > 0, step, 1.0) - zero
    width = 16.0 / cells
    code = (jnp.floor(cells * position + 0.5) + jnp.floor(cells / 2)) * width
    return jnp.clip(code, 0.0, 256.0 - width).astype(jnp.int32)


def fed(
    x: jax.Array,
    scale: tuple[jax.Array, jax.Array],
    debts: list[tuple[jax.Array, jax.Array]],
    cells: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The codes of f32[...] that undo earlier errors best.

    Args:
      x: f32[...].
      scale: step and zero, that broadcast to x.
      debts: what earlier errors add up to in each direction, and what x owes per unit of it; their
        product broadcasts to x.
      cells: f32, broadcastable to x, as in `encode`.

    Returns:
      As `encode`, and f32[...], by how much the codes miss x.
    """
    shift = sum((debt * owed for debt, owed in debts), jnp.zeros((), jnp.float32))
    # What overflows is not owed.
    codes = encode(jnp.where(jnp.abs(shift) < jnp.inf, x - shift, x), *scale, cells)
    above = jnp.where(cells > 1, 8, 0).astype(jnp.float32)
    step, zero = (s.astype(jnp.float32) for s in scale)
    return codes, ((codes.astype(jnp.float32) - above) / 16.0 + zero) * step - x


def split(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes i32[...] 0..255 to base and fine codes."""
    return codes >> 4, codes & 15


def separate(shared: jax.Array) -> jax.Array:
    """Fine codes in rows that two slots share, i32[..., rows, n], to those of the slots, i32[...,
    2 * rows, n]."""
    return jnp.concatenate([(shared & 3) << 2, shared & 12], axis=-2)


def of_slot(packed: jax.Array, slot: jax.Array, fine_rows: int) -> jax.Array:
    """Of packed fine codes, u8[...], in rows that two slots share: those of `slot`, i32,
    broadcastable to them."""
    return jnp.where(slot < fine_rows, packed << jnp.uint8(2), packed) & jnp.uint8(0xCC)


def decode(base: jax.Array, fine: jax.Array | None, step: jax.Array, zero: jax.Array) -> jax.Array:
    """f32[...] that codes i32[...] stand for; `fine` is f32[...] in steps, see `refine`."""
    position = base.astype(jnp.float32)
    if fine is not None:
        position = position + fine
    return (position + zero.astype(jnp.float32)) * step.astype(jnp.float32)


def refine(fine: jax.Array) -> jax.Array:
    """What a fine code adds, in steps: i32[...] 0..15 to f32[...]."""
    return (fine.astype(jnp.float32) - 8.0) / 16.0


def pack(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two codes to a byte: i32[...] each to u8[...]."""
    return (low | (high << 4)).astype(jnp.uint8)
