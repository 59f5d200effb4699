"""`open_page` on Pallas's Triton route: one program opens one head of one layer of one page.

Planes are read as they lie; rows are stored to the places of their tokens, a row being contiguous.
A program goes over its channels in pieces of `channels` in either half of the vector.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvcompress_jax.kernels import embedded
from kvcompress_jax.kernels.pools import CodePools, check_addressable
from kvcompress_jax.kernels.tuning import Tuning, find_tuning


def open_page_triton(
    pools: CodePools,
    *,
    pages: jax.Array,
    chunks: jax.Array,
    count: jax.Array,
    dtype: jnp.dtype,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `kvcompress_jax.kernels.open_page.open_page`; pages past `count` are not written.

    Args:
      tuning: num_warps, num_stages, and `channels`: of half a vector that are decoded at a time, a
        power of two that divides dim/2. None: what is known to suit the shape and the device.
      interpret: run it in JAX on any device.
    """
    layers, _, _, heads, _ = pools.base.shape
    page_size, dim, n = pools.page_size, pools.dim, pages.shape[0]
    tuning = tuning or find_tuning("open_page", f"{page_size}x{dim}")
    channels = tuning["channels"]
    if channels & (channels - 1) or (dim // 2) % channels:
        raise NotImplementedError(
            f"channels: expected a power of two that divides {dim // 2} (dim/2), got {channels}"
        )
    out = jax.ShapeDtypeStruct((layers, n, 2, heads, page_size * dim), dtype)
    check_addressable(base=pools.base, fine=pools.fine, out=out)
    somewhere = pl.BlockSpec(memory_space=pl.ANY)
    inputs = (pages, chunks, count.reshape(1), pools.base)
    inputs += (pools.key_step, pools.key_zero, pools.value_step, pools.value_zero, pools.order)
    if pools.fine_rows:
        inputs += (pools.fine,)
    kv = pl.pallas_call(
        functools.partial(
            _kernel,
            dim=dim,
            page_size=page_size,
            fine_rows=pools.fine_rows,
            refined_slots=pools.refined_slots,
            channels=channels,
        ),
        name="open_page",
        grid=(n, layers, heads),
        in_specs=[somewhere] * len(inputs),
        out_specs=somewhere,
        out_shape=out,
        compiler_params=plt.CompilerParams(
            num_warps=tuning["num_warps"], num_stages=tuning["num_stages"]
        ),
        interpret=interpret,
    )(*inputs)
    return kv.reshape(layers, n, 2, heads, page_size, dim)


def _kernel(*refs, dim, page_size, fine_rows, refined_slots, channels):  # type: ignore[no-untyped-def]
    pages, chunks, count, base, key_step, key_zero, value_step, value_zero, order_pool = refs[:9]
    fine, out = refs[9] if fine_rows else None, refs[-1]
    i, layer, head = (pl.program_id(axis) for axis in range(3))
    half = dim // 2

    @pl.when(i < count[0])
    def _():
        page, chunk = pages[i], chunks[i, layer]
        slot = lax.iota(jnp.int32, page_size)
        order = order_pool[layer, page, head, :].astype(jnp.int32)
        refined = (slot < refined_slots) & (chunk >= 0)
        step = value_step[layer, page, head, :][:, None]
        zero = value_zero[layer, page, head, :][:, None]
        column = lax.iota(jnp.int32, channels)

        def place(kind, piece, rows):
            channel = piece * channels + column
            row = lax.rem(slot, rows)
            if kind == 0:
                return row[:, None] * half + channel[None, :]
            return channel[:, None] * rows + row[None, :]

        def halves(kind, packed):
            """The codes of both halves, i32[page_size, channels] each."""
            packed = packed.astype(jnp.int32)
            low, high = packed & 15, packed >> 4
            return (low, high) if kind == 0 else (low.T, high.T)

        def body(piece, carry):
            for kind in range(2):
                codes = halves(kind, base[layer, page, kind, head, place(kind, piece, page_size)])
                detail: tuple = (None, None)
                if fine is not None:
                    mask = refined[:, None] if kind == 0 else refined[None, :]
                    where = place(kind, piece, fine_rows)
                    there = fine.at[jnp.maximum(chunk, 0), kind, head, where]
                    mask = jnp.broadcast_to(mask, where.shape)
                    packed = plt.load(there, mask=mask, other=jnp.uint8(0))
                    if refined_slots > fine_rows:
                        own = slot[:, None] if kind == 0 else slot[None, :]
                        packed = embedded.of_slot(packed, own, fine_rows)
                    detail = tuple(
                        jnp.where(refined[:, None], embedded.refine(x), 0.0)
                        for x in halves(kind, packed)
                    )
                for j in range(2):
                    start = piece * channels + j * half
                    if kind == 0:
                        channel = pl.ds(start, channels)
                        scale = (
                            key_step[layer, page, head, channel][None, :],
                            key_zero[layer, page, head, channel][None, :],
                        )
                    else:
                        scale = step, zero
                    x = embedded.decode(codes[j], detail[j], *scale)
                    row = order[:, None] * dim + (start + column)[None, :]
                    out[layer, i, kind, head, row] = x.astype(out.dtype)
            return carry

        lax.fori_loop(0, half // channels, body, 0)
