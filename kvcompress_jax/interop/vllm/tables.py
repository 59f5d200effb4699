"""What pages are coded with that is no part of vLLM's memory: a calibrated code, a learned
importance, the feedback of keys' errors.

All of it is of one model. Profiles and learned scores say of which in their files; what vLLM loads
is told by the fingerprint of its own. Feedback needs the model's queries, which vLLM does not show:
our own loader reads the model once more, into host memory, when an engine starts.
"""

import dataclasses
import hashlib
import logging
import os
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.calibrated import CalibratedCode
from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.feedback import KeyFeedback
from kvcompress_jax.importance import LearnedScore
from kvcompress_jax.interop.vllm.model_files import model_path, outline
from kvcompress_jax.models.cache_settings import learned_score, read_profile
from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.load import load_model
from kvcompress_jax.models.rope import layer_frequencies

logger = logging.getLogger(__name__)
_Table = TypeVar("_Table", CalibratedCode, KeyFeedback)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodeTables:
    """Of all layers and heads, on the host; or of one layer and a worker's heads, with an axis of
    layers of one, on the device."""

    code: CalibratedCode | None = None
    learned: LearnedScore | None = None
    feedback: KeyFeedback | None = None

    def of(self, layer: int, heads: slice) -> "CodeTables":
        """Those of some heads of a layer, on the device."""

        def cut(x: jax.Array) -> jax.Array:
            return jnp.asarray(x[layer : layer + 1, heads])

        def but_for_frequencies(table: _Table | None) -> _Table | None:
            if table is None:
                return None
            without = dataclasses.replace(table, frequencies=None)  # type: ignore[arg-type]
            of_heads = jax.tree.map(cut, without)
            frequencies = jnp.asarray(table.frequencies[layer : layer + 1])
            return dataclasses.replace(of_heads, frequencies=frequencies)

        return CodeTables(
            code=but_for_frequencies(self.code),
            learned=jax.tree.map(cut, self.learned),
            feedback=but_for_frequencies(self.feedback),
        )

    @property
    def code_digest(self) -> str:
        """Equal where rows of level 3 mean the same; empty without a calibrated code."""
        if self.code is None:
            return ""
        digest = hashlib.blake2b(digest_size=12)
        for leaf in jax.tree.leaves(self.code):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()


NO_TABLES = CodeTables()


def needs_model(config: CompressionConfig) -> bool:
    """Whether there are tables, for which the model's files are read."""
    named = config.profile or config.learned_importance or config.error_feedback
    return config.compresses and bool(named)


def check_files(config: CompressionConfig, model: str, *, revision: str | None = None) -> None:
    """Reads what the configuration names, and tells whether it is of this model.

    Args:
      config: with or without tables; without, nothing is read.
      model: folder or file, or a name in the local Hugging Face cache.
      revision: of a name.

    Raises:
      ConfigError: a file cannot be read or is of another model, or our loader cannot read the
        model.
    """
    _read(config, model, revision)


def load_tables(
    config: CompressionConfig, model: str, *, revision: str | None = None
) -> CodeTables:
    """The tables of a model; arguments and errors as in `check_files`."""
    read = _read(config, model, revision)
    if not config.error_feedback or not config.compresses:
        return read
    logger.info("error feedback: reading %s once more, to see what its queries are like", model)
    with jax.default_device(_host()):
        try:
            feedback = load_model(model_path(model, revision)).key_feedback
        except ModelError as e:
            raise ConfigError(f"error_feedback: {e}") from None
        return dataclasses.replace(read, feedback=jax.device_get(feedback))


def _host() -> jax.Device:
    """Where models and files are read: vLLM has the other device's memory."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise ConfigError(
            f"JAX_PLATFORMS: expected cpu among them, got {os.environ.get('JAX_PLATFORMS')}"
        ) from None


def _read(config: CompressionConfig, model: str, revision: str | None) -> CodeTables:
    """The tables that are in files."""
    if not needs_model(config):
        return NO_TABLES
    try:
        known = outline(model, revision)
    except ModelError as e:
        raise ConfigError(
            "profile, learned_importance, error_feedback: expected a model that this package"
            f" reads: {e}"
        ) from None
    with jax.default_device(_host()):
        profile = read_profile(config, known)
        code = None if profile is None else profile.code(layer_frequencies(known.config))
        tables = CodeTables(code=code, learned=learned_score(known, config))
        return jax.tree.map(np.asarray, tables)
