"""Shares of the attention of a sequence into one, by their log-sum-exp, in one launch.

Plain XLA needs five kernels for it, which take longer than to attend to a short context.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvcompress_jax.kernels.decode_attention.columns import columns_of
from kvcompress_jax.kernels.decode_attention.inputs import LN2, MASKED

WIDTH = 32  # channels of a program
NUMBERS = 4096  # of the shares that a program holds at a time


@dataclasses.dataclass(frozen=True)
class _Plan:
    queries: int
    group: int
    columns: int  # of a program
    tiles: int  # of so many columns
    splits: int
    block: int  # splits at a time


def merge_triton(
    out: jax.Array,
    lse: jax.Array,
    q: jax.Array,
    *,
    query_lengths: jax.Array,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Merges shares.

    Args:
      out: f32[rows, kv_heads, splits, columns, dim], columns being queries times query heads of a
        KV head.
      lse: f32[rows, kv_heads, splits, columns], of base 2; very negative where nothing was seen.
      q: the queries, for their shape and dtype.
      query_lengths: i32[rows].
      interpret: run it in JAX on any device.

    Returns:
      Output and log-sum-exp of `decode_attention`.
    """
    rows, queries, all_heads, dim = q.shape
    heads, splits = out.shape[1:3]
    group = all_heads // heads
    columns = min(8, 1 << (queries * group - 1).bit_length())
    plan = _Plan(
        queries=queries,
        group=group,
        columns=columns,
        tiles=-(-queries * group // columns),
        splits=splits,
        block=min(NUMBERS // (WIDTH * columns), 1 << (splits - 1).bit_length()),
    )
    somewhere = pl.BlockSpec(memory_space=pl.ANY)
    merged, total = pl.pallas_call(
        lambda *refs: _merge(*refs, plan),
        name="merge_attention",
        grid=(dim // WIDTH, heads * plan.tiles, rows),
        in_specs=[somewhere] * 3,
        out_specs=[somewhere] * 2,
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(out, lse, query_lengths)
    return merged, total


def _merge(out, lse, query_lengths, merged, total, plan):  # type: ignore[no-untyped-def]
    part, place, row = (pl.program_id(axis) for axis in range(3))
    head, tile = lax.div(place, plan.tiles), lax.rem(place, plan.tiles)
    here = columns_of(
        tile * plan.columns, plan.columns, head, queries=plan.queries, group=plan.group
    )
    channel = part * WIDTH + lax.iota(jnp.int32, WIDTH)
    shape = (plan.block, plan.columns, WIDTH)

    def body(i, state):  # type: ignore[no-untyped-def]
        top, weights, sums = state
        split = i * plan.block + lax.iota(jnp.int32, plan.block)
        there = jnp.broadcast_to((split < plan.splits)[:, None], shape[:2])
        split = jnp.broadcast_to(jnp.where(split < plan.splits, split, 0)[:, None], shape[:2])
        column = jnp.broadcast_to(here.column[None, :], shape[:2])
        level = plt.load(lse.at[row, head, split, column], mask=there, other=jnp.float32(MASKED))
        index = tuple(jnp.broadcast_to(x[:, :, None], shape) for x in (split, column))
        shares = plt.load(
            out.at[row, head, *index, jnp.broadcast_to(channel[None, None, :], shape)],
            mask=jnp.broadcast_to(there[:, :, None], shape),
            other=jnp.float32(0.0),
        )
        above = jnp.maximum(top, jnp.max(level, axis=0))
        shrink = jnp.exp2(top - above)
        weight = jnp.where(level < MASKED / 10, 0.0, jnp.exp2(level - above[None, :]))
        sums = sums * shrink[:, None] + jnp.sum(shares * weight[:, :, None], axis=0)
        return above, weights * shrink + jnp.sum(weight, axis=0), sums

    nothing = jnp.zeros((plan.columns,), jnp.float32)
    state = (nothing + MASKED, nothing, jnp.zeros((plan.columns, WIDTH), jnp.float32))
    top, weights, sums = lax.fori_loop(0, -(-plan.splits // plan.block), body, state)
    some = (weights != 0) & (here.query < query_lengths[row])
    divisor = jnp.where(some, weights, 1.0)
    mean = jnp.where(some[:, None], sums / divisor[:, None], 0.0).astype(merged.dtype)
    plt.store(here.at(merged, row, channel), mean)
    natural = jnp.where(some, (top + jnp.log2(divisor)) * LN2, -jnp.inf)
    plt.store(here.at(total, row), natural)  # the same from every part
