"""Writes decoders as Hugging Face directories and as GGUF files, with the conventions of either.

In between is what Hugging Face has in memory: settings as in `config.json`, and a state dict.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from kvcompress_jax.models.config import DecoderConfig, LinearScaling, Llama3Scaling, Rope
from kvcompress_jax.models.params import DecoderParams

State = dict[str, np.ndarray]
Settings = dict[str, Any]


def write_directory(settings: Settings, state: State, path: Path) -> Path:
    """Writes config.json and model.safetensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    save_file(state, path / "model.safetensors")
    return path


def write_gguf(
    settings: Settings,
    state: State,
    path: Path,
    *,
    permute: bool = True,
    norm_offset: int = 1,
    **metadata: str | int | list[str] | list[int],
) -> Path:
    """Writes float32 weights as llama.cpp's converter does.

    Args:
      settings: as in config.json, complete.
      state: weights under their names in Hugging Face models.
      path: of the file.
      permute: put the pairs of channels that rotate together next to each other, as Llama files
        must have them.
      norm_offset: what is added to Gemma's norms; files must have 1.
      **metadata: more of it; "__" in a key stands for ".".

    Returns:
      `path`.
    """
    kind = settings["model_type"].removesuffix("_text")
    layers, dim = settings["num_hidden_layers"], settings["head_dim"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(layers)
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_eos_token_id(settings["eos_token_id"])
    rope = settings["rope_parameters"]
    if kind == "gemma3":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(settings["sliding_window"])
        local = [t != "full_attention" for t in settings["layer_types"]]
        if local != [(i + 1) % 6 != 0 for i in range(layers)]:
            writer.add_sliding_window_pattern(local)
        if settings["query_pre_attn_scalar"] != dim:
            writer.add_attention_scale(settings["query_pre_attn_scalar"] ** -0.5)
        if settings.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(settings["final_logit_softcapping"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, dim))
    for key, value in metadata.items():
        name = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_array(name, value)
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == kind)
    names = gguf.get_tensor_name_map(architecture, layers)
    for name, x in state.items():
        if name == "lm_head.weight" and settings["tie_word_embeddings"]:
            continue
        if kind == "llama" and permute and ("q_proj" in name or "k_proj" in name):
            halves = x.reshape(-1, 2, dim // 2, *x.shape[1:])
            x = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(x.shape)
        if kind == "gemma3" and "norm" in name:
            x = x + np.float32(norm_offset)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")) or name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(rope: dict[str, float], dim: int) -> np.ndarray:
    """f32[dim / 2], written out case by case."""
    divisors = []
    for d in range(0, dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (d / dim)
        long = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        short = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if wavelength < short:
            divisors.append(1.0)
        elif wavelength > long:
            divisors.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def hf_settings(config: DecoderConfig) -> Settings:
    """What config.json says of a decoder, complete."""
    gemma = config.architecture == "gemma3"
    settings: Settings = {
        "model_type": config.architecture + ("_text" if gemma else ""),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "eos_token_id": next(iter(config.eos_token_ids), 2),
        "rope_parameters": _rope(config.rope),
    }
    if gemma:
        assert config.local_rope is not None
        settings |= {
            "rope_parameters": {
                "full_attention": _rope(config.rope),
                "sliding_attention": _rope(config.local_rope),
            },
            "query_pre_attn_scalar": round(config.query_scale**-2),
            "sliding_window": config.sliding_window,
            "layer_types": [
                "sliding_attention" if w else "full_attention" for w in config.layer_windows
            ],
        }
    return settings


def hf_state(params: DecoderParams, config: DecoderConfig) -> State:
    """Weights under their names in Hugging Face models."""
    gemma = config.architecture == "gemma3"
    layer_names = {
        "query": "self_attn.q_proj.weight",
        "key": "self_attn.k_proj.weight",
        "value": "self_attn.v_proj.weight",
        "output": "self_attn.o_proj.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
        "query_bias": "self_attn.q_proj.bias",
        "key_bias": "self_attn.k_proj.bias",
        "value_bias": "self_attn.v_proj.bias",
        "query_norm": "self_attn.q_norm.weight",
        "key_norm": "self_attn.k_norm.weight",
        "attention_norm": "input_layernorm.weight",
        "mlp_norm": f"{'pre_feedforward' if gemma else 'post_attention'}_layernorm.weight",
        "post_attention_norm": "post_attention_layernorm.weight",
        "post_mlp_norm": "post_feedforward_layernorm.weight",
    }
    state = {
        "model.embed_tokens.weight": np.array(params.embedding),
        "model.norm.weight": np.array(params.final_norm),
    }
    if params.unembedding is not None:
        state["lm_head.weight"] = np.array(params.unembedding)
    for field, name in layer_names.items():
        stack = getattr(params.layers, field)
        for i in range(0 if stack is None else config.num_layers):
            state[f"model.layers.{i}.{name}"] = np.ascontiguousarray(np.asarray(stack[i]).T)
    if gemma:
        state = {k: v - np.float32(1) if "norm" in k else v for k, v in state.items()}
    return state


def _rope(rope: Rope) -> Settings:
    match rope.scaling:
        case LinearScaling(factor=factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as s:
            scaling = {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_frequency_factor,
                "high_freq_factor": s.high_frequency_factor,
                "original_max_position_embeddings": s.original_max_positions,
            }
        case _:
            scaling = {"rope_type": "default"}
    return {"rope_theta": rope.theta, **scaling}
