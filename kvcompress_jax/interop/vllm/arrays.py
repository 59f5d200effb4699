"""A step's index arrays, from the states of the blocks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from kvcompress_jax.interop.vllm.step import NONE, Decode, Prefill, RawUse, Seals
from kvcompress_jax.paged import PageTable

if TYPE_CHECKING:
    from kvcompress_jax.interop.vllm.blocks import BlockStates


@dataclasses.dataclass
class Row:
    """A sequence of the step."""

    first: int  # token of the batch
    count: int  # new tokens
    length: int  # tokens, the new ones included
    blocks: np.ndarray  # i64[pages]
    at_once: list[int] = dataclasses.field(default_factory=list)  # places sealed without raw page

    def begun(self, page_size: int) -> int:
        """The first place that the row begins."""
        return -(-(self.length - self.count) // page_size)

    def stored(self, page_size: int) -> list[int]:
        """Places that begin and need a raw page."""
        places = range(self.begun(page_size), len(self.blocks))
        return [i for i in places if i not in self.at_once]

    def blocks_of(self, places: list[int]) -> list[int]:
        return [int(self.blocks[i]) for i in places]


def seals_of(states: BlockStates, raw: list[int], blocks: list[int]) -> Seals:
    """Raw pages, and the blocks that they are coded into."""
    return Seals(
        raw=np.asarray(raw, np.int64),
        block=np.asarray(blocks, np.int64),
        chunk=states.chunk_of[blocks].astype(np.int64),
        sink=states.sink_of[blocks].astype(np.int64),
        first=states.first_of(blocks),
    )


def decode_of(states: BlockStates, rows: list[Row], columns: int) -> Decode | None:
    """The rows that add one token; None: there are none."""
    if not rows:
        return None
    size, padded = states.page_size, _power_of_two(len(rows))
    places = [np.flatnonzero(states.raw_of[row.blocks] != NONE) for row in rows]
    raw_columns = coarse(max(len(p) for p in places), 4)
    table = _table(states, rows, padded, columns, raw_columns)
    for r, (row, place) in enumerate(zip(rows, places, strict=True)):
        table.raw[r, : len(place)] = states.raw_of[row.blocks[place]]
        table.raw_index[r, : len(place)] = place
        table.raw_count[r] = len(place)
    page = np.asarray([states.raw_of[row.blocks[-1]] for row in rows], np.int64)
    offset = np.asarray([(row.length - 1) % size for row in rows], np.int64)
    return Decode(
        tokens=np.asarray([row.first for row in rows], np.int64),
        page=page,
        offset=offset,
        begun=page[offset == 0],
        table=table,
        query_lengths=(np.arange(padded) < len(rows)).astype(np.int32),
        use=RawUse(
            row=np.repeat(np.arange(len(rows)), [len(p) for p in places]),
            column=np.concatenate([np.arange(len(p)) for p in places]),
            page=np.concatenate(
                [states.raw_of[row.blocks[p]] for row, p in zip(rows, places, strict=True)]
            ).astype(np.int64),
            seen=np.concatenate([_seen(p, row, size) for row, p in zip(rows, places, strict=True)]),
        ),
    )


def prefill_of(states: BlockStates, row: Row, columns: int) -> Prefill:
    """A row that adds several tokens."""
    size, before = states.page_size, row.length - row.count
    begun = row.begun(size)
    old = np.flatnonzero(states.raw_of[row.blocks[:begun]] != NONE)
    new = np.arange(begun, len(row.blocks))
    place = np.concatenate([old, new])
    raw = states.raw_of[row.blocks[place]].astype(np.int64)
    unfinished = int(before % size > 0)
    changed = np.flatnonzero(raw != NONE)
    direct = np.flatnonzero(raw == NONE)
    return Prefill(
        first=row.first,
        count=row.count,
        length=row.length,
        start=(len(old) - unfinished) * size + before % size,
        index=place.astype(np.int32),
        old=raw[: len(old)],
        raw=raw,
        changed=changed[changed >= len(old) - unfinished],
        begun=raw[len(old) :][raw[len(old) :] != NONE],
        seen=_seen(place, row, size),
        table=_table(states, [row], 1, columns, 0),
        seals=seals_of(states, direct.tolist(), row.blocks[place[direct]].tolist()),
    )


def _table(
    states: BlockStates, rows: list[Row], padded: int, columns: int, raw_columns: int
) -> PageTable:
    """The sealed pages of rows; the raw part is zeros."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((padded, *shape), np.int32)

    sink = np.full(padded, NONE, np.int32)
    table = PageTable(
        sealed=zeros(columns),
        sealed_index=zeros(columns),
        sealed_count=zeros(),
        raw=zeros(raw_columns),
        raw_index=zeros(raw_columns),
        raw_count=zeros(),
        sink=sink,
        length=zeros(),
    )
    for r, row in enumerate(rows):
        place = np.flatnonzero(states.sealed[row.blocks])
        table.sealed[r, : len(place)] = row.blocks[place]
        table.sealed_index[r, : len(place)] = place
        table.sealed_count[r] = len(place)
        if states.sealed[row.blocks[0]]:
            sink[r] = states.sink_of[row.blocks[0]]
        table.length[r] = row.length
    return table


def _seen(places: np.ndarray, row: Row, size: int) -> np.ndarray:
    """f32[places, size]: how many of the row's new tokens could see each token."""
    token = places[:, None] * size + np.arange(size)
    first = row.length - row.count
    return np.clip(row.length - np.maximum(token, first), 0, None).astype(np.float32)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def coarse(n: int, least: int) -> int:
    """`least` times the smallest power of four that makes it at least n: few sizes to compile."""
    while least < n:
        least *= 4
    return least
