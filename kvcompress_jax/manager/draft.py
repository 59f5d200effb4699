"""A plan in the making."""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Sized
from collections.abc import Sequence as ListOf

import numpy as np

from kvcompress_jax.manager.page import NONE
from kvcompress_jax.paged.layout import CacheLayout
from kvcompress_jax.paged.plan import FineUpload, Plan, RawCopy, Retabling
from kvcompress_jax.paged.seal import Sealing

# Entries of each part of a plan: every plan has the same shapes, so that one program serves all.
ENTRIES = 16
UPLOADS = 4


@dataclasses.dataclass
class Draft:
    """Lists that grow while the manager decides; `build` turns them into fixed-size arrays."""

    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # source, target
    tables: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # page: chunks
    uploads: list[tuple[tuple[int, ...], np.ndarray]] = dataclasses.field(default_factory=list)
    # raw, sealed, chunks, position of the first token, sink
    seals: list[tuple[int, int, tuple[int, ...], int, int]] = dataclasses.field(
        default_factory=list
    )
    shadows: list[int] | None = None  # of each seal, with telemetry

    def build(self, layout: CacheLayout) -> Plan | None:
        """The plan, or None when there is nothing in it."""
        if not (self.copies or self.tables or self.seals):
            return None
        return Plan(
            copies=RawCopy(
                source=_padded([s for s, _ in self.copies]),
                target=_padded([t for _, t in self.copies]),
                count=_count(self.copies),
            )
            if self.copies
            else None,
            uploads=self._uploads(layout) if self.uploads else None,
            tables=Retabling(
                page=_padded(list(self.tables)),
                chunks=_chunks(self.tables.values(), layout.layers),
                count=_count(self.tables),
            )
            if self.tables
            else None,
            seals=self._sealing(layout) if self.seals else None,
        )

    def _sealing(self, layout: CacheLayout) -> Sealing:
        raw, page, chunks, first, sink = zip(*self.seals, strict=True)
        each = _blank(4, ENTRIES).copy()
        each[:, : len(raw)] = (raw, page, first, sink)
        return Sealing(
            raw=each[0],
            page=each[1],
            chunks=_chunks(chunks, layout.layers),
            first=each[2],
            sink=each[3],
            count=_count(self.seals),
            shadow=None if self.shadows is None else _padded(self.shadows),
        )

    def _uploads(self, layout: CacheLayout) -> FineUpload:
        shape = (2, layout.kv_heads, layout.fine_rows * layout.head_dim // 2)
        size = UPLOADS * layout.layers
        chunk, fine, n = np.zeros(size, np.int32), np.zeros((size, *shape), np.uint8), 0
        for chunks, planes in self.uploads:
            for layer, i in enumerate(chunks):
                if i != NONE:
                    chunk[n], fine[n], n = i, planes[layer], n + 1
        return FineUpload(chunk=chunk, fine=fine, count=np.int32(n))


def _padded(entries: ListOf[int]) -> np.ndarray:
    out = _blank(ENTRIES).copy()
    out[: len(entries)] = entries
    return out


def _chunks(entries: Collection[ListOf[int]], layers: int) -> np.ndarray:
    out = _blank(ENTRIES, layers).copy()
    flat, size = itertools.chain.from_iterable(entries), len(entries) * layers
    out.reshape(-1)[:size] = np.fromiter(flat, np.int32, size)
    return out


@functools.cache
def _blank(*shape: int) -> np.ndarray:
    return np.full(shape, NONE, np.int32)


def _count(entries: Sized) -> np.int32:
    return np.int32(len(entries))
