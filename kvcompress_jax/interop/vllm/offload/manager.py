"""The scheduler's side of offloading: vLLM's own for host memory, and a folder below it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadKey,
    ReqContext,
    get_offload_block_hash,
)
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from kvcompress_jax.interop.vllm.offload.metrics import PREFIX
from kvcompress_jax.interop.vllm.offload.policy import ImportancePolicy

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )

    from kvcompress_jax.interop.vllm.offload.options import OffloadOptions
    from kvcompress_jax.interop.vllm.offload.slots import Slots
    from kvcompress_jax.storage import DiskTier

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class OffloadCounters:
    """Pages since the start."""

    hits: int = 0  # loaded to the device
    disk_hits: int = 0  # that came from the folder
    no_room: int = 0  # found in the folder when no slot could be had
    unfit: int = 0  # in the folder, of the right code and yet not of its shapes


class OffloadManager(CPUOffloadingManager):
    """Looks pages up in host memory, then in the folder, where all that is stored goes as well.

    Attributes:
      length_of: tokens of a request by its id; our scheduler says it.
    """

    def __init__(
        self,
        slots: Slots,
        tier: DiskTier | None,
        options: OffloadOptions,
        *,
        uncompressed_page_bytes: int,
        enable_events: bool,
    ) -> None:
        """Begins with empty slots, and with what is in the folder."""
        super().__init__(
            num_chunks=slots.count,
            cache_policy=options.eviction_policy,
            cache_policy_module_path=options.cache_policy_module_path,
            enable_events=enable_events,
        )
        self.slots, self.tier = slots, tier
        self.uncompressed_page_bytes = uncompressed_page_bytes
        self.length_of: Callable[[str], int] = _unknown_length
        self.counters = OffloadCounters()
        self._reported: dict[str, int] = {}
        # Found in this step, and not to be evicted by what is found after it.
        self._pinned: dict[OffloadKey, ReqContext] = {}

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """See `OffloadingManager`; does not wait for the disk."""
        end = req_context.get_offload_key_position(key)
        # vLLM computes a prompt's last token even if all are known, and writes it again: not into a
        # page that is sealed.
        if end is not None and end >= self.length_of(req_context.req_id):
            return LookupResult.MISS
        found = super().lookup(key, req_context)
        if self.tier is None:
            return found
        if found is LookupResult.MISS:
            found = self._bring(key, req_context, self.tier)
        if found is LookupResult.HIT and key not in self._pinned:
            super().prepare_load([key], req_context)
            self._pinned[key] = req_context
        return found

    def _bring(self, key: OffloadKey, req_context: ReqContext, tier: DiskTier) -> LookupResult:
        """From the folder to a slot."""
        page = tier.get(key)
        if page is None:
            return LookupResult.RETRY if key in tier else LookupResult.MISS
        output = super().prepare_store([key], req_context)
        if output is None or not output.keys_to_store:
            self.counters.no_room += 1
            return LookupResult.MISS
        assert isinstance(output.store_spec, BlockIDsLoadStoreSpec)
        try:
            self.slots.write(int(output.store_spec.block_ids[0]), page)
        except ValueError as e:
            logger.warning("%s: dropped, it does not fit: %s", key.hex(), e)
            self.counters.unfit += 1
            super().complete_store([key], req_context, success=False)
            tier.drop(key)
            return LookupResult.MISS
        super().complete_store([key], req_context)
        self._weigh(key, page["heat"])
        self.counters.disk_hits += 1
        return LookupResult.HIT

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        """See `OffloadingManager`."""
        self.counters.hits += len(keys)
        return super().prepare_load(keys, req_context)

    def on_schedule_end(self, context: object) -> None:
        """See `OffloadingManager`."""
        pinned, self._pinned = self._pinned, {}
        for key, req_context in pinned.items():
            super().complete_load([key], req_context)

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        """See `OffloadingManager`; what was stored goes to the folder as well."""
        new = [k for k in keys if (c := self._policy.get(k)) is not None and not c.is_ready]
        super().complete_store(keys, req_context, success)
        for key in new if success else ():
            chunk = self._policy.get(key)
            assert chunk is not None
            page = self.slots.read(chunk.chunk_id)
            self._weigh(key, page["heat"])
            if self.tier is not None and key not in self.tier:
                # Copies: the slot may be another page's before they are written.
                self.tier.put(
                    key,
                    {name: array.copy() for name, array in page.items()},
                    level=0 if "raw" in page else 1 if "fine" in page else 2,
                    tokens_hash=get_offload_block_hash(key),
                )

    def _weigh(self, key: OffloadKey, heat: np.ndarray) -> None:
        if isinstance(self._policy, ImportancePolicy):
            self._policy.weigh(key, float(heat[0]))

    def reset_cache(self) -> None:
        """See `OffloadingManager`; empties the folder too, for the weights may be others now."""
        self._pinned = {}
        super().reset_cache()
        if self.tier is not None:
            self.tier.clear()

    def get_stats(self) -> OffloadingConnectorStats:
        """See `OffloadingManager`; with ours."""
        stats = super().get_stats()
        resident = self._num_allocated_chunks - len(self._free_list)
        gauges = {
            "host_bytes": resident * self.slots.slot_bytes,
            "bytes_saved": resident * (self.uncompressed_page_bytes - self.slots.slot_bytes),
        }
        events = dataclasses.asdict(self.counters)
        if self.tier is not None:
            disk = self.tier.stats()
            gauges |= {"disk_bytes": disk.used_bytes, "disk_pages": disk.pages}
            for name in ("refused", "skipped", "damaged", "errors"):
                events[name] = getattr(disk, name)
        for name, value in gauges.items():
            stats.set_gauge(PREFIX + name, value)
        for name, value in events.items():
            stats.increase_counter(PREFIX + name, value - self._reported.get(name, 0))
        self._reported = events
        return stats

    def shutdown(self) -> None:
        """Writes what waits for the disk."""
        if self.tier is not None:
            self.tier.close()


def _unknown_length(request: str) -> int:
    raise RuntimeError(f"request {request}: expected our scheduler to say its length")
