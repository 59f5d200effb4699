"""vLLM's worker for CUDA, with floor layers."""

from vllm.v1.worker.gpu_worker import Worker

from kvcompress_jax.interop.vllm.floors import FloorWorker
from kvcompress_jax.interop.vllm.worker import CompressionWorker


class FloorCudaWorker(FloorWorker, Worker, CompressionWorker):
    """See `FloorWorker`. Our figures are a base here already, which vLLM would add: in a process
    that had an engine without floor layers it would find them in `Worker` before, and refuse."""
