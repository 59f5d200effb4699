"""What the environment asks for, and what of it cannot be had inside vLLM."""

import os
from collections.abc import Mapping

from kvcompress_jax.config import CompressionConfig, ConfigError

RAW_SHARE_VARIABLE = "VLLM_KV_COMPRESSION_RAW_SHARE"
FINE_SHARE_VARIABLE = "VLLM_KV_COMPRESSION_FINE_SHARE"
ENABLE_VARIABLE = "VLLM_ENABLE_KV_COMPRESSION"


def enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether vLLM is to compress: everywhere but with `VLLM_ENABLE_KV_COMPRESSION=0`.

    Raises:
      ConfigError: the variable holds neither 0 nor 1.
    """
    only = {k: v for k, v in environ.items() if k == ENABLE_VARIABLE}
    return CompressionConfig.from_env(only).enabled


def read_config(
    page_size: int | None = None, environ: Mapping[str, str] = os.environ
) -> CompressionConfig:
    """The configuration for vLLM.

    Args:
      page_size: vLLM's block size in tokens; None: what the environment asks for.
      environ: variables to read.

    Raises:
      ConfigError: a setting is wrong, or one that vLLM's pages cannot have.
    """
    overrides = {} if page_size is None else {"page_size": page_size}
    config = CompressionConfig.from_env(environ, overrides=overrides)
    refused = {
        "KVCOMPRESS_TELEMETRY_SHARE": config.telemetry_share,
        "KVCOMPRESS_DEMOTE_AFTER_TOKENS": config.demote_after_tokens,
        "KVCOMPRESS_DISK_PATH": config.disk_path,
        "KVCOMPRESS_PREFIX_CACHE_BYTES": config.prefix_cache_bytes,
    }
    for name, value in refused.items():
        if value:
            raise ConfigError(f"{name}: not supported inside vLLM, expected none, got {value}")
    raw_share(environ)
    fine_share(config, environ)
    return config


def raw_share(environ: Mapping[str, str] = os.environ) -> float:
    """Share of vLLM's KV memory that holds raw pages and exact first tokens (default 0.05)."""
    return _share(environ, RAW_SHARE_VARIABLE, 0.05, most=0.9)


def fine_share(config: CompressionConfig, environ: Mapping[str, str] = os.environ) -> float:
    """Share of vLLM's blocks that can have a fine chunk at the same time (default 0.75). When more
    are sealed, the coldest go to level 2; with two levels there is none to go to, and every block
    has a chunk.

    Raises:
      ConfigError: no such share, or less than 1 with two levels.
    """
    two = config.levels == 2
    share = _share(environ, FINE_SHARE_VARIABLE, 1.0 if two else 0.75, most=1.0)
    if two and share < 1:
        raise ConfigError(f"{FINE_SHARE_VARIABLE}: expected 1 with two levels, got {share:g}")
    return share


def _share(environ: Mapping[str, str], name: str, default: float, *, most: float) -> float:
    text = environ.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= most:
        raise ConfigError(f"{name}: expected more than 0 and at most {most}, got {text!r}")
    return value
