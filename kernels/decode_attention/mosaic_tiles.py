"""Pieces of memory and of matrices on Mosaic GPU: blocks, layouts of registers, codes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def block(
    shape: tuple[int, ...],
    index: Callable[[jax.Array], tuple[Any, ...]],
    itemsize: int = 1,
    *,
    swizzle: bool = True,
) -> plgpu.BlockSpec:
    """A block of a pool whose first axis counts planes or lines; planes are swizzled against bank
    conflicts."""
    transforms: tuple[Any, ...] = ()
    if len(shape) == 2 and swizzle:
        width = min(shape[1] * itemsize, 128)
        tiling = plgpu.TilingTransform((8, width // itemsize))
        transforms = (tiling, plgpu.SwizzleTransform(width))
    return plgpu.BlockSpec((None, *shape), index, memory_space=plgpu.SMEM, transforms=transforms)


def left(dtype: Any) -> Any:
    """The layout of a left operand of `mma`."""
    return plgpu.Layout.MMA_LHS(dtype)


def right(dtype: Any) -> Any:
    """The layout of a right operand."""
    return plgpu.Layout.MMA_RHS(dtype)


def result(dtype: Any) -> Any:
    """The layout of what it adds to."""
    return plgpu.Layout.MMA_ACC(dtype)


def load(ref: Any, layout: Any) -> jax.Array:
    """Of shared or device memory, to registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def zeros(shape: tuple[int, int]) -> jax.Array:
    """Sums to begin with."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), result(jnp.float16))


def along_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[columns] to [rows, columns]."""
    return lax.broadcast_in_dim(x, shape, [1])


def turned(buffer: Any, p: jax.Array) -> jax.Array:
    """Weights [tokens, columns] from a result's layout to a right operand's."""
    plgpu.store(buffer.T, p, optimized=False)
    return load(buffer.T, right(p.dtype))


def unpack(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u8[...] to the low and the high nibbles, f16[...]: a code becomes a number by putting it
    into the mantissa of a constant, which is then subtracted without an error."""
    return _nibble(packed, 0x0F, 0x6400, 1024.0), _nibble(packed, 0xF0, 0x5400, 64.0)


def unpack_fine(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Likewise, sixteenths of the nibbles."""
    return _nibble(packed, 0x0F, 0x5400, 64.0), _nibble(packed, 0xF0, 0x4400, 4.0)


def _nibble(packed: jax.Array, mask: int, bits: int, offset: float) -> jax.Array:
    wide = packed.astype(jnp.uint16) & jnp.uint16(mask) | jnp.uint16(bits)
    return lax.bitcast_convert_type(wide, jnp.float16) - jnp.float16(offset)
