"""The CPU platform with KV compression."""

from vllm.platforms.cpu import CpuPlatform

from kvcompress_jax.interop.vllm.platform import CompressedPlatform


class CompressedCpuPlatform(CompressedPlatform, CpuPlatform):
    """See `CompressedPlatform`."""
