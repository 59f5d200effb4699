"""The decoder's configuration from the `config.json` of a Hugging Face directory."""

import math
from collections.abc import Mapping
from typing import Any

from kvcompress_jax.models.config import (
    DecoderConfig,
    LinearScaling,
    Llama3Scaling,
    Rope,
    RopeScaling,
)
from kvcompress_jax.models.errors import ModelError, settings_of
from kvcompress_jax.models.values import Values, typed

_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",  # with vision: the text decoder in it
}

# What `transformers` assumes for keys that a file leaves out.
_QWEN = {"max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma3": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "eos_token_id": 1,
    },
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Options that change the computation and that we do not have.
_REFUSED = ("quantization_config", "mlp_bias", "use_bidirectional_attention")


def config_from_json(
    where: str, values: Mapping[str, Any], *, eos_token_ids: tuple[int, ...] = ()
) -> DecoderConfig:
    """Reads the configuration.

    Args:
      where: file, for messages.
      values: of `config.json`.
      eos_token_ids: to add to those in the file.

    Returns:
      The configuration.

    Raises:
      ModelError: unknown architecture, a missing or wrong setting, or an unsupported option.
    """
    architecture, settings = _text_config(where, values)
    for key in _REFUSED:
        if settings.get(key):
            raise ModelError(f"{where}: {key} is not supported")
    get = Values(where, settings)
    hidden = get.get("hidden_size", int)
    heads = get.get("num_attention_heads", int)
    layers = get.get("num_hidden_layers", int)
    dim = get.get("head_dim", int, hidden // max(heads, 1))
    gemma = architecture == "gemma3"
    query_dim = get.get("query_pre_attn_scalar", float) if gemma else float(dim)
    if min(hidden, heads, layers, dim, query_dim) <= 0:
        raise ModelError(f"{where}: a size is zero or negative")
    activation = get.get("hidden_activation" if gemma else "hidden_act", str, "silu")
    if activation not in _ACTIVATIONS:
        raise ModelError(
            f"{where}: activation {activation!r} is not supported, only {', '.join(_ACTIVATIONS)}"
        )
    bias = get.get("attention_bias", bool, False)
    window, windows = _windows(architecture, get, layers)
    with settings_of(where):
        return DecoderConfig(
            architecture=architecture,
            vocab_size=get.get("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=get.get("intermediate_size", int),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=get.get("num_key_value_heads", int, heads),
            head_dim=dim,
            norm_eps=get.get("rms_norm_eps", float, 1e-6),
            tie_embeddings=get.get("tie_word_embeddings", bool, False),
            qkv_bias=bias or architecture == "qwen2",
            output_bias=bias and architecture != "qwen2",
            qk_norm=architecture in ("qwen3", "gemma3"),
            post_norms=gemma,
            activation=_ACTIVATIONS[activation],
            embedding_scale=math.sqrt(hidden) if gemma else 1.0,
            query_scale=query_dim**-0.5,
            soft_cap=get.optional("attn_logit_softcapping", float) if gemma else None,
            final_soft_cap=get.optional("final_logit_softcapping", float) if gemma else None,
            rope=_rope(where, _rope_parameters(get, "full_attention")),
            local_rope=_rope(where, _rope_parameters(get, "sliding_attention")) if gemma else None,
            sliding_window=window,
            layer_windows=windows,
            max_positions=get.get("max_position_embeddings", int),
            eos_token_ids=tuple(sorted({*eos_ids(where, settings), *eos_token_ids})),
        )


def eos_ids(where: str, values: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` of a JSON object: none, one or a list."""
    ids = Values(where, values).items_of("eos_token_id")
    return tuple(typed(f"{where}: eos_token_id", i, int) for i in ids)


def _text_config(where: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Our name of the architecture, and the settings of the text decoder with all defaults."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise ModelError(
            f"{where}: model_type {kind!r} is not supported, only {', '.join(_ARCHITECTURES)}"
        )
    if kind == "gemma3":
        outer = {k: v for k, v in values.items() if k in ("eos_token_id", "quantization_config")}
        values = {**Values(where, values).mapping("text_config"), **outer}
    architecture = _ARCHITECTURES[kind]
    given = {k: v for k, v in values.items() if v is not None}
    return architecture, {**_DEFAULTS[architecture], **given}


def _rope_parameters(get: Values, layer_type: str) -> dict[str, Any]:
    """Settings of the rope of one type of layers, with the names of newer files.

    Newer files have `rope_parameters`, for Gemma one per type of layers; older ones `rope_theta`,
    `rope_local_base_freq` and `rope_scaling`, which is of the layers with full attention.
    """
    local = layer_type == "sliding_attention"
    theta = get.get("rope_local_base_freq" if local else "rope_theta", float, 10_000.0)
    values = get.mapping("rope_parameters")
    if not values:
        values = {} if local else get.mapping("rope_scaling")
    elif "full_attention" in values or "sliding_attention" in values:
        values = Values(get.where, values).mapping(layer_type)
    return {"rope_theta": theta, **values}


def _rope(where: str, parameters: Mapping[str, Any]) -> Rope:
    get = Values(where, parameters)
    if get.get("partial_rotary_factor", float, 1.0) != 1:
        raise ModelError(f"{where}: partial_rotary_factor is not supported")
    kind = get.get("rope_type", str, get.get("type", str, "default"))
    scaling: RopeScaling | None = None
    if kind == "linear":
        scaling = LinearScaling(factor=get.get("factor", float))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=get.get("factor", float),
            low_frequency_factor=get.get("low_freq_factor", float),
            high_frequency_factor=get.get("high_freq_factor", float),
            original_max_positions=get.get("original_max_position_embeddings", int),
        )
    elif kind != "default":
        raise ModelError(f"{where}: RoPE scaling {kind!r} is not supported")
    return Rope(theta=get.get("rope_theta", float), scaling=scaling)


def _windows(architecture: str, get: Values, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and that of each layer."""
    if architecture == "gemma3":
        pattern = get.get("sliding_window_pattern", int)
        if pattern < 1:
            raise ModelError(
                f"{get.where}: sliding_window_pattern: expected at least 1, got {pattern}"
            )
        local = [(i + 1) % pattern != 0 for i in range(layers)]
    elif architecture != "llama" and get.get("use_sliding_window", bool, False):
        first = get.get("max_window_layers", int)
        local = [i >= first for i in range(layers)]
    else:
        return None, (0,) * layers
    if types := get.items_of("layer_types"):
        known = ("full_attention", "sliding_attention")
        if len(types) != layers or any(t not in known for t in types):
            raise ModelError(
                f"{get.where}: layer_types: expected {layers} of {known}, got {types!r:.80}"
            )
        local = [t == "sliding_attention" for t in types]
    window = get.get("sliding_window", int)
    return window, tuple(window if x else 0 for x in local)
