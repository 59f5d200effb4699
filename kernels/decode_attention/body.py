"""Attention over pages of all levels on Pallas's Triton route: one launch, one online softmax.

A program takes one KV head of one sequence, a tile of its queries (the query heads that share the
KV head side by side, so that tensor cores have columns to work on), and a share of its pages. Per
page, with codes C, steps s and zero points z:

    logits   Sᵀ[page_size, n] = C_K · (s_K q) + z_K · (s_K q)     keys per channel: s_K into q
    weights  P = exp2(Sᵀ - top)
    output   Oᵀ[dim, n] += C_Vᵀ · (s_V P) + z_V · (s_V P)         values per token: s_V into P

so that codes are multiplied as they are unpacked, plus a constant that leaves with the zero points
(`unpack.py`). Pages of one level are one loop. Shares are merged by their log-sum-exp
(`merge_kernel.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvcompress_jax.kernels import embedded
from kvcompress_jax.kernels.decode_attention.columns import (
    Columns,
    along_channels,
    columns_of,
)
from kvcompress_jax.kernels.decode_attention.inputs import LIFT, LN2, MASKED
from kvcompress_jax.kernels.decode_attention.unpack import (
    ABSENT_FINE_OFFSET,
    FINE_OFFSET,
    HIGH_OFFSET,
    LOW_OFFSET,
    unpack,
    unpack_fine,
)

SINK_ROWS = 16  # the fewest rows of a tensor-core product

Refs = Mapping[str, Any]
# Greatest logit so far, sum of the weights, and unnormalised output by pieces of channels.
State = tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel is compiled for."""

    page_size: int
    half: int  # of dim
    fine_rows: int
    refined_slots: int  # more than fine_rows where two slots share a row
    sink_tokens: int
    queries: int
    group: int  # query heads of a KV head
    columns: int  # queries times query heads of a tile
    splits: int
    scale: float  # of logits, log2(e) included
    cap: float | None  # soft cap, in the same units
    window: bool
    mass: bool
    sealed: bool  # whether there are sealed pages at all
    interpret: bool
    widest: int  # channels of a piece, at most

    @property
    def tiles(self) -> int:
        """Of the queries of a sequence and KV head."""
        return -(-self.queries * self.group // self.columns)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Start and width of powers of two that make up half a vector."""
        found, start = [], 0
        while start < self.half:
            width = min(self.widest, 1 << ((self.half - start).bit_length() - 1))
            found.append((start, width))
            start += width
        return found

    @property
    def channels(self) -> list[tuple[int, int]]:
        """The pieces of the low half of a vector and of the high one."""
        return [(side * self.half + start, w) for side in (0, 1) for start, w in self.pieces]


def attention_kernel(refs: Refs, plan: Plan) -> None:
    """The share of one program: refs by name, see `triton.py`."""
    split, place, row = (pl.program_id(axis) for axis in range(3))
    head, tile = lax.div(place, plan.tiles), lax.rem(place, plan.tiles)
    columns = columns_of(
        tile * plan.columns, plan.columns, head, queries=plan.queries, group=plan.group
    )
    layer = refs["layer"][0]
    position = refs["length"][row] - refs["query_lengths"][row] + columns.query
    q = [
        plt.load(columns.at(refs["q"], row, start + lax.iota(jnp.int32, width)))
        for start, width in plan.channels
    ]

    def share(count: jax.Array) -> tuple[jax.Array, jax.Array]:
        return count * split // plan.splits, count * (split + 1) // plan.splits

    state: State = (
        jnp.full((plan.columns,), MASKED, jnp.float32),
        jnp.zeros((plan.columns,), jnp.float32),
        tuple(jnp.zeros((width, plan.columns), jnp.float32) for _, width in plan.channels),
    )
    where = (row, layer, head, pl.ds(tile * plan.columns, plan.columns))
    if plan.sealed:
        q32 = [x.astype(jnp.float32) * plan.scale for x in q]
        refined = refs["refined"][row] if plan.fine_rows else jnp.int32(0)
        for fine, begin, count in ((True, 0, refined), (False, refined, refs["plain"][row])):
            if fine and not plan.fine_rows:
                continue
            first, last = share(count)
            body = _sealed_page(refs, plan, q32, position, where, fine=fine)
            state = lax.fori_loop(begin + first, begin + last, body, state)
    q = [x.astype(refs["raw"].dtype) for x in q]
    if plan.sink_tokens:
        state = _sinks(refs, plan, q, position, where[:3], state, split)
    first, last = share(refs["raw_count"][row])
    body = _raw_page(refs, plan, q, position, where)
    _finish(refs, plan, columns, where, split, lax.fori_loop(first, last, body, state))


def _finish(
    refs: Refs,
    plan: Plan,
    columns: Columns,
    where: tuple[Any, ...],
    split: jax.Array,
    state: State,
) -> None:
    """Writes the result, or the share of it that `merge_kernel.py` takes."""
    row, _, head, _ = where
    top, total, out = state
    some = total != 0  # NaN is handed on
    if plan.splits == 1:
        some = some & (columns.query < refs["query_lengths"][row])
    divisor = jnp.where(some, total, 1.0)
    lse = top - LIFT + jnp.log2(divisor)
    for (start, width), x in zip(plan.channels, out, strict=True):
        mean = jnp.where(some[None, :], x / divisor[None, :], 0.0).T.astype(refs["out"].dtype)
        channel = start + lax.iota(jnp.int32, width)
        there = columns.at(refs["out"], row, channel)
        if plan.splits > 1:
            there = refs["out"].at[row, head, split, *along_channels(channel, columns.column)]
        plt.store(there, mean)
    if plan.splits > 1:
        plt.store(refs["lse"].at[row, head, split, columns.column], jnp.where(some, lse, MASKED))
    else:
        plt.store(columns.at(refs["lse"], row), jnp.where(some, lse * LN2, -jnp.inf))


def _sealed_page(
    refs: Refs,
    plan: Plan,
    q: list[jax.Array],
    position: jax.Array,
    where: tuple[Any, ...],
    *,
    fine: bool,
) -> Callable[[jax.Array, State], State]:
    """A step of the loop over pages of codes: with a fine plane, or without."""
    row, layer, head, tile = where
    slot = lax.iota(jnp.int32, plan.page_size)
    refined = slot < plan.refined_slots
    # Of 16 times the position where there is a fine plane: for each slot.
    offset = jnp.where(refined, FINE_OFFSET, ABSENT_FINE_OFFSET)
    all_refined = plan.refined_slots == plan.page_size

    def planes(kind: int, page: jax.Array, chunk: jax.Array, start: int, width: int) -> Any:
        """Codes of some channels of both halves: keys f16[page_size, width], values transposed."""
        channel = start + lax.iota(jnp.int32, width)

        def place(rows: int) -> jax.Array:
            """Where the bytes lie in a plane with so many rows."""
            row = lax.rem(slot, rows) if rows < plan.refined_slots else slot
            if kind == 0:
                return row[:, None] * plan.half + channel[None, :]
            return channel[:, None] * rows + row[None, :]

        base = refs["base"][layer, page, kind, head, place(plan.page_size)]
        if not fine:
            return unpack(base, interpret=plan.interpret)
        at = place(plan.fine_rows)
        mask = None
        if not all_refined:
            mask = jnp.broadcast_to(refined[:, None] if kind == 0 else refined[None, :], at.shape)
        there = refs["fine"].at[chunk, kind, head, at]
        detail = plt.load(there, mask=mask, other=None if mask is None else jnp.uint8(0))
        if plan.refined_slots > plan.fine_rows:
            own = slot[:, None] if kind == 0 else slot[None, :]
            detail = embedded.of_slot(detail, own, plan.fine_rows)
        return unpack_fine(base, detail, interpret=plan.interpret)

    def fold(page: jax.Array) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """Key steps into the queries: f16 pieces; what the zero points add to the logits; and,
        where offsets differ between slots, what one unit of offset takes."""
        folded: list[jax.Array] = []
        moves: dict[int, jax.Array] = {}  # by width: one sum over all pieces of it
        units: dict[int, jax.Array] = {}
        for i, (start, width) in enumerate(plan.channels):
            there = (layer, page, head, pl.ds(start, width))
            step = refs["key_step"][there].astype(jnp.float32)
            zero = refs["key_zero"][there].astype(jnp.float32)
            exact = q[i] * step[None, :]
            rounded = (exact / 16 if fine else exact).astype(jnp.float16)
            folded.append(rounded)
            back = rounded.astype(jnp.float32)
            moved = exact * zero[None, :]
            if not fine:
                moved -= (LOW_OFFSET if start < plan.half else HIGH_OFFSET) * back
            elif all_refined:
                moved -= FINE_OFFSET * back
            else:
                units[width] = units[width] + back if width in units else back
            moves[width] = moves[width] + moved if width in moves else moved
        nothing = jnp.zeros((plan.columns,), jnp.float32)
        shift = sum((jnp.sum(x, axis=1) for x in moves.values()), nothing)
        return folded, shift, sum((jnp.sum(x, axis=1) for x in units.values()), nothing)

    def body(i: jax.Array, state: State) -> State:
        page = refs["ids"][row, i]
        chunk = refs["chunk"][row, i] if fine else page
        folded, shift, unit = fold(page)
        s = jnp.zeros((plan.page_size, plan.columns), jnp.float32)
        for j, (start, width) in enumerate(plan.pieces):
            low, high = planes(0, page, chunk, start, width)
            s += plt.dot(low, folded[j].T)
            s += plt.dot(high, folded[len(plan.pieces) + j].T)
        s += shift[None, :]
        if fine and not all_refined:
            s -= offset[:, None] * unit[None, :]
        s = _capped(s, plan)
        mask = None
        if plan.sink_tokens:  # the first slots of the first page are kept exactly elsewhere
            exact = (refs["index"][row, i] == 0) & (refs["sink"][row] >= 0)
            coded = slot >= exact.astype(jnp.int32) * plan.sink_tokens
            mask = jnp.broadcast_to(coded[:, None], s.shape)
        if plan.window:
            order = refs["order"][layer, page, head, pl.ds(0, plan.page_size)].astype(jnp.int32)
            seen = _in_window(refs, refs["index"][row, i] * plan.page_size + order, position)
            mask = seen if mask is None else mask & seen
        top, shrink, p = _weights(s, mask, state)
        mass = jnp.sum(p, axis=0)
        if plan.mass:
            lse = jnp.where(mass > 0, top - LIFT + jnp.log2(jnp.where(mass > 0, mass, 1.0)), MASKED)
            refs["page_lse"][row, head, refs["column"][row, i], tile] = lse
        there = (layer, page, head, pl.ds(0, plan.page_size))
        step = refs["value_step"][there].astype(jnp.float32)
        zero = refs["value_zero"][there].astype(jnp.float32)
        p = (p * (step / 16 if fine else step)[:, None]).astype(jnp.float16)
        back = p.astype(jnp.float32)
        if fine:  # both halves have the same offset
            moved = jnp.sum(back * (16 * zero - offset)[:, None], axis=0)
            shifts = (moved, moved)
        else:
            total, moved = jnp.sum(back, axis=0), jnp.sum(back * zero[:, None], axis=0)
            shifts = (moved - LOW_OFFSET * total, moved - HIGH_OFFSET * total)
        out = list(state[2])
        for j, (start, width) in enumerate(plan.pieces):
            pair = planes(1, page, chunk, start, width)
            for side in (0, 1):
                k = side * len(plan.pieces) + j
                carried = out[k] * shrink[None, :] + shifts[side][None, :]
                out[k] = carried + plt.dot(pair[side], p)
        return top, state[1] * shrink + mass, tuple(out)

    return body


def _raw_page(
    refs: Refs, plan: Plan, q: list[jax.Array], position: jax.Array, where: tuple[Any, ...]
) -> Callable[[jax.Array, State], State]:
    """A step of the loop over raw pages."""
    row, layer, head, tile = where
    slot = lax.iota(jnp.int32, plan.page_size)
    rows = pl.ds(0, plan.page_size)

    def body(i: jax.Array, state: State) -> State:
        page = refs["raw_ids"][row, i]
        token = refs["raw_index"][row, i] * plan.page_size + slot
        # What is not written yet may hold NaN, and 0 * NaN is NaN.
        written = token < refs["length"][row]

        def read(kind: int, start: int, width: int) -> jax.Array:
            x = refs["raw"][layer, page, kind, head, rows, pl.ds(start, width)]
            return jnp.where(written[:, None], x, jnp.zeros_like(x))

        mask = written[:, None] & (token[:, None] <= position[None, :])
        if plan.window:
            mask = mask & _in_window(refs, token[:, None], position)
        s, state = _exact(plan, q, read, mask, state)
        if plan.mass:
            column = refs["raw_column"][row, i]
            refs["logits"][row, head, column, rows, tile] = jnp.where(mask, s, MASKED)
        return state

    return body


def _sinks(
    refs: Refs,
    plan: Plan,
    q: list[jax.Array],
    position: jax.Array,
    where: tuple[Any, ...],
    state: State,
    split: jax.Array,
) -> State:
    """The exact first tokens, which one of the programs of a sequence takes."""
    row, layer, head = where
    sink = refs["sink"][row]
    token = lax.iota(jnp.int32, SINK_ROWS)
    kept = token < plan.sink_tokens
    kept = kept & (token < refs["length"][row]) & (sink >= 0) & (split == 0)

    def read(kind: int, start: int, width: int) -> jax.Array:
        channel = jnp.broadcast_to((start + lax.iota(jnp.int32, width))[None, :], (16, width))
        row_of = jnp.broadcast_to(jnp.where(kept, token, 0)[:, None], channel.shape)
        there = refs["sinks"].at[layer, jnp.maximum(sink, 0), kind, head, row_of, channel]
        mask = jnp.broadcast_to(kept[:, None], channel.shape)
        return plt.load(there, mask=mask, other=jnp.zeros((), refs["sinks"].dtype))

    mask = kept[:, None] & (token[:, None] <= position[None, :])
    if plan.window:
        mask = mask & _in_window(refs, token[:, None], position)
    return _exact(plan, q, read, mask, state)[1]


def _exact(
    plan: Plan,
    q: list[jax.Array],
    read: Callable[[int, int, int], jax.Array],
    mask: jax.Array,
    state: State,
) -> tuple[jax.Array, State]:
    """Adds tokens whose keys and values are `read(kind, start, width)`, [tokens, width] each; also
    returns their logits."""
    s = jnp.zeros(mask.shape, jnp.float32)
    for j, (start, width) in enumerate(plan.channels):
        s += plt.dot(read(0, start, width), q[j].T)
    s = _capped(s * plan.scale, plan)
    top, shrink, p = _weights(s, mask, state)
    out = list(state[2])
    for j, (start, width) in enumerate(plan.channels):
        value = read(1, start, width)
        out[j] = out[j] * shrink[None, :] + plt.dot(value.T, p.astype(value.dtype))
    return s, (top, state[1] * shrink + jnp.sum(p, axis=0), tuple(out))


def _weights(
    s: jax.Array, mask: jax.Array | None, state: State
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """New greatest logits, what earlier sums shrink by, and weights of the tokens, lifted."""
    if mask is not None:
        s = jnp.where(mask, s, MASKED)
    top = jnp.maximum(state[0], jnp.max(s, axis=0))
    p = jnp.exp2(s - (top - LIFT)[None, :])
    if mask is not None:
        p = jnp.where(mask, p, 0.0)
    return top, jnp.exp2(state[0] - top), p


def _capped(s: jax.Array, plan: Plan) -> jax.Array:
    """`cap * tanh(s / cap)`, by exponentials of powers of two."""
    if plan.cap is None:
        return s
    double = jnp.exp2(s * (2.0 * 1.4426950408889634 / plan.cap))
    return plan.cap * (1.0 - 2.0 / (1.0 + double))


def _in_window(refs: Refs, token: jax.Array, position: jax.Array) -> jax.Array:
    """bool[tokens, columns], of tokens i32[tokens] or i32[tokens, 1]."""
    token = token if token.ndim == 2 else token[:, None]
    span = refs["span"][0]
    return (span <= 0) | (position[None, :] - token < span)
