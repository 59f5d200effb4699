"""`seal_page` on Pallas's Triton route: one program seals one head of one layer of one page.

The tokens are put in order as they are loaded: rows of the raw page are gathered, a row being
contiguous, so that what is stored is contiguous too. A program goes over its channels in pieces of
`channels` in either half of the vector (whose codes share bytes). Keys have one scale per channel,
so that a piece is coded when it is loaded; values have one per token, so that all pieces are looked
at before the first is coded, and read again, from a cache: the device's memory is read once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvcompress_jax.kernels import embedded
from kvcompress_jax.kernels.pools import CodePools, check_addressable
from kvcompress_jax.kernels.tuning import Tuning, find_tuning

RANKED = 16  # tokens whose ranks are found at a time


def seal_page_triton(
    raw: jax.Array,
    pools: CodePools,
    *,
    source: jax.Array,
    target: jax.Array,
    chunks: jax.Array,
    count: jax.Array,
    exact: jax.Array,
    worth: jax.Array | None,
    feedback: jax.Array | None = None,
    pairs: int = 0,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[CodePools, jax.Array]:
    """See `kvcompress_jax.kernels.seal_page.seal_page`.

    Args:
      pairs: columns of a block of `feedback`, a power of two.
      tuning: num_warps, num_stages, and `channels`: of half a vector that are coded at a time, a
        power of two that divides dim/2. None: what is known to suit the shape and the device.
      interpret: run it in JAX on any device.
    """
    layers, raw_pages, _, heads, page_size, dim = raw.shape
    check_addressable(raw=raw, base=pools.base, fine=pools.fine)
    if tuning is None:
        shape = f"{page_size}x{dim}"
        tuning = find_tuning("seal_page", shape) if feedback is None else fed_tuning(page_size)
    channels = tuning["channels"]
    if channels & (channels - 1) or (dim // 2) % channels:
        raise NotImplementedError(
            f"channels: expected a power of two that divides {dim // 2} (dim/2), got {channels}"
        )
    rows = pools.fine_rows
    if pools.refined_slots > rows and (rows & (rows - 1) or page_size % rows):
        raise NotImplementedError(
            f"fine_rows: expected a power of two where two slots share a row, got {rows}"
        )
    n = source.shape[0]
    flat = raw.reshape(layers, raw_pages, 2, heads, page_size * dim)
    tables = (source, target, chunks, count.reshape(1), exact)
    inputs = (flat, *tables, *(x for x in (worth, feedback) if x is not None))
    names = [name for name in _POOLS if name != "fine" or pools.fine_rows]
    outputs = tuple(getattr(pools, name) for name in names)
    somewhere = pl.BlockSpec(memory_space=pl.ANY)
    *written, bad = pl.pallas_call(
        functools.partial(
            _kernel,
            ordered=worth is not None,
            rank=0 if feedback is None else feedback.shape[4],
            pairs=pairs,
            dim=dim,
            page_size=page_size,
            fine_rows=pools.fine_rows,
            refined_slots=pools.refined_slots,
            cells=pools.cells,
            channels=channels,
        ),
        name="seal_page",
        grid=(n, layers, heads),
        in_specs=[somewhere] * (len(inputs) + len(outputs)),
        out_specs=[somewhere] * (len(outputs) + 1),
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs),
            jax.ShapeDtypeStruct((n, layers, heads), jnp.int32),
        ],
        input_output_aliases={len(inputs) + i: i for i in range(len(outputs))},
        compiler_params=plt.CompilerParams(
            num_warps=tuning["num_warps"], num_stages=tuning["num_stages"]
        ),
        interpret=interpret,
    )(*inputs, *outputs)
    real = jnp.arange(n, dtype=jnp.int32) < count
    finite = jnp.all(bad == 0, axis=(1, 2)) & real
    return dataclasses.replace(pools, **dict(zip(names, written, strict=True))), finite


def fed_tuning(page_size: int) -> Tuning:
    """Settings with feedback, which needs registers for all that is fed: four numbers of an array
    in each thread, two with large pages, are what compiles without a spill."""
    return {
        "num_warps": page_size // 16,
        "num_stages": 1,
        "channels": 8 if page_size < 256 else 4,
    }


_POOLS = ("base", "key_step", "key_zero", "value_step", "value_zero", "order", "fine")


def _kernel(  # type: ignore[no-untyped-def]
    *refs, ordered, rank, pairs, dim, page_size, fine_rows, refined_slots, cells, channels
):
    raw, source, target, chunks, count, exact = refs[:6]
    worth = refs[6] if ordered else None
    feedback = refs[6 + ordered] if rank else None
    written = refs[-8:] if fine_rows else (*refs[-7:-1], None, refs[-1])
    base, key_step, key_zero, value_step, value_zero, order_pool, fine, bad = written
    i, layer, head = (pl.program_id(axis) for axis in range(3))
    half, pieces = dim // 2, dim // 2 // channels

    @pl.when(i < count[0])
    def _():
        page, into, chunk = source[i], target[i], chunks[i, layer]
        slot = lax.iota(jnp.int32, page_size)
        order = slot if worth is None else _order(worth, i, layer, head, page_size)
        order_pool[layer, into, head, :] = order.astype(jnp.uint8)
        counted = order >= exact[i]
        refined = (slot < refined_slots) & (chunk >= 0)
        stored = jnp.where(refined, jnp.float32(cells), jnp.float32(1))[:, None]
        column = lax.iota(jnp.int32, channels)

        def load(kind, piece):
            """Both halves of a piece in slot order, f32[page_size, channels] each."""
            start = order[:, None] * dim + (piece * channels + column)[None, :]
            low, high = (raw[layer, page, kind, head, start + j * half] for j in range(2))
            return low.astype(jnp.float32), high.astype(jnp.float32)

        def store(kind, piece, low, high):
            """Codes of both halves, i32[page_size, channels] each, to the planes."""
            planes = zip(embedded.split(low), embedded.split(high), strict=True)
            for plane, codes in enumerate(planes):
                if plane == 1 and fine is None:
                    continue
                packed = embedded.pack(*codes)
                row, there = slot, refined
                if (
                    plane == 1 and refined_slots > fine_rows
                ):  # two slots to a row, whose bits do not overlap
                    pair = packed.astype(jnp.int32).reshape(-1, fine_rows, channels)
                    part = lax.broadcasted_iota(jnp.int32, pair.shape, 0)
                    if refined_slots < page_size:  # nor are the others refined
                        pair = jnp.where(part < 2, pair, 0)
                    packed = jnp.sum(jnp.where(part == 0, pair >> 2, pair), axis=0)
                    packed = packed.astype(jnp.uint8)
                    row = lax.iota(jnp.int32, fine_rows)
                    there = (row >= 0) & (chunk >= 0)
                channel = piece * channels + column
                rows = page_size if plane == 0 else fine_rows
                if kind == 0:
                    place, mask = row[:, None] * half + channel[None, :], there[:, None]
                else:
                    packed = packed.T
                    place, mask = channel[:, None] * rows + row[None, :], there[None, :]
                if plane == 0:
                    base[layer, into, kind, head, place] = packed
                else:
                    mask = jnp.broadcast_to(mask, packed.shape)
                    plt.store(fine.at[chunk, kind, head, place], packed, mask=mask)

        def keys(turn, state):
            bad, debts = state
            piece = pieces - 1 - turn  # errors are fed from the last channels to the first
            numbers, scales, place = load(0, piece), [], piece * channels
            for j, x in enumerate(numbers):
                lo = jnp.min(jnp.where(counted[:, None], x, jnp.inf), axis=0)
                hi = jnp.max(jnp.where(counted[:, None], x, -jnp.inf), axis=0)
                step, zero = embedded.fit(lo, hi)
                channel = pl.ds(place + j * half, channels)
                key_step[layer, into, head, channel] = step
                key_zero[layer, into, head, channel] = zero
                scales.append((step[None, :], zero[None, :]))
                bad = bad + _not_finite(x)
            if feedback is None:
                codes = [
                    embedded.encode(x, *s, stored) for x, s in zip(numbers, scales, strict=True)
                ]
            else:
                here = [
                    [
                        [
                            feedback[i, layer, head, kind, r, pl.ds(place + j * half, channels)]
                            for r in range(rank)
                        ]
                        for j in range(2)
                    ]
                    for kind in range(2)
                ]
                codes, debts = _feed(numbers, scales, debts, stored, here, pairs)
            store(0, piece, *codes)
            return bad, debts

        def look(piece, state):
            lo, hi, bad = state
            for x in load(1, piece):
                lo = jnp.minimum(lo, jnp.min(x, axis=1))
                hi = jnp.maximum(hi, jnp.max(x, axis=1))
                bad = bad + _not_finite(x)
            return lo, hi, bad

        ends = jnp.full((page_size,), jnp.inf, jnp.float32)
        debts = tuple(jnp.zeros((page_size,), jnp.float32) for _ in range(rank))
        nothing = jnp.zeros((page_size,), jnp.int32)
        found, _ = lax.fori_loop(0, pieces, keys, (nothing, debts))
        lo, hi, found = lax.fori_loop(0, pieces, look, (ends, -ends, found))
        bad[i, layer, head] = jnp.sum(found)
        step, zero = embedded.fit(lo, hi)
        value_step[layer, into, head, :] = step
        value_zero[layer, into, head, :] = zero

        def values(piece, carry):
            scale = step[:, None], zero[:, None]
            codes = (embedded.encode(x, *scale, stored) for x in load(1, piece))
            store(1, piece, *codes)
            return carry

        lax.fori_loop(0, pieces, values, 0)


def _feed(numbers, scales, debts, cells, feedback, pairs):  # type: ignore[no-untyped-def]
    """Codes of a piece, block after block, so that a block undoes what the errors of those before
    did; see `embedded.fed`.

    Args:
      numbers: both halves, f32[page_size, channels] each.
      scales: of both halves, step and zero [1, channels] each.
      debts: f32[page_size] for each direction: what earlier errors add up to.
      cells: f32[page_size, 1], of each slot.
      feedback: carry and answer, of both halves, of each direction, f32[channels].
      pairs: columns of a block.
    """
    carry, answer = feedback
    channels = numbers[0].shape[1]
    column = lax.iota(jnp.int32, channels)

    def body(turn, state):
        codes, debts = state
        block = channels // pairs - 1 - turn
        inside = (column // pairs == block)[None, :]
        after, owed = [], list(debts)
        for j in range(2):
            new, error = embedded.fed(
                numbers[j],
                scales[j],
                [(debt[:, None], a[None, :]) for debt, a in zip(debts, answer[j], strict=True)],
                cells,
            )
            error = jnp.where(inside, error, 0.0)
            owed = [
                debt + jnp.sum(error * c[None, :], axis=1)
                for debt, c in zip(owed, carry[j], strict=True)
            ]
            after.append(jnp.where(inside, new, codes[j]))
        return tuple(after), tuple(owed)

    nothing = jnp.zeros(numbers[0].shape, jnp.int32)
    return lax.fori_loop(0, channels // pairs, body, ((nothing, nothing), debts))


def _order(worth, i, layer, head, page_size):  # type: ignore[no-untyped-def]
    """i32[page_size]: the token of each slot; the worthiest first, of equals the earlier one, NaN
    last. A token's rank is the number of tokens that come before it."""
    slot = lax.iota(jnp.int32, page_size)
    other = _ranked(worth[i, layer, head, :])

    def body(block, order):
        token = block * RANKED + lax.iota(jnp.int32, RANKED)
        mine = _ranked(worth[i, layer, head, pl.ds(block * RANKED, RANKED)])[None, :]
        earlier = slot[:, None] < token[None, :]
        before = (other[:, None] > mine) | ((other[:, None] == mine) & earlier)
        rank = jnp.sum(before.astype(jnp.int32), axis=0)
        here = rank[None, :] == slot[:, None]
        return order + jnp.sum(jnp.where(here, token[None, :], 0), axis=1)

    return lax.fori_loop(0, page_size // RANKED, body, jnp.zeros((page_size,), jnp.int32))


def _ranked(worth: jax.Array) -> jax.Array:
    return jnp.where(worth != worth, -jnp.inf, worth)


def _not_finite(x: jax.Array) -> jax.Array:
    """i32[page_size]: how many of f32[page_size, channels] are not finite; NaN compares False."""
    return jnp.sum(jnp.where(jnp.abs(x) < jnp.inf, 0, 1).astype(jnp.int32), axis=1)
