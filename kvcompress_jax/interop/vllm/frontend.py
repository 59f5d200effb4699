"""`llm.kv_cache_manager`: where the user of `vllm.LLM` finds the figures."""

from typing import Any

from kvcompress_jax.interop.vllm.stats import VllmCompressionStats, merge


class KVCacheManagerView:
    """Asks the engine's workers, wherever they run."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def get_compression_stats(self) -> VllmCompressionStats:
        """The figures of all workers together.

        Raises:
          RuntimeError: this engine does not compress.
        """
        self._expect_compression()
        return merge(self._llm.collective_rpc("kv_compression_stats"))

    def verify(self) -> None:
        """Raises if what the workers keep does not add up."""
        self._expect_compression()
        self._llm.collective_rpc("kv_compression_verify")

    def _expect_compression(self) -> None:
        config = self._llm.llm_engine.vllm_config.parallel_config
        if not config.worker_extension_cls.startswith("kvcompress_jax."):
            raise RuntimeError(
                "KV compression: expected an engine that was started with it, got one without"
                f" (worker_extension_cls={config.worker_extension_cls!r})"
            )


def add_kv_cache_manager() -> None:
    """Gives `vllm.LLM` the attribute `kv_cache_manager`, which vLLM does not have."""
    from vllm.entrypoints.llm import LLM

    if not hasattr(LLM, "kv_cache_manager"):
        LLM.kv_cache_manager = property(KVCacheManagerView)
