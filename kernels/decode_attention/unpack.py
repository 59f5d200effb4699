"""Codes from packed bytes to float16, the way that costs fewest instructions.

A float16 with the bits 0x6400 | n is 1024 + n, and with 0x5400 | 16 n it is 64 + n: a code becomes
a number by putting it into the mantissa of a constant. The constant is not subtracted here: what
is the same for all codes of a product is subtracted once from the product.

    unpack(b)        1024 + low nibble,       64 + high nibble
    unpack_fine(b, f)  1024 + 16 b + f, nibble by nibble: of the low ones, and of the high ones

Triton runs the PTX below on four bytes at a time. Where kernels are interpreted, `jnp` says the
same; a test runs the PTX in an emulator over all byte values.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

LOW_OFFSET = 1024.0
HIGH_OFFSET = 64.0
FINE_OFFSET = 1024.0 + 8.0  # of 16 times the position, where a fine plane refines it
ABSENT_FINE_OFFSET = 1024.0  # where there is none and 0 stands for its code

# $0, $1: of bytes 0, 1 and 2, 3; $2: the bytes. One program for each half: Triton's lowering in JAX
# takes one result, and the assembler merges what the two have in common.
LOW_PTX = """{
.reg .b32 a, b;
prmt.b32 a, $2, 0, 0x4140;
prmt.b32 b, $2, 0, 0x4342;
lop3.b32 $0, a, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $1, b, 0x000F000F, 0x64006400, 0xEA;
}"""
HIGH_PTX = """{
.reg .b32 a, b;
prmt.b32 a, $2, 0, 0x4140;
prmt.b32 b, $2, 0, 0x4342;
lop3.b32 $0, a, 0x00F000F0, 0x54005400, 0xEA;
lop3.b32 $1, b, 0x00F000F0, 0x54005400, 0xEA;
}"""
# $2: bytes of the base plane, $3: of the fine plane. 0xE4 selects by the third operand's bits.
FINE_LOW_PTX = """{
.reg .b32 a, c;
shl.b32 a, $2, 4;
lop3.b32 a, a, $3, 0xF0F0F0F0, 0xE4;
mov.b32 c, 0x64646464;
prmt.b32 $0, a, c, 0x4140;
prmt.b32 $1, a, c, 0x4342;
}"""
FINE_HIGH_PTX = """{
.reg .b32 b, c;
shr.u32 b, $3, 4;
lop3.b32 b, $2, b, 0xF0F0F0F0, 0xE4;
mov.b32 c, 0x64646464;
prmt.b32 $0, b, c, 0x4140;
prmt.b32 $1, b, c, 0x4342;
}"""


def unpack(packed: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """u8[...] to f16[...] of the low and of the high nibbles, plus LOW_OFFSET and HIGH_OFFSET."""
    if interpret:
        low, high = _nibbles(packed)
        return low + jnp.float16(LOW_OFFSET), high + jnp.float16(HIGH_OFFSET)
    return _run(LOW_PTX, packed), _run(HIGH_PTX, packed)


def unpack_fine(
    base: jax.Array, fine: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """u8[...] of both planes to f16[...]: 1024 + 16 * base + fine, low and high nibbles."""
    if interpret:
        pairs = zip(_nibbles(base), _nibbles(fine), strict=True)
        low, high = (b * jnp.float16(16) + f + jnp.float16(1024) for b, f in pairs)
        return low, high
    return _run(FINE_LOW_PTX, base, fine), _run(FINE_HIGH_PTX, base, fine)


def _nibbles(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = packed.astype(jnp.int32)
    return (bits & 15).astype(jnp.float16), (bits >> 4).astype(jnp.float16)


def _run(ptx: str, *packed: jax.Array) -> jax.Array:
    (codes,) = plt.elementwise_inline_asm(
        ptx,
        args=packed,
        constraints="=r,=r" + ",r" * len(packed),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(packed[0].shape, jnp.float16)],
    )
    return codes
