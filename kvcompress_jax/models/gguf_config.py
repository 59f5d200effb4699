"""The decoder's configuration from the metadata of a GGUF file."""

import math
import re
from collections.abc import Mapping

from kvcompress_jax.models.config import (
    ARCHITECTURES,
    DecoderConfig,
    FrequencyDivisors,
    LinearScaling,
    Rope,
    RopeScaling,
)
from kvcompress_jax.models.errors import ModelError, settings_of
from kvcompress_jax.models.gguf_metadata import Metadata

# Gemma 3 files leave out what is the same in all sizes.
_GEMMA3_WINDOW_PATTERN = 6  # every sixth layer has full attention
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_THETA = 1_000_000.0
_GEMMA3_27B_LAYERS = 62  # the one size whose queries are not scaled by its head_dim


def config_from_metadata(
    metadata: Metadata,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    rope_divisors: tuple[float, ...] | None,
    eos_token_ids: tuple[int, ...],
) -> DecoderConfig:
    """Reads the configuration.

    Args:
      metadata: of the file.
      shapes: of its tensors.
      rope_divisors: contents of the tensor with frequency divisors, if there is one.
      eos_token_ids: any of them ends a text.

    Returns:
      The configuration.

    Raises:
      ModelError: unknown architecture, missing metadata, or an option that is not supported.
    """
    architecture = metadata.architecture
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{metadata.file}: architecture {architecture!r} is not supported, only "
            f"{', '.join(ARCHITECTURES)}"
        )
    if metadata.get("{arch}.expert_count", int, 0):
        raise ModelError(f"{metadata.file}: mixtures of experts are not supported")
    if (parts := metadata.get("split.count", int, 1)) > 1:
        raise ModelError(f"{metadata.file}: one of {parts} parts: merge them with llama-gguf-split")
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise ModelError(f"{metadata.file}: tensor token_embd.weight is missing or not a matrix")
    layers = metadata.get("{arch}.block_count", int)
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"blk\.(\d{1,6})\.", name))}
    if blocks != set(range(len(blocks))) or layers != len(blocks):
        raise ModelError(
            f"{metadata.file}: metadata {architecture}.block_count: expected {len(blocks)}, the "
            f"number of layers in the file, got {layers}"
        )
    hidden = metadata.get("{arch}.embedding_length", int)
    heads = metadata.get("{arch}.attention.head_count", int)
    dim = metadata.get("{arch}.attention.key_length", int, hidden // max(heads, 1))
    if min(hidden, heads, dim) <= 0:
        raise ModelError(f"{metadata.file}: a size is zero or negative")
    for key in ("{arch}.attention.value_length", "{arch}.rope.dimension_count"):
        if (got := metadata.get(key, int, dim)) != dim:
            name = key.replace("{arch}", architecture)
            raise ModelError(f"{metadata.file}: metadata {name}: expected {dim}, got {got}")
    gemma = architecture == "gemma3"
    scale_dim = hidden // heads if gemma and layers == _GEMMA3_27B_LAYERS else dim
    window, windows = _windows(metadata, layers)
    with settings_of(metadata.file):
        return DecoderConfig(
            architecture=architecture,
            vocab_size=shapes["token_embd.weight"][0],
            hidden_size=hidden,
            intermediate_size=metadata.get("{arch}.feed_forward_length", int),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=metadata.get("{arch}.attention.head_count_kv", int, heads),
            head_dim=dim,
            norm_eps=metadata.get("{arch}.attention.layer_norm_rms_epsilon", float),
            tie_embeddings="output.weight" not in shapes,
            qkv_bias="blk.0.attn_q.bias" in shapes,
            output_bias="blk.0.attn_output.bias" in shapes,
            qk_norm=architecture in ("qwen3", "gemma3"),
            post_norms=gemma,
            activation="gelu_tanh" if gemma else "silu",
            embedding_scale=math.sqrt(hidden) if gemma else 1.0,
            query_scale=metadata.get("{arch}.attention.scale", float, scale_dim**-0.5),
            soft_cap=_positive(metadata, "{arch}.attn_logit_softcapping"),
            final_soft_cap=_positive(metadata, "{arch}.final_logit_softcapping"),
            rope=_rope(metadata, rope_divisors),
            local_rope=_local_rope(metadata) if gemma else None,
            sliding_window=window,
            layer_windows=windows,
            max_positions=metadata.get("{arch}.context_length", int),
            eos_token_ids=eos_token_ids,
        )


def _rope(metadata: Metadata, divisors: tuple[float, ...] | None) -> Rope:
    kind = metadata.get("{arch}.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise ModelError(f"{metadata.file}: RoPE scaling {kind!r} is not supported")
    older = metadata.get("{arch}.rope.scale_linear", float, 1.0)
    factor = metadata.get("{arch}.rope.scaling.factor", float, older)
    scaling: RopeScaling | None = None
    if kind == "linear" and factor not in (0, 1):
        scaling = LinearScaling(factor=factor)
    if divisors is not None:
        if scaling is not None:
            raise ModelError(f"{metadata.file}: two kinds of RoPE scaling at once")
        scaling = FrequencyDivisors(divisors=divisors)
    default = _GEMMA3_THETA if metadata.architecture == "gemma3" else 10_000.0
    return Rope(theta=metadata.get("{arch}.rope.freq_base", float, default), scaling=scaling)


def _local_rope(metadata: Metadata) -> Rope:
    """Scaling is of the layers with full attention only."""
    return Rope(theta=metadata.get("{arch}.rope.freq_base_swa", float, _GEMMA3_LOCAL_THETA))


def _windows(metadata: Metadata, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and that of each layer."""
    window = metadata.get("{arch}.attention.sliding_window", int, 0)
    if window == 0:
        return None, (0,) * layers
    key = "{arch}.attention.sliding_window_pattern"
    if metadata.architecture != "gemma3" and key not in metadata:
        raise ModelError(
            f"{metadata.file}: a sliding window in a {metadata.architecture} file is not "
            "supported: it does not say in which layers"
        )
    if metadata.is_list(key):
        local = metadata.get_list(key, bool)
        if len(local) != layers:
            raise ModelError(
                f"{metadata.file}: metadata sliding_window_pattern: expected {layers} entries, "
                f"got {len(local)}"
            )
        return window, tuple(window if x else 0 for x in local)
    pattern = metadata.get(key, int, _GEMMA3_WINDOW_PATTERN)
    if pattern < 1:
        raise ModelError(
            f"{metadata.file}: metadata sliding_window_pattern: expected at least 1, got {pattern}"
        )
    return window, tuple(0 if (i + 1) % pattern == 0 else window for i in range(layers))


def _positive(metadata: Metadata, key: str) -> float | None:
    """A cap that is left out, or 0, is none."""
    return metadata.get(key, float, 0.0) or None
