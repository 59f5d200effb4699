"""Attention over pages of all levels on Mosaic GPU: the kernel that `mosaic.py` launches.

A block of four warps takes one KV head of one sequence, all of its queries, and a share of its
pages, one loop for each level. Pages are copied to shared memory some steps ahead. Per page:

    logits   Sᵀ[page_size, n] = (C_K + z_K) · (s_K q)       keys per channel: s_K into q
    weights  P = exp2(Sᵀ - top)
    output   Oᵀ[dim, n] += C_Vᵀ · (s_V P) + z_V · (s_V P)   values per token: s_V into P

with codes C, steps s and zero points z. What multiplies is `mma`: float16 operands, float32 sums.
A code is a float16 without an error, so that only the folded queries and the weights are rounded.

Imported where Mosaic is: see `mosaic.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvcompress_jax.kernels.decode_attention.inputs import LIFT, MASKED
from kvcompress_jax.kernels.decode_attention.mosaic_tiles import (
    along_columns,
    block,
    left,
    load,
    result,
    right,
    turned,
    unpack,
    unpack_fine,
    zeros,
)

ROWS = 64  # tokens or channels of the smallest product: four warps of 16 each
FINE_MIDDLE = 8 / 16  # what refined codes are above the position, see `kernels.embedded`

Refs = Mapping[str, Any]
# Greatest logit so far, sum of the weights, and unnormalised output of both halves of channels.
State = tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is compiled for."""

    page_size: int
    half: int  # of dim
    fine_rows: int  # 0: there are no fine planes
    sink_tokens: int
    columns: int  # queries
    splits: int
    heads: int
    pages: int  # sealed pages of a layer in the pools
    raw_pages: int  # likewise
    scale: float  # of logits, log2(e) included
    cap: float | None  # soft cap, in the same units
    window: bool
    mass: bool
    sealed: bool  # whether there are sealed pages at all
    exact: jnp.dtype  # of raw pages
    stages: int  # pages of codes that are in shared memory at a time
    raw_stages: int  # blocks of raw tokens, likewise
    interpret: bool


@dataclasses.dataclass(frozen=True)
class Place:
    """What a block is to do."""

    row: jax.Array
    layer: jax.Array
    head: jax.Array
    position: jax.Array  # of each query, i32[columns]


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory besides that of the pipelines."""
    types = {"weights": plgpu.SMEM((plan.columns, plan.page_size), jnp.float16)}
    types["exact_weights"] = plgpu.SMEM((plan.columns, ROWS), plan.exact)
    if 0 < plan.fine_rows < plan.page_size:
        types["spread"] = plgpu.SMEM((plan.page_size, plan.half), jnp.uint8)
    return types


def attention_kernel(refs: Refs, plan: Plan) -> None:
    """The share of one block: refs by name, see `mosaic.py`."""
    row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
    position = load(refs["position"].at[row], result(jnp.float16).reduce(0))
    here = Place(row, refs["layer"][0], head, position)

    def share(count: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = lax.div(count * split, plan.splits)
        return first, lax.div(count * (split + 1), plan.splits) - first

    state = _first(refs, plan, here, split)
    if plan.sealed:
        refined = refs["refined"][row] if plan.fine_rows else jnp.int32(0)
        plain = refs["plain"][row]
        for fine, begin, count in ((True, 0, refined), (False, refined, plain)):
            if plan.fine_rows or not fine:
                first, pages = share(count)
                state = _sealed_pages(refs, plan, here, state, begin + first, pages, fine=fine)
    first, pages = share(refs["raw_count"][row])
    top, total, out = _raw_pages(refs, plan, here, state, first, pages)

    some = total != 0  # NaN is handed on
    divisor = jnp.where(some, total, 1.0)
    for side, x in enumerate(out):
        channels = pl.ds(side * plan.half, plan.half)
        scaled = x * along_columns(1.0 / divisor, x.shape)
        plgpu.store(refs["out"].at[row, head, split, channels], scaled, optimized=False)
    lse = jnp.where(some, top - LIFT + jnp.log2(divisor), MASKED)
    plgpu.store(refs["lse"].at[row, head, split], lse, optimized=False)


def _first(refs: Refs, plan: Plan, here: Place, split: jax.Array) -> State:
    """Nothing seen; for the first block of a sequence, the share that came with the inputs."""
    acc = result(jnp.float16)
    column = acc.reduce(0)
    if "first_out" not in refs:
        top = plgpu.layout_cast(jnp.full((plan.columns,), MASKED, jnp.float32), column)
        total = plgpu.layout_cast(jnp.zeros((plan.columns,), jnp.float32), column)
        return top, total, tuple(zeros((plan.half, plan.columns)) for _ in range(2))
    mine = (split == 0).astype(jnp.float32)
    at = (here.row, here.head)
    top = load(refs["first_top"].at[*at], column) * mine + MASKED * (1.0 - mine)
    lift = mine * 2.0**LIFT
    total = load(refs["first_total"].at[*at], column) * lift
    halves = (pl.ds(side * plan.half, plan.half) for side in range(2))
    out = tuple(load(refs["first_out"].at[*at, x], acc) * lift for x in halves)
    return top, total, out


def _sealed_pages(
    refs: Refs,
    plan: Plan,
    here: Place,
    state: State,
    first: jax.Array,
    pages: jax.Array,
    *,
    fine: bool,
) -> State:
    """The loop over pages of codes: with a fine plane, or without."""
    page_size, half, columns = plan.page_size, plan.half, plan.columns
    lhs, rhs, acc = (make(jnp.float16) for make in (left, right, result))
    shape = (page_size, columns)
    padded = 0 < plan.fine_rows < page_size
    q = [
        load(refs["q"].at[here.row, here.head, :, pl.ds(side * half, half)].T, rhs)
        for side in range(2)
    ]

    def step(index: tuple[jax.Array], *blocks: Any) -> State:
        *read, (top, total, out) = blocks
        page = dict(zip(specs, read, strict=True))
        i = first + index[0]
        s = zeros(shape)
        folded = []
        for side in range(2):
            channels = pl.ds(side * half, half)
            scale = load(page["key_step"].at[channels], rhs.reduce(1)).astype(jnp.float32)
            scale = lax.broadcast_in_dim(scale * plan.scale, (half, columns), [0])
            folded.append((q[side].astype(jnp.float32) * scale).astype(jnp.float16))
            zero = load(page["key_zero"].at[channels], lhs.reduce(0))
            s = _mma(plan, s, lax.broadcast_in_dim(zero, (page_size, half), [1]), folded[side])
        codes = unpack(load(page["base_keys"], lhs))
        for code, q_of in zip(codes, folded, strict=True):
            s = _mma(plan, s, code, q_of)
        slot = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=acc)
        if fine:
            detail = page["fine_keys"]
            if padded:  # to the rows that a product has; the rest is whatever was there
                strided = plgpu.Layout.WG_STRIDED(detail.shape, vec_size=detail.size // 128)
                lower = refs["spread"].at[pl.ds(0, plan.fine_rows)]
                plgpu.store(lower, load(detail, strided), optimized=False)
                detail = refs["spread"]
            more, sums = zeros(shape), zeros(shape)
            ones = plgpu.layout_cast(jnp.ones((page_size, half), jnp.float16), lhs)
            for code, q_of in zip(unpack_fine(load(detail, lhs)), folded, strict=True):
                more = _mma(plan, more, code, q_of)
                sums = _mma(plan, sums, ones, q_of)
            more = more - FINE_MIDDLE * sums
            s = s + (jnp.where(slot < plan.fine_rows, more, 0.0) if padded else more)
        s = _capped(s, plan)
        mask = None
        if plan.sink_tokens:  # the first slots of the first page are kept exactly elsewhere
            exact = (refs["index"][here.row, i] == 0) & (refs["sink"][here.row] >= 0)
            mask = slot >= jnp.where(exact, plan.sink_tokens, 0)
        if plan.window:
            order = load(page["order"], acc.reduce(1)).astype(jnp.int32)
            token = refs["index"][here.row, i] * page_size + order
            seen = _in_window(refs, lax.broadcast_in_dim(token, shape, [0]), here)
            mask = seen if mask is None else mask & seen
        top, shrink, p = _weights(s, mask, top)
        mass = jnp.sum(p, axis=0)
        if plan.mass:
            lse = jnp.where(mass > 0, top - LIFT + jnp.log2(jnp.where(mass > 0, mass, 1.0)), MASKED)
            column = refs["column"][here.row, i]
            there = refs["page_lse"].at[here.row, here.head, column]
            plgpu.store(there, lse, optimized=False)
        value_step = load(page["value_step"], acc.reduce(1)).astype(jnp.float32)
        value_zero = load(page["value_zero"], acc.reduce(1)).astype(jnp.float32)
        p = (p * lax.broadcast_in_dim(value_step, shape, [0])).astype(jnp.float16)
        back = p.astype(jnp.float32)
        moved = back * lax.broadcast_in_dim(value_zero, shape, [0])
        if fine:
            less = moved - FINE_MIDDLE * back
            moved = jnp.where(slot < plan.fine_rows, less, moved) if padded else less
        move = jnp.sum(moved, axis=0)
        p = turned(refs["weights"], p)
        out = tuple(along_columns(shrink, x.shape) * x + along_columns(move, x.shape) for x in out)
        codes = unpack(load(page["base_values"], lhs))
        out = tuple(_mma(plan, x, code, p) for x, code in zip(out, codes, strict=True))
        if fine:
            p = load(refs["weights"].at[:, pl.ds(0, plan.fine_rows)].T, rhs)
            codes = unpack_fine(load(page["fine_values"], lhs))
            out = tuple(_mma(plan, x, code, p) for x, code in zip(out, codes, strict=True))
        return top, total * shrink + mass, out

    def plane(kind: int, rows: int, width: int) -> plgpu.BlockSpec:
        def index(i: jax.Array) -> tuple[Any, ...]:
            page = here.layer * plan.pages + refs["ids"][here.row, first + i]
            return (page * 2 + kind) * plan.heads + here.head, 0, 0

        return block((rows, width), index)

    def detail(kind: int, rows: int, width: int) -> plgpu.BlockSpec:
        def index(i: jax.Array) -> tuple[Any, ...]:
            chunk = refs["chunk"][here.row, first + i]
            return (chunk * 2 + kind) * plan.heads + here.head, 0, 0

        return block((rows, width), index, swizzle=kind == 1 or not padded)

    def line(width: int) -> plgpu.BlockSpec:
        def index(i: jax.Array) -> tuple[Any, ...]:
            page = here.layer * plan.pages + refs["ids"][here.row, first + i]
            return page * plan.heads + here.head, 0

        return block((width,), index)

    specs = {
        "base_keys": plane(0, page_size, half),
        "base_values": plane(1, half, page_size),
        "key_step": line(2 * half),
        "key_zero": line(2 * half),
        "value_step": line(page_size),
        "value_zero": line(page_size),
    }
    if plan.window:
        specs["order"] = line(page_size)
    if fine:
        specs["fine_keys"] = detail(0, plan.fine_rows, half)
        specs["fine_values"] = detail(1, half, plan.fine_rows)
    pools = [refs[name] for name in specs]
    return _pipeline(step, pages, list(specs.values()), pools, state, plan.stages)


def _raw_pages(
    refs: Refs, plan: Plan, here: Place, state: State, first: jax.Array, pages: jax.Array
) -> State:
    """The loop over raw pages, by blocks of `ROWS` tokens."""
    dim, columns, blocks_of_page = 2 * plan.half, plan.columns, plan.page_size // ROWS
    lhs, rhs, acc = (make(plan.exact) for make in (left, right, result))
    shape = (ROWS, columns)
    q = load(refs["q"].at[here.row, here.head].T, rhs)

    def step(index: tuple[jax.Array], keys: Any, values: Any, carry: State) -> State:
        top, total, out = carry
        i = first + lax.div(index[0], blocks_of_page)
        start = lax.rem(index[0], blocks_of_page) * ROWS
        token0 = refs["raw_index"][here.row, i] * plan.page_size + start
        length = refs["length"][here.row]
        s = _mma(plan, zeros(shape), load(keys, lhs), q)
        s = _capped(s * plan.scale, plan)
        token = token0 + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=acc)
        # What is not written yet may hold NaN.
        mask = (token < length) & (token <= along_columns(here.position, shape))
        if plan.window:
            mask = mask & _in_window(refs, token, here)
        s = jnp.where(mask, s, MASKED)
        if plan.mass:
            column = refs["raw_column"][here.row, i]
            there = refs["logits"].at[here.row, here.head, column, pl.ds(start, ROWS)]
            plgpu.store(there, s, optimized=False)
        top, shrink, p = _weights(s, mask, top)
        mass = jnp.sum(p, axis=0)
        p = turned(refs["exact_weights"], p.astype(plan.exact))
        halves = []
        for side, x in enumerate(out):
            value = load(values.at[:, pl.ds(side * plan.half, plan.half)].T, lhs)
            there = token0 + plgpu.broadcasted_iota(jnp.int32, value.shape, 1, layout=lhs)
            value = jnp.where(there < length, value, jnp.zeros((), plan.exact))  # 0 * NaN is NaN
            halves.append(_mma(plan, x * along_columns(shrink, x.shape), value, p))
        return top, total * shrink + mass, tuple(halves)

    def plane(kind: int) -> plgpu.BlockSpec:
        def index(i: jax.Array) -> tuple[Any, ...]:
            page = refs["raw_ids"][here.row, first + lax.div(i, blocks_of_page)]
            page = here.layer * plan.raw_pages + page
            return (page * 2 + kind) * plan.heads + here.head, lax.rem(i, blocks_of_page), 0

        return block((ROWS, dim), index, jnp.dtype(plan.exact).itemsize)

    blocks = pages * blocks_of_page
    pools = [refs["raw"]] * 2
    return _pipeline(step, blocks, [plane(0), plane(1)], pools, state, plan.raw_stages)


def _pipeline(
    step: Callable[..., State],
    steps: jax.Array,
    specs: Sequence[plgpu.BlockSpec],
    pools: Sequence[Any],
    state: State,
    stages: int,
) -> State:
    """Runs `step` so many times with the blocks that it reads, `stages` of them on their way."""
    run = plgpu.emit_pipeline(
        step, grid=(steps,), in_specs=specs, max_concurrent_steps=stages, init_carry=state
    )
    return run(*pools)


def _mma(plan: Plan, acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """acc + a b. The interpreter knows no `mma`."""
    if plan.interpret:
        return acc + lax.dot(a, b, preferred_element_type=jnp.float32)
    return plgpu.mma(acc, a, b)


def _weights(
    s: jax.Array, mask: jax.Array | None, before: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """New greatest logits, what earlier sums shrink by, and weights of the tokens, lifted."""
    if mask is not None:
        s = jnp.where(mask, s, MASKED)
    top = jnp.maximum(before, jnp.max(s, axis=0))
    p = jnp.exp2(s - along_columns(top - LIFT, s.shape))
    if mask is not None:
        p = jnp.where(mask, p, 0.0)
    return top, jnp.exp2(before - top), p


def _capped(s: jax.Array, plan: Plan) -> jax.Array:
    """`cap * tanh(s / cap)`, by exponentials of powers of two."""
    if plan.cap is None:
        return s
    double = jnp.exp2(s * (2.0 * 1.4426950408889634 / plan.cap))
    return plan.cap * (1.0 - 2.0 / (1.0 + double))


def _in_window(refs: Refs, token: jax.Array, here: Place) -> jax.Array:
    """bool[tokens, columns] of tokens i32[tokens, columns]."""
    span = refs["span"][0]
    return (span <= 0) | (along_columns(here.position, token.shape) - token < span)
