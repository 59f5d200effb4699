"""Random models of Hugging Face transformers, the oracle; importing it skips without them."""

import copy
import math
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.models.dense import dense_forward
from kvcompress_jax.models.load import Model
from tests.models.files import Settings, State
from tests.models.smollm2 import smollm2_file

_REASON = "the oracle is Hugging Face transformers on torch"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)
# Transformers asks once whether a package `kernels` is installed, and would find our folder.
sys.modules["kernels"] = None  # type: ignore[assignment]
transformers.utils.import_utils.is_kernels_available()
del sys.modules["kernels"]

torch.set_num_threads(2)  # more of them wait for each other when tests run side by side

TOKENS = 40  # longer than every window below

_COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
_GEMMA3: dict[str, Any] = {
    "num_hidden_layers": 7,  # six form the pattern
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 144,
    "sliding_window": 9,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
    ),
    "llama-plain-defaults": ("Llama", {"num_attention_heads": 3}),  # head_dim 32, no groups
    "llama3-scaling-tied": (
        "Llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-biases-linear-scaling": (
        "Llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 96,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "qwen2": (
        "Qwen2",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen2-window": (
        "Qwen2",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 11,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (
        "Qwen3",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    ),
    "qwen3-tied": (
        "Qwen3",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": ("Gemma3Text", _GEMMA3),
    "gemma3-options": (
        "Gemma3Text",
        _GEMMA3
        | {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "head_dim": 96,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        },
    ),
}


def make_hf(case: str, *, seed: int = 0) -> "transformers.PreTrainedModel":
    """A model with random weights of a size that gives logits of about 1, and large key biases."""
    family, settings = CASES[case]
    settings = _COMMON | copy.deepcopy(settings)
    if family == "Gemma3Text":
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**settings))
    else:
        config = getattr(transformers, f"{family}Config")(**settings)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    return randomize(model, seed)


def make_gemma3_with_vision() -> "transformers.PreTrainedModel":
    """Text and images; only the text part is ever used."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = {k: v for k, v in (_COMMON | _GEMMA3).items() if k != "attn_implementation"}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4
    )
    config.image_token_id = 0
    return randomize(transformers.Gemma3ForConditionalGeneration(config), seed=0)


def randomize(model: "transformers.PreTrainedModel", seed: int) -> "transformers.PreTrainedModel":
    """Draws new weights: the initial ones have no biases and norms that do nothing."""
    generator = torch.Generator().manual_seed(seed)
    offset = 0.0 if "Gemma3" in type(model).__name__ else 1.0  # Gemma's norms add 1 themselves
    with torch.no_grad():
        for name, weight in model.named_parameters():
            x = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                x = offset + 0.2 * x
            elif name.endswith("k_proj.bias"):
                x = 8 * x
            elif "embed_tokens" in name and not model.config.tie_word_embeddings and offset:
                pass  # larger than what layers add: the next token depends on this one
            elif not name.endswith("bias"):
                x = x / math.sqrt(weight.shape[-1])
            weight.copy_(x)
    return model.float().eval()


def hf_logits(model: "transformers.PreTrainedModel", tokens: np.ndarray) -> np.ndarray:
    """f32[batch, tokens, vocab]."""
    with torch.no_grad():
        return model.forward(torch.from_numpy(tokens).long()).logits.float().numpy()


def hf_greedy(model: "transformers.PreTrainedModel", prompt: list[int], count: int) -> list[int]:
    """The next tokens, and no early end."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=count, do_sample=False, pad_token_id=0
        ),
    )
    return out[0, len(prompt) :].tolist()


def our_logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """f32[batch, tokens, vocab]."""
    return np.asarray(dense_forward(model.params, model.config, jnp.asarray(tokens, jnp.int32)))


def random_tokens(vocab_size: int, *, batch: int = 1, tokens: int = TOKENS) -> np.ndarray:
    """int32[batch, tokens]."""
    return np.random.default_rng(7).integers(3, vocab_size, (batch, tokens), dtype=np.int32)


def load_smollm2() -> "transformers.PreTrainedModel":
    """The file as `transformers` reads it: its own names, dequantisation and permutation.

    `from_pretrained(gguf_file=...)` does the same, but wants one more package.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = smollm2_file()
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        names = transformers.LlamaForCausalLM(config)
    state = load_gguf_checkpoint(file, return_tensors=True, model_to_load=names)["tensors"]
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def save(model: "transformers.PreTrainedModel", path: Path) -> Path:
    """Writes a directory."""
    model.save_pretrained(path)
    return path


def contents(model: "transformers.PreTrainedModel") -> tuple[Settings, State]:
    """Settings and weights, for `write_gguf`."""
    settings = model.config.to_dict()
    settings["head_dim"] = settings.get("head_dim") or (
        settings["hidden_size"] // settings["num_attention_heads"]
    )
    return settings, {name: x.numpy() for name, x in model.state_dict().items()}
