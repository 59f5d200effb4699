"""What vLLM finds by entry point. It is loaded in every process of vLLM, so that it imports neither
jax nor more of vLLM than it must."""

import os

from kvcompress_jax.interop.vllm import settings

_PLATFORMS = {
    "vllm.platforms.cpu.CpuPlatform": (
        "kvcompress_jax.interop.vllm.platform_cpu.CompressedCpuPlatform"
    ),
    "vllm.platforms.cuda.CudaPlatform": (
        "kvcompress_jax.interop.vllm.platform_cuda.CompressedCudaPlatform"
    ),
}


def platform() -> str | None:
    """`vllm.platform_plugins`: vLLM's own platform with our backend; None where there is nothing
    to compress, or no platform that we know."""
    if not settings.enabled():
        return None
    from vllm.platforms import builtin_platform_plugins

    found = [name for detect in builtin_platform_plugins.values() if (name := detect())]
    return _PLATFORMS.get(found[0]) if len(found) == 1 else None


def register() -> None:
    """`vllm.general_plugins`: our backend by name, and `LLM.kv_cache_manager`. Idempotent."""
    if not settings.enabled():
        return
    # JAX would take most of a GPU for itself, and vLLM counts on having it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvcompress_jax.interop.vllm.frontend import add_kv_cache_manager
    from kvcompress_jax.interop.vllm.platform import BACKEND, CompressedPlatform

    if not isinstance(current_platform, CompressedPlatform):
        raise RuntimeError(
            f"KV compression: expected a CPU or CUDA platform of vLLM, got"
            f" {type(current_platform).__name__}; set {settings.ENABLE_VARIABLE}=0 to run without"
        )
    if current_platform.device_type == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    add_kv_cache_manager()
