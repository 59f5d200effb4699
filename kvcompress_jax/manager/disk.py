"""The disk tier that a configuration asks for."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from kvcompress_jax.codec import CODE_VERSION
from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.paged.layout import CacheLayout

if TYPE_CHECKING:
    from kvcompress_jax.storage import DiskTier


def open_disk_tier(
    config: CompressionConfig, layout: CacheLayout, *, model_fingerprint: str
) -> DiskTier | None:
    """Opens the folder that `config.disk_path` names; None when it names none, or when nothing is
    compressed.

    Raises:
      ConfigError: the folder cannot be used, `disk_bytes` is without a folder, or the extra
        `storage` is not installed.
    """
    if config.disk_path is None:
        if config.disk_bytes:
            raise ConfigError(f"disk_bytes: expected 0 without disk_path, got {config.disk_bytes}")
        return None
    if not config.compresses:
        return None
    try:
        from kvcompress_jax.storage import DiskTier, DiskTierError
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"disk_path: package {e.name} is not installed: pip install 'kvcompress-jax[storage]'"
        ) from None
    try:
        return DiskTier(
            config.disk_path,
            config.disk_bytes,
            model=model_fingerprint or "unknown",
            codec=code_fingerprint(layout),
        )
    except DiskTierError as e:
        raise ConfigError(f"disk_path: {e}") from None


def code_fingerprint(layout: CacheLayout) -> str:
    """Names what the planes of a page mean: equal for caches that can exchange them."""
    digest = hashlib.blake2b(repr(layout).encode(), digest_size=12).hexdigest()
    return f"embedded-{CODE_VERSION}-{digest}"
