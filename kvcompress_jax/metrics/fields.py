"""What the fields of `get_compression_stats()` and of the engine are called outside.

A field that is named nowhere here becomes a gauge of its own name.
"""

# name: help, label, {field: value of the label}
FAMILIES: dict[str, tuple[str, str, dict[str, str]]] = {
    "pages": (
        "Pages on the device.",
        "level",
        {f"pages_level_{level}": str(level) for level in range(4)},
    ),
    "tier_bytes": (
        "Bytes of planes and pages that left the device.",
        "tier",
        {"host_bytes": "host", "disk_bytes": "disk"},
    ),
}

# field: name, help, factor to the base unit
GAUGES: dict[str, tuple[str, str, float]] = {
    "memory_saved_mb": ("memory_saved_bytes", "Uncompressed less allocated bytes.", 1e6),
    "avg_compression_ratio": (
        "compression_ratio",
        "Uncompressed over allocated bytes, all overheads counted.",
        1.0,
    ),
    "uncompressed_bytes": (
        "uncompressed_bytes",
        "The pages in use as plain keys and values of the model's dtype.",
        1.0,
    ),
    "allocated_bytes": ("allocated_bytes", "Device bytes in use, all overheads counted.", 1.0),
    "pool_bytes": ("pool_bytes", "Device bytes of all pools, in use or not.", 1.0),
    "devices": ("devices", "Devices that the pools are on.", 1.0),
    "device_pool_bytes": ("device_pool_bytes", "Bytes of all pools of one device.", 1.0),
    "effective_bits": ("effective_bits", "Stored bits per value of the sealed pages.", 1.0),
    "cache_bits": ("cache_bits", "Stored bits per value of all pages in use.", 1.0),
    "tokens": ("tokens", "Tokens in the cache; shared ones count once.", 1.0),
    "sequences": ("sequences", "Sequences on the device.", 1.0),
    "preempted_sequences": ("preempted_sequences", "Sequences in host memory.", 1.0),
    "telemetry_output_error_mean": (
        "output_error_mean_ratio",
        "Relative error of the attention output, mean over all samples.",
        1.0,
    ),
    "telemetry_output_error_max": (
        "output_error_max_ratio",
        "Relative error of the attention output, largest sample.",
        1.0,
    ),
    "telemetry_lse_error_mean": (
        "lse_error_mean",
        "Error of the log-sum-exp of the attention logits, mean over all samples.",
        1.0,
    ),
}

COUNTERS: dict[str, str] = {
    "seals": "Pages sealed.",
    "rejected": "Pages left at level 0 because a value was not finite.",
    "demotions": "Pages demoted from level 1 to 2.",
    "promotions": "Pages promoted from level 2 to 1.",
    "refusals": "Promotions refused: no plane was kept, or no chunk was free.",
    "unrefined": "Pages sealed at level 2 because there was no chunk for level 1.",
    "evictions": "Pages evicted by a policy.",
    "prefix_hits": "Sequences that began with a remembered prefix.",
    "prefix_hit_tokens": "Tokens that were not fed because their pages were remembered.",
    "prefix_evictions": "Prefixes forgotten because their pages were needed.",
    "pages_merged": "Pages replaced by equal ones of another sequence.",
    "windows_dropped": "Raw ends of prefixes dropped for lack of host memory.",
    "planes_dropped": "Fine planes that found no room below the device.",
    "forks": "Sequences forked.",
    "preemptions": "Sequences moved to host memory.",
    "resumes": "Sequences brought back from host memory.",
    "telemetry_samples": "Queries whose attention error was measured.",
    "disk_pages_written": "Pages written to disk.",
    "disk_pages_read": "Pages read from disk.",
    "disk_hits": "Requests for planes that the disk tier had in memory or had read.",
    "disk_misses": "Requests for planes that the disk tier did not have.",
    "disk_pages_dropped": "Pages deleted from disk for lack of room.",
    "disk_pages_refused": "Pages that the disk tier did not take.",
    "disk_pages_lost": "Pages that could not be written.",
    "disk_pages_damaged": "Pages that could not be read back as they were written.",
    "disk_files_skipped": "Files found at the start that could not be used.",
    "disk_errors": "Errors of the system while writing or reading.",
}

ENGINE_GAUGES: dict[str, str] = {
    "requests_running": "Requests that are being served.",
    "requests_waiting": "Requests that wait to be served.",
    "requests_preempted": "Requests that wait in host memory.",
}

ENGINE_COUNTERS: dict[str, str] = {
    "prompt_tokens": "Tokens of prompts that were fed.",
    "generated_tokens": "Tokens generated.",
    "failed_steps": "Steps that ended with an error of the device.",
    "recomputed_requests": "Requests started over after such a step.",
}
