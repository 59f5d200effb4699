"""`hadamard` on Pallas's Triton route: a product with a constant matrix, on tensor cores.

The butterfly needs fewer operations and more registers than there are. The signs are exact in every
dtype, and the factor dim ** -0.5 is applied to the float32 sums, so that the only rounding is that
of the result. A dim that is no power of two is cut into pieces that are.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvcompress_jax.kernels.hadamard.matrix import signs
from kvcompress_jax.kernels.pools import check_addressable
from kvcompress_jax.kernels.tuning import Tuning, find_tuning


def hadamard_triton(
    x: jax.Array, *, tuning: Tuning | None = None, interpret: bool = False
) -> jax.Array:
    """See `kvcompress_jax.kernels.hadamard.hadamard`.

    Args:
      tuning: num_warps, num_stages, and `rows` of a program, a power of two, at least 16. None:
        what is known to suit the shape and the device.
      interpret: run it in JAX on any device.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x: expected bfloat16 or float16, got {x.dtype}")
    check_addressable(x=x)
    dim = x.shape[-1]
    tuning = tuning or find_tuning("hadamard", str(dim))
    block = tuning["rows"]
    rows = math.prod(x.shape[:-1])
    matrix = jnp.asarray(signs(dim), x.dtype)
    somewhere = pl.BlockSpec(memory_space=pl.ANY)
    y = pl.pallas_call(
        functools.partial(_kernel, dim=dim, rows=rows, block=block),
        name="hadamard",
        grid=(pl.cdiv(rows, block),),
        in_specs=[somewhere, somewhere],
        out_specs=somewhere,
        out_shape=jax.ShapeDtypeStruct((rows, dim), x.dtype),
        compiler_params=plt.CompilerParams(
            num_warps=tuning["num_warps"], num_stages=tuning["num_stages"]
        ),
        interpret=interpret,
    )(x.reshape(rows, dim), matrix)
    return y.reshape(x.shape)


def power_of_two_pieces(n: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of pieces whose sizes are powers of two, the greatest first: 96 is 64 + 32."""
    pieces, start = [], 0
    for bit in reversed(range(n.bit_length())):
        if n & 1 << bit:
            pieces.append((start, 1 << bit))
            start += 1 << bit
    return tuple(pieces)


def _kernel(x, matrix, out, *, dim, rows, block):  # type: ignore[no-untyped-def]
    row = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
    real = row < rows
    pieces = power_of_two_pieces(dim)

    def span(start, size):
        return start + jnp.arange(size, dtype=jnp.int32)

    def load(start, size):
        mask = jnp.broadcast_to(real[:, None], (block, size))
        at = x.at[row[:, None], span(start, size)[None, :]]
        return plt.load(at, mask=mask, other=jnp.zeros((), x.dtype))

    parts = [load(*piece) for piece in pieces]
    for start, size in pieces:
        total = jnp.zeros((block, size), jnp.float32)
        for part, (first, count) in zip(parts, pieces, strict=True):
            total += plt.dot(part, matrix[pl.ds(first, count), pl.ds(start, size)])
        y = (total * dim**-0.5).astype(out.dtype)
        mask = jnp.broadcast_to(real[:, None], (block, size))
        plt.store(out.at[row[:, None], span(start, size)[None, :]], y, mask=mask)
