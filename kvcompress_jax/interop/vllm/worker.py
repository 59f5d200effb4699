"""What our figures add to vLLM's workers, through vLLM's own `worker_extension_cls`."""

from kvcompress_jax.interop.vllm.stats import VllmCompressionStats


class CompressionWorker:
    """Methods that `collective_rpc` finds by name."""

    def kv_compression_stats(self) -> VllmCompressionStats:
        """The figures of this worker."""
        from kvcompress_jax.interop.vllm.group import GROUPS

        if not GROUPS:
            raise RuntimeError("KV compression: expected a KV cache in this worker, got none")
        return GROUPS[0].stats()

    def kv_compression_verify(self) -> None:
        """Raises AssertionError for whatever does not add up."""
        from kvcompress_jax.interop.vllm.group import GROUPS

        for group in GROUPS:
            group.verify()
