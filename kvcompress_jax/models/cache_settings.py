"""What the cache of a model is like under a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.importance import LearnedScore
from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.load import Model, Outline
from kvcompress_jax.paged import CacheLayout

if TYPE_CHECKING:
    from kvcompress_jax.calibrated.profile import Profile


def learned_score(model: Model | Outline, config: CompressionConfig) -> LearnedScore | None:
    """The trained importance that a configuration names, None when it names none or nothing is
    compressed.

    Raises:
      ConfigError: the file is not one for this model.
    """
    if config.learned_importance is None or not config.compresses:
        return None
    from kvcompress_jax.importance.learned import ImportanceFileError, load_learned

    try:
        return load_learned(
            config.learned_importance,
            fingerprint=model.fingerprint,
            layers=model.config.num_layers,
            kv_heads=model.config.num_kv_heads,
            head_dim=model.config.head_dim,
        )
    except ImportanceFileError as e:
        raise ConfigError(f"learned_importance: {e}") from None


def read_profile(config: CompressionConfig, model: Model | Outline) -> Profile | None:
    """What `config.profile` names, checked against the model; None without one.

    Raises:
      ProfileError: it cannot be read, or is of another model.
    """
    if config.profile is None or not config.compresses:
        return None
    # Only now: safetensors is not needed otherwise.
    from kvcompress_jax.calibrated.profile import load_profile

    return load_profile(config.profile, model.config, model.fingerprint)


def cache_layout(
    decoder: DecoderConfig,
    config: CompressionConfig,
    kv_dtype: str,
    profile: Profile | None = None,
) -> CacheLayout:
    """The page layout of a configuration for a model."""
    return config.layout(
        layers=decoder.num_layers,
        kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        dtype=kv_dtype,
        rows=None if profile is None else profile.rows,
    )
