"""A small decoder for the Llama family, and the loaders of its files.

The way of a model: `load_model` turns a name, a file or a directory into a `Model` (`gguf_*`,
`hf_*` and `safetensors_dir` read the formats, `checkpoint` stacks the weights); `decode` runs its
layers with whatever attention it is given, `logits` scores the next token; `dense_forward` is both
with plain attention and without a cache.
"""

from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.decoder import Attention, decode, logits
from kvcompress_jax.models.dense import (
    AttentionInputs,
    capture_forward,
    dense_attention,
    dense_forward,
)
from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.load import Model, load_model
from kvcompress_jax.models.params import DecoderParams, LayerParams, init_params
from kvcompress_jax.models.tokenizer import Tokenizer

__all__ = [
    "Attention",
    "AttentionInputs",
    "DecoderConfig",
    "DecoderParams",
    "LayerParams",
    "Model",
    "ModelError",
    "Tokenizer",
    "capture_forward",
    "decode",
    "dense_attention",
    "dense_forward",
    "init_params",
    "load_model",
    "logits",
]
