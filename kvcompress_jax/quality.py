"""The quality gate: a configuration carries the fidelity that it must keep, and what was measured.

What a configuration does to one model says little about what it does to another. One that has a
bound is refused by whoever is about to serve a model with it, unless it was measured on that very
model, as it stands, and kept the bound.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompress_jax.config import CompressionConfig

logger = logging.getLogger(__name__)

# Fields that no measurement of fidelity depends on.
_WITHOUT_EFFECT = frozenset(
    "bound measured force host_bytes prefix_cache_bytes promote_heat heat_decay telemetry_share"
    " telemetry_pages".split()
)


class QualityError(ValueError):
    """A configuration whose bound is not kept, or not known to be kept; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityBound:
    """What a configuration must keep of the uncompressed model, on every text it is measured on.

    Attributes:
      kl: mean KL divergence from the uncompressed model's predictions, nats per token, at most.
      top1: share of tokens with the same most likely successor, at least.
    """

    kl: float | None = None
    top1: float | None = None

    def __post_init__(self) -> None:
        if self.kl is None and self.top1 is None:
            raise ValueError("bound: expected kl or top1, got neither")
        if self.kl is not None and not (math.isfinite(self.kl) and self.kl >= 0):
            raise ValueError(f"bound: kl: expected a number of nats, at least 0, got {self.kl}")
        if self.top1 is not None and not 0 <= self.top1 <= 1:
            raise ValueError(f"bound: top1: expected 0 to 1, got {self.top1}")

    def broken_by(self, kl: float, top1: float) -> str | None:
        """What is not kept, or None. A fidelity that is not a number keeps nothing."""
        found = []
        if self.kl is not None and not kl <= self.kl:
            found.append(f"kl: expected at most {self.kl:g} nats per token, got {kl:.5f}")
        if self.top1 is not None and not top1 >= self.top1:
            found.append(f"top1: expected at least {self.top1:.1%}, got {top1:.1%}")
        return "; ".join(found) or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Fidelity of a configuration on a model.

    Attributes:
      fingerprint: of the model.
      model: its name.
      settings: digest of the configuration and of the files that it names (`settings_digest`).
      kl: nats per token, of the worst text.
      top1: share of tokens, of the worst text.
      bits: stored bits per value of the cache after the context, everything counted.
      context_tokens: that were compressed.
      texts: names of what it was measured on.
    """

    fingerprint: str
    model: str
    settings: str
    kl: float
    top1: float
    bits: float
    context_tokens: int
    texts: str


def settings_digest(config: CompressionConfig) -> str:
    """SHA-256 of everything that fidelity depends on: the version of the code, fields that are not
    at their default, and the contents of the files that they name.

    Raises:
      ConfigError: such a file cannot be read.
    """
    from kvcompress_jax.codec import CODE_VERSION
    from kvcompress_jax.config import FILES, ConfigError

    said: dict[str, object] = {"code": CODE_VERSION}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _WITHOUT_EFFECT or value == field.default:
            continue
        if field.name in FILES:
            try:
                value = hashlib.sha256(Path(value).read_bytes()).hexdigest()
            except OSError as e:
                raise ConfigError(
                    f"{field.name}: expected a file that can be read, got {value} ({e.strerror})"
                ) from None
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        said[field.name] = value
    if config.ratio < 0.5:  # what None comes to there has been 4 before
        said["fine_bits"] = config.refining_bits
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def unmeasured(config: CompressionConfig, fingerprint: str) -> str | None:
    """Why nobody knows whether a configuration keeps its bound on a model; None if that is known,
    or if there is nothing to keep.

    Args:
      config: with or without a bound.
      fingerprint: of the model (`kvcompress_jax.models.load.Model.fingerprint`).
    """
    if config.bound is None or not config.compresses:
        return None
    measured = config.measured
    if measured is None:
        return "it was never measured"
    if measured.fingerprint != fingerprint:
        return (
            f"it was measured on another model ({measured.model}, {measured.fingerprint[:12]}), not"
            f" on this one ({fingerprint[:12]})"
        )
    if measured.settings != settings_digest(config):
        return "it was changed since it was measured"
    return None


def admit(config: CompressionConfig, fingerprint: str) -> None:
    """Lets a configuration through that has no bound or is known to keep it; call it before a
    model is served.

    Args:
      config: with or without a bound.
      fingerprint: of the model (`kvcompress_jax.models.load.read_outline`).

    Raises:
      QualityError: the bound is not kept, or it is not known whether it is. With `config.force`
        that is a warning in the log instead.
    """
    reason = unmeasured(config, fingerprint)
    if reason is not None:
        reason = (
            f"has a bound, but {reason}; `kvcompress tune --check FILE.toml --model MODEL --out"
            " FILE.toml` measures it"
        )
    elif config.bound is not None and config.compresses:
        assert config.measured is not None
        reason = config.bound.broken_by(config.measured.kl, config.measured.top1)
        if reason is not None:
            reason = f"{reason}, measured on {config.measured.texts}"
    if reason is None:
        return
    if config.force:
        logger.warning("quality gate, forced: the configuration %s", reason)
        return
    raise QualityError(f"quality gate: the configuration {reason}")
