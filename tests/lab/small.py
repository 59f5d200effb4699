"""A tiny model with a tokenizer, as a Hugging Face directory: no network, no real weights."""

import dataclasses
from pathlib import Path

import tokenizers

from tests.models.files import hf_settings, hf_state, write_directory
from tests.models.tiny import CONFIGS, tiny_model

TEXT = " ".join(f"word{i % 61} follows word{i * 7 % 53}." for i in range(400))


def write_small_model(path: Path, name: str = "llama") -> Path:
    """A model whose tokens are the 256 bytes."""
    config = dataclasses.replace(CONFIGS[name], vocab_size=256)
    model = tiny_model(config)
    write_directory(hf_settings(config), hf_state(model.params, config), path)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path
