"""vLLM's scheduler with one more limit: every running sequence needs a raw page."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import AttentionSpec

from kvcompress_jax.interop.vllm.backend import dtype_name
from kvcompress_jax.interop.vllm.group import divide
from kvcompress_jax.interop.vllm.offload.manager import OffloadManager

logger = init_logger(__name__)


class CompressedScheduler(Scheduler):
    """Runs no more sequences at once than there are raw pages for their unfinished pages."""

    max_num_running_reqs: int
    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.connector, OffloadingConnector):
            manager = self.connector.scheduler.manager
            assert isinstance(manager, OffloadManager)
            manager.length_of = lambda request: self.requests[request].num_tokens
        (group,) = self.kv_cache_config.kv_cache_groups
        spec = group.kv_cache_spec
        assert isinstance(spec, AttentionSpec)
        carve = divide(
            spec,
            dtype=dtype_name(self.vllm_config.model_config.dtype),
            blocks=self.kv_cache_config.num_blocks,
        ).common  # floor layers have as many raw pages
        # A sequence that begins a page while its last one is still being read has two.
        limit = max(1, carve.sizes.raw_pages // 2)
        if not carve.sizes.sealed_pages or limit >= self.max_num_running_reqs:
            return
        logger.warning(
            "KV compression: %d raw pages let %d sequences run at once, not max_num_seqs=%d."
            " Give vLLM more KV cache memory, or raise VLLM_KV_COMPRESSION_RAW_SHARE.",
            carve.sizes.raw_pages,
            limit,
            self.max_num_running_reqs,
        )
        self.max_num_running_reqs = limit
        self.max_num_active_reqs = min(self.max_num_active_reqs, limit)
