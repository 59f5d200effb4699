"""Reading Hugging Face directories: config.json, *.safetensors, tokenizer.json."""

from pathlib import Path
from typing import Any

import numpy as np

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.errors import ModelError, one_line
from kvcompress_jax.models.hf_config import config_from_json, eos_ids
from kvcompress_jax.models.hf_tokenizer import tokenizer_from_directory
from kvcompress_jax.models.optional import optional_import
from kvcompress_jax.models.tokenizer import Tokenizer
from kvcompress_jax.models.values import read_json

_MODEL_NAMES = {"embedding": "embed_tokens.weight", "final_norm": "norm.weight"}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "output_bias": "self_attn.o_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
}
# Gemma has two more norms, and the name of one means another place than in the other families.
_GEMMA3_LAYER_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}
# What comes before the names above in files of text models, and of models with vision, old and new.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_VISION = ("vision_tower.", "multi_modal_projector.")


class SafetensorsDirectory:
    """An open directory; see `kvcompress_jax.models.checkpoint.Checkpoint`."""

    path: Path
    config: DecoderConfig
    files: tuple[Path, ...]
    tensor_names: frozenset[str]

    def __init__(self, path: Path) -> None:
        """Reads the configuration and the names of the tensors.

        Args:
          path: of the directory.

        Raises:
          ModelError: no model, truncated or corrupt files, or a model that is not supported.
        """
        library = optional_import("safetensors")
        self.path = path
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json in this directory")
        generation = path / "generation_config.json"
        self.config = config_from_json(
            f"{path.name}/config.json",
            read_json(path / "config.json"),
            eos_token_ids=(
                eos_ids(f"{path.name}/{generation.name}", read_json(generation))
                if generation.is_file()
                else ()
            ),
        )
        self.files = _weight_files(path)
        self._tensors: dict[str, Any] = {}  # name to the open file that has it
        for file in self.files:
            try:
                handle = library.safe_open(file, framework="numpy")
                names = list(handle.keys())
            except (OSError, library.SafetensorError) as e:
                raise ModelError(
                    f"{path.name}/{file.name}: truncated or corrupt safetensors file "
                    f"({one_line(e)})"
                ) from e
            self._tensors |= dict.fromkeys(names, handle)
        self._prefix, self._head = self._find_prefix()
        ignored = {self._head} if self.config.tie_embeddings else set()
        self.tensor_names = frozenset(
            name
            for name in self._tensors
            if name not in ignored
            and not name.removeprefix("model.").startswith(_VISION)
            and not name.endswith("rotary_emb.inv_freq")  # older files; computed from the config
        )

    def tensor_name(self, field: str, layer: int | None) -> str:
        """Name of a field in the files."""
        if field == "unembedding":
            return self._head
        if layer is None:
            return self._prefix + _MODEL_NAMES[field]
        names = _GEMMA3_LAYER_NAMES if self.config.architecture == "gemma3" else _LAYER_NAMES
        return f"{self._prefix}layers.{layer}.{names[field]}"

    def read(self, field: str, layer: int | None) -> np.ndarray:
        """[outputs, inputs], [vocab, hidden] or [size], in the dtype of the file."""
        name = self.tensor_name(field, layer)
        try:
            x = self._tensors[name].get_tensor(name)
        # Types that NumPy does not have, and files that changed under us.
        except Exception as e:
            raise ModelError(
                f"{self.path.name}: tensor {name} cannot be read ({one_line(e)})"
            ) from e
        if str(x.dtype) not in ("float32", "float16", "bfloat16", "float64"):
            raise ModelError(
                f"{self.path.name}: tensor {name} has type {x.dtype}, which is not supported"
            )
        if self.config.architecture == "gemma3" and field.endswith("norm"):
            return 1 + x.astype(np.float32)  # its norms multiply by 1 + weight
        return x

    def tokenizer(self) -> Tokenizer | None:
        """None if the directory has none."""
        return tokenizer_from_directory(self.path, eos_ids=self.config.eos_token_ids)

    def _find_prefix(self) -> tuple[str, str]:
        for prefix in _PREFIXES:
            if prefix + _MODEL_NAMES["embedding"] in self._tensors:
                head = next((name for name in _HEADS if name in self._tensors), _HEADS[0])
                return prefix, head
        raise ModelError(f"{self.path.name}: tensor {_PREFIXES[0]}embed_tokens.weight is missing")


def _weight_files(path: Path) -> tuple[Path, ...]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise ModelError(f"{path.name}/{index.name}: weight_map is missing or wrong")
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise ModelError(f"{path.name}: {name}, named by {index.name}, is missing")
        return tuple(path / name for name in names)
    if (path / "model.safetensors").is_file():
        return (path / "model.safetensors",)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(
            f"{path}: expected model.safetensors or model.safetensors.index.json, got "
            f"{len(files)} *.safetensors files"
        )
    return (files[0],)
