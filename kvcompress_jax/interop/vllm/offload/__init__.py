"""Below the device: compressed pages in host memory and in a folder, for vLLM's own
OffloadingConnector.

vLLM decides what is offloaded and looked up; `spec` is what it loads. The worker (`worker`) takes
blocks out of the layers' pools and puts them in (`pages`), to slots of shared memory (`slots`). The
scheduler's side (`manager`) knows which slot holds what, evicts by `policy`, and has the folder:
what is found there is checked and put into a slot before vLLM hears of a hit.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompress_jax.interop.vllm.offload.spec import KVCompressOffloadingSpec

__all__ = ["KVCompressOffloadingSpec"]


def __getattr__(name: str) -> object:
    # vLLM asks this module for it; others need not import vLLM.
    if name != "KVCompressOffloadingSpec":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvcompress_jax.interop.vllm.offload.spec import KVCompressOffloadingSpec

    return KVCompressOffloadingSpec
