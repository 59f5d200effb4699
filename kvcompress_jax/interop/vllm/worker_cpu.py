"""vLLM's worker for CPUs, with floor layers."""

from vllm.v1.worker.cpu_worker import CPUWorker

from kvcompress_jax.interop.vllm.floors import FloorWorker
from kvcompress_jax.interop.vllm.worker import CompressionWorker


class FloorCpuWorker(FloorWorker, CPUWorker, CompressionWorker):
    """See `FloorWorker`. Our figures are a base here already, which vLLM would add: in a process
    that had an engine without floor layers it would find them in `CPUWorker` before, and refuse."""
