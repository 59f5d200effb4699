"""The worker's side of offloading: blocks to slots and back, at once."""

import time
from collections.abc import Sequence

from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from kvcompress_jax.interop.vllm.offload.pages import BlockPages
from kvcompress_jax.interop.vllm.offload.slots import Slots


class OffloadWorker(OffloadingWorker):
    """Moves pages when it is told; what it did is reported at the next question.

    Attributes:
      stored: pages to the host so far.
      loaded: pages from the host so far.
    """

    def __init__(self, pages: BlockPages, slots: Slots) -> None:
        self.pages, self.slots = pages, slots
        self.stored = 0
        self.loaded = 0
        self._done: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """See `OffloadingWorker`."""
        start, size = time.perf_counter(), 0
        for block, slot in _pairs(src_spec, dst_spec):
            size += self.slots.write(slot, self.pages.take_out(block))
            self.stored += 1
        return self._end(job_id, size, start)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """See `OffloadingWorker`."""
        start, size = time.perf_counter(), 0
        (place,) = dst_spec.block_indices
        for i, (block, slot) in enumerate(_pairs(dst_spec, src_spec)):
            page = self.slots.read(slot)
            self.pages.put_in(block, place + i, page)
            size += sum(array.nbytes for array in page.values())
            self.loaded += 1
        return self._end(job_id, size, start)

    def _end(self, job_id: int, size: int, start: float) -> bool:
        seconds = time.perf_counter() - start
        self._done.append(TransferResult(job_id, True, transfer_size=size, transfer_time=seconds))
        return True

    def get_finished(self) -> list[TransferResult]:
        """See `OffloadingWorker`."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """See `OffloadingWorker`; nothing is under way."""


def _pairs(blocks: GPULoadStoreSpec, slots: LoadStoreSpec) -> Sequence[tuple[int, int]]:
    assert isinstance(slots, BlockIDsLoadStoreSpec)
    return list(zip(blocks.block_ids.tolist(), slots.block_ids.tolist(), strict=True))
