"""Pages of a preempted sequence: off the device and back, bit for bit."""

import dataclasses
from collections.abc import Sequence as ListOf
from typing import TypeVar

import jax
import numpy as np

from kvcompress_jax.manager.device import Device
from kvcompress_jax.manager.page import NONE, Page
from kvcompress_jax.manager.page_store import PageStore
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.transfer import PageIds, RawImage, SealedImage

_Tree = TypeVar("_Tree")


@dataclasses.dataclass(frozen=True)
class Swapped:
    """Pages in host memory, and what each had on the device."""

    raw: tuple[Page, ...]
    sealed: tuple[Page, ...]
    levels: tuple[int, ...]  # of the sealed ones
    chunks: tuple[tuple[int, ...], ...]  # of the sealed ones; only which layers had one matters
    heats: tuple[float, ...]  # of the sealed ones
    sinks: tuple[bool, ...]  # of the sealed ones: had a slot of exact first tokens
    images: tuple[RawImage, SealedImage]  # NumPy arrays, one row a page

    @property
    def nbytes(self) -> int:
        """Host memory that the pages take."""
        return sum(x.nbytes for x in jax.tree.leaves(self.images))

    def needs(self) -> tuple[int, int, int, int, int]:
        """What it takes to bring them back: rows, raw and sealed pages, fine chunks, sink slots."""
        chunks = sum(c != NONE for page in self.chunks for c in page)
        return 1, len(self.raw), len(self.sealed), chunks, sum(self.sinks)

    def back(
        self,
        device: Device,
        store: PageStore,
        cache: PagedCache,
        raw: ListOf[int],
        sealed: ListOf[int],
        chunks: ListOf[int],
        sinks: ListOf[int],
    ) -> PagedCache:
        """Writes the pages to new ids, as many as `needs` says; `cache` is donated."""
        for page, i in zip(self.raw, raw, strict=True):
            page.raw = i
        next_chunk, next_sink = iter(chunks), iter(sinks)
        for k, (page, i) in enumerate(zip(self.sealed, sealed, strict=True)):
            store.put_code(page, i, self.levels[k], self.heats[k])
            page.chunks = tuple(NONE if c == NONE else next(next_chunk) for c in self.chunks[k])
            page.sink = next(next_sink) if self.sinks[k] else NONE
        ids = _ids(self.raw, self.sealed, cache.layout.layers)
        raw_image, sealed_image = self.images
        return device.restore(cache, ids, (_pad_rows(raw_image), _pad_rows(sealed_image)))


def out(device: Device, store: PageStore, cache: PagedCache, pages: ListOf[Page]) -> Swapped:
    """Copies pages to host memory; waits for the device."""
    raw = tuple(p for p in pages if p.sealed == NONE)
    sealed = tuple(p for p in pages if p.sealed != NONE)
    images = jax.device_get(device.export(cache, _ids(raw, sealed, cache.layout.layers)))
    raw_image, sealed_image = images
    return Swapped(
        raw=raw,
        sealed=sealed,
        levels=tuple(p.level for p in sealed),
        chunks=tuple(p.chunks for p in sealed),
        heats=tuple(float(store.heat[p.sealed]) for p in sealed),
        sinks=tuple(p.sink != NONE for p in sealed),
        images=(_first_rows(raw_image, len(raw)), _first_rows(sealed_image, len(sealed))),
    )


def _ids(raw: ListOf[Page], sealed: ListOf[Page], layers: int) -> PageIds:
    def pad(ids: list[int]) -> np.ndarray:
        padded = np.full(_padded(len(ids)), NONE, np.int32)
        padded[: len(ids)] = ids
        return padded

    chunks = np.full((_padded(len(sealed)), layers), NONE, np.int32)
    for row, page in zip(chunks, sealed, strict=False):
        row[:] = page.chunks
    return PageIds(
        raw=pad([p.raw for p in raw]),
        sealed=pad([p.sealed for p in sealed]),
        chunks=chunks,
        sink=pad([p.sink for p in sealed]),
    )


def _first_rows(image: _Tree, rows: int) -> _Tree:
    """Copies, so that the memory of the padding goes."""
    return jax.tree.map(lambda x: x[:rows].copy(), image)


def _pad_rows(image: _Tree) -> _Tree:
    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, _padded(x.shape[0]) - x.shape[0])] + [(0, 0)] * (x.ndim - 1))

    return jax.tree.map(pad, image)


def _padded(n: int) -> int:
    """Powers of two, so that few programs are compiled."""
    return 1 << max(0, n - 1).bit_length()
