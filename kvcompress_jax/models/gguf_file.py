"""Reading GGUF files."""

from pathlib import Path

import numpy as np

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.gguf_config import config_from_metadata
from kvcompress_jax.models.gguf_header import GgufTensor, read_header
from kvcompress_jax.models.gguf_metadata import Metadata
from kvcompress_jax.models.gguf_tokenizer import eos_token_ids, tokenizer_from_metadata
from kvcompress_jax.models.optional import optional_import
from kvcompress_jax.models.tokenizer import Tokenizer

_MODEL_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "unembedding": "output.weight",
}
_LAYER_NAMES = {
    "attention_norm": "attn_norm.weight",
    "query": "attn_q.weight",
    "key": "attn_k.weight",
    "value": "attn_v.weight",
    "output": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "query_bias": "attn_q.bias",
    "key_bias": "attn_k.bias",
    "value_bias": "attn_v.bias",
    "output_bias": "attn_output.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "post_attention_norm": "post_attention_norm.weight",
    "post_mlp_norm": "post_ffw_norm.weight",
}
_ROPE_DIVISORS = "rope_freqs.weight"


class GgufFile:
    """An open GGUF file; see `kvcompress_jax.models.checkpoint.Checkpoint`."""

    path: Path
    config: DecoderConfig
    files: tuple[Path, ...]
    tensor_names: frozenset[str]

    def __init__(self, path: Path) -> None:
        """Reads the metadata; weights stay on disk until `read`.

        Args:
          path: of the file.

        Raises:
          ModelError: not a GGUF file, truncated or corrupt, or of a model that is not supported.
        """
        self._dequantize = optional_import("gguf.quants").dequantize
        self.path = path
        self.files = (path,)
        header = read_header(path)
        self._tensors = header.tensors
        self._metadata = Metadata(path.name, header.metadata)
        divisors = self._tensors.get(_ROPE_DIVISORS)
        self.tensor_names = frozenset(self._tensors) - {_ROPE_DIVISORS}
        self.config = config_from_metadata(
            self._metadata,
            shapes={name: tensor.shape for name, tensor in self._tensors.items()},
            rope_divisors=None
            if divisors is None
            else tuple(self._values(divisors).ravel().tolist()),
            eos_token_ids=eos_token_ids(self._metadata),
        )

    def tensor_name(self, field: str, layer: int | None) -> str:
        """Name of a field in the file."""
        return _MODEL_NAMES[field] if layer is None else f"blk.{layer}.{_LAYER_NAMES[field]}"

    def read(self, field: str, layer: int | None) -> np.ndarray:
        """float32[outputs, inputs], [vocab, hidden] or [size]."""
        x = self._values(self._tensors[self.tensor_name(field, layer)])
        if self.config.architecture == "llama" and field in (
            "query",
            "key",
            "query_bias",
            "key_bias",
        ):
            return _unpermute(x, self.config.head_dim)
        return x

    def tokenizer(self) -> Tokenizer | None:
        """None if the file has none."""
        return tokenizer_from_metadata(self._metadata, self.config.vocab_size)

    def _values(self, tensor: GgufTensor) -> np.ndarray:
        """float32, with the shape of the tensor."""
        try:
            x = self._dequantize(tensor.data, tensor.kind)
        except NotImplementedError as e:
            raise ModelError(
                f"{self.path.name}: tensor {tensor.name} has type {tensor.kind.name}, "
                "which is not supported"
            ) from e
        return np.asarray(x, np.float32).reshape(tensor.shape)


def _unpermute(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Llama files rotate channels 2d and 2d + 1 together; we d and d + head_dim / 2.

    Args:
      x: [heads * head_dim, ...], pairs of channels next to each other.
      head_dim: even.

    Returns:
      The same rows, halves of the pairs apart.
    """
    if x.shape[0] % head_dim:
        return x  # the shape check that follows names it
    pairs = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)
