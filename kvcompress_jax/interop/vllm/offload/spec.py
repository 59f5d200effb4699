"""What vLLM's OffloadingConnector loads."""

from typing import Any

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from kvcompress_jax.config import ConfigError
from kvcompress_jax.interop.vllm.offload.manager import OffloadManager
from kvcompress_jax.interop.vllm.offload.metrics import definitions
from kvcompress_jax.interop.vllm.offload.options import FINGERPRINT, read_options, region_path
from kvcompress_jax.interop.vllm.offload.pages import BlockPages, check_layers
from kvcompress_jax.interop.vllm.offload.slots import Slots
from kvcompress_jax.interop.vllm.offload.worker import OffloadWorker
from kvcompress_jax.storage import DiskTier, DiskTierError


class KVCompressOffloadingSpec(OffloadingSpec):
    """Compressed pages in host memory and in a folder; see `options` for its settings."""

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """vLLM's own for host memory, and ours."""
        return {**CPUOffloadingSpec.build_metric_definitions(extra_config), **definitions()}

    def __init__(self, config: OffloadingConfig) -> None:
        """Raises ConfigError for what cannot be offloaded."""
        super().__init__(config)
        self.options = read_options(config.extra_config)
        for name, expected, got in (
            ("KV cache groups", 1, len(config.groups)),
            ("blocks per offloaded chunk", 1, self.blocks_per_chunk),
            ("workers", 1, config.parallel.world_size),
        ):
            if expected != got:
                raise ConfigError(f"{name}: expected {expected} with KV offloading, got {got}")
        self._manager: OffloadManager | None = None
        self._worker: OffloadWorker | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """In the worker's process, where it makes the memory that both share."""
        if self._worker is None:
            from kvcompress_jax.interop.vllm.group import GROUPS

            (group,) = GROUPS
            (names,) = (g.layer_names for g in self.config.groups)
            check_layers(names, tensors := [t.tensor for t in kv_caches.tensors])
            for name, tensor in zip(names, tensors, strict=True):
                group.memory(name, tensor)
            pages = BlockPages(group.states, group.executor)
            slots = Slots.create(
                region_path(self.config.engine_id),
                budget_bytes=self.options.cpu_bytes_to_use,
                planes=pages.planes,
                about=f"{pages.code} {pages.uncompressed_bytes}",
            )
            self._worker = group.offload = OffloadWorker(pages, slots)
        return self._worker

    def get_manager(self) -> OffloadingManager:
        """In the scheduler's process, after the worker."""
        if self._manager is None:
            slots = Slots.open(region_path(self.config.engine_id))
            code, uncompressed = slots.about.split()
            self._manager = OffloadManager(
                slots,
                self._tier(code),
                self.options,
                uncompressed_page_bytes=int(uncompressed),
                enable_events=self.kv_events_config.enable_kv_cache_events,
            )
        return self._manager

    def _tier(self, code: str) -> DiskTier | None:
        if self.options.disk_path is None:
            return None
        try:
            return DiskTier(
                self.options.disk_path,
                self.options.disk_bytes,
                model=self.config.extra_config[FINGERPRINT],
                codec=code,
            )
        except DiskTierError as e:
            raise ConfigError(f"disk_path: {e}") from None
