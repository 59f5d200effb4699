"""What a user asks of offloading, in vLLM's `kv_connector_extra_config`."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcompress_jax.config import ConfigError

SPEC = "KVCompressOffloadingSpec"
MODULE = "kvcompress_jax.interop.vllm.offload"
FINGERPRINT = "kvcompress_model_fingerprint"  # set by our platform, which knows the revision


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    """Sizes in bytes."""

    cpu_bytes_to_use: int  # of pages in host memory
    disk_path: str | None = None  # folder below it
    disk_bytes: int = 0
    eviction_policy: str = "ImportancePolicy"  # of host memory
    cache_policy_module_path: str | None = f"{MODULE}.policy"


def read_options(extra: Mapping[str, Any]) -> OffloadOptions:
    """Reads them.

    Raises:
      ConfigError: one is unknown, missing or wrong.
    """
    own = {"spec_name", "spec_module_path", "offload_prompt_only", FINGERPRINT}
    known = {f.name for f in dataclasses.fields(OffloadOptions)}
    unknown = sorted(set(extra) - own - known)
    if unknown:
        raise ConfigError(
            f"kv_connector_extra_config: expected {sorted(known | own - {FINGERPRINT})}, got"
            f" {', '.join(unknown)}"
        )
    values = {name: extra[name] for name in known if name in extra}
    if values.get("eviction_policy") in ("lru", "arc"):  # vLLM's own
        values.setdefault("cache_policy_module_path", None)
    for name in ("cpu_bytes_to_use", "disk_bytes"):
        try:
            values[name] = int(values.get(name, 0))
        except (TypeError, ValueError):
            raise ConfigError(f"{name}: expected bytes, got {values[name]!r}") from None
    if values["cpu_bytes_to_use"] < 1:
        raise ConfigError(
            f"cpu_bytes_to_use: expected bytes of host memory, got {values['cpu_bytes_to_use']}"
        )
    if (values.get("disk_path") is None) != (values["disk_bytes"] < 1):
        raise ConfigError(
            "disk_path and disk_bytes: expected both or none, got"
            f" {values.get('disk_path')} and {values['disk_bytes']}"
        )
    return OffloadOptions(**values)


def region_path(engine_id: str) -> Path:
    """Of the memory that scheduler and worker share."""
    shared = Path("/dev/shm")
    folder = shared if shared.is_dir() else Path(tempfile.gettempdir())
    return folder / f"kvcompress-{engine_id}"
