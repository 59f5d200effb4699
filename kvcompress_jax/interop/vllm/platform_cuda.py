"""The CUDA platform with KV compression."""

from vllm.platforms.cuda import CudaPlatform

from kvcompress_jax.interop.vllm.platform import CompressedPlatform


class CompressedCudaPlatform(CompressedPlatform, CudaPlatform):
    """See `CompressedPlatform`."""
