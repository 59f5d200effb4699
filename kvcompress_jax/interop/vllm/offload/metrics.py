"""What offloading adds to vLLM's metrics; vLLM wants to know all names at the start."""

from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
)

PREFIX = "vllm:kv_compression_offload_"
_GAUGES = {
    "host_bytes": "Host memory of offloaded compressed pages.",
    "bytes_saved": "Host memory that they would take beyond that without compression.",
    "disk_bytes": "Files of offloaded compressed pages.",
    "disk_pages": "Offloaded compressed pages in files.",
}
_COUNTERS = {
    "hits": "Pages loaded to the device.",
    "disk_hits": "Pages brought from files to host memory.",
    "no_room": "Pages in files that found no room in host memory.",
    "unfit": "Pages in files whose shapes are not those of this engine.",
    "refused": "Pages that were not written to files, because too many waited or one is too large.",
    "skipped": "Files found at the start that are damaged, foreign or of another version.",
    "damaged": "Files that could not be read back as they were written.",
    "errors": "Errors of the file system.",
}


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """By name."""
    gauges = {PREFIX + n: OffloadingGaugeMetadata(documentation=t) for n, t in _GAUGES.items()}
    counters = {
        PREFIX + n: OffloadingCounterMetadata(documentation=t) for n, t in _COUNTERS.items()
    }
    return {**gauges, **counters}
