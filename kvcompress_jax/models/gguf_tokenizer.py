"""Tokenizers from the metadata of GGUF files."""

from typing import TYPE_CHECKING

from kvcompress_jax.models.errors import ModelError, one_line
from kvcompress_jax.models.gguf_metadata import Metadata
from kvcompress_jax.models.optional import optional_import
from kvcompress_jax.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

# tokenizer.ggml.token_type
_CONTROL = 3
_USER_DEFINED = 4

# Control tokens that end a turn; files name only one of them as the end of text.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>")

# tokenizer.ggml.pre of byte-level BPE: how text is split before merging. "gpt-2" and "smollm" are
# of the library; the others are the published patterns of their models.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama-bpe": _WORDS.format(digits=r"\p{N}{1,3}"),
    "qwen2": _WORDS.format(digits=r"\p{N}"),
}
_PRETOKENIZERS = ("gpt-2", "smollm", *_PATTERNS)

_SPACE = "\u2581"  # how SentencePiece writes a space


def eos_token_ids(metadata: Metadata) -> tuple[int, ...]:
    """Ids that end a text or a turn.

    Args:
      metadata: of a GGUF file.

    Returns:
      Sorted ids; () for a file without a tokenizer.
    """
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = {metadata.get(key, int) for key in keys if key in metadata}
    tokens = metadata.get_list("tokenizer.ggml.tokens", str)
    kinds = metadata.get_list("tokenizer.ggml.token_type", int)
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind == _CONTROL and token in _END_OF_TURN:
            ids.add(i)
    return tuple(sorted(ids))


def tokenizer_from_metadata(metadata: Metadata, vocab_size: int) -> Tokenizer | None:
    """Builds the tokenizer.

    Args:
      metadata: of a GGUF file.
      vocab_size: of the decoder.

    Returns:
      The tokenizer, or None for a file without one.

    Raises:
      ModelError: a kind of tokenizer or of splitting that is not known, or inconsistent metadata.
    """
    tokens = metadata.get_list("tokenizer.ggml.tokens", str)
    if not tokens:
        return None
    if len(tokens) > vocab_size:
        raise ModelError(
            f"{metadata.file}: tokenizer.ggml.tokens: expected at most {vocab_size}, the rows of "
            f"the embedding, got {len(tokens)}"
        )
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{metadata.file}: tokenizer.ggml.tokens: a token is there twice")
    kinds = metadata.get_list("tokenizer.ggml.token_type", int)
    model = metadata.get("tokenizer.ggml.model", str)
    if model not in _BUILDERS:
        raise ModelError(
            f"{metadata.file}: tokenizer {model!r} is not supported, only {', '.join(_BUILDERS)}"
        )
    library = optional_import("tokenizers")
    try:
        backend = _BUILDERS[model](metadata, tokens)
        for special in (True, False):
            kind = _CONTROL if special else _USER_DEFINED
            added = [t for t, k in zip(tokens, kinds, strict=False) if k == kind]
            added = [library.AddedToken(t, normalized=False, special=special) for t in added]
            (backend.add_special_tokens if special else backend.add_tokens)(added)
        names = _special_tokens(metadata, tokens)
        if "bos_token" in names and metadata.get(
            "tokenizer.ggml.add_bos_token", bool, _bos(model, metadata)
        ):
            backend.post_processor = library.processors.TemplateProcessing(
                single=[names["bos_token"], "$A"],
                special_tokens=[
                    (names["bos_token"], metadata.get("tokenizer.ggml.bos_token_id", int))
                ],
            )
    except ModelError:
        raise
    # The library reports bad vocabularies with bare exceptions.
    except Exception as e:
        raise ModelError(f"{metadata.file}: the tokenizer is inconsistent: {one_line(e)}") from e
    template = "tokenizer.chat_template"
    return Tokenizer(
        backend,
        eos_ids=eos_token_ids(metadata),
        chat_template=metadata.get(template, str) if template in metadata else None,
        special_tokens=names,
    )


def _bos(model: str, metadata: Metadata) -> bool:
    """Whether a text begins with a token of its own where the file does not say."""
    return model == "llama" or metadata.get("tokenizer.ggml.pre", str, "") == "llama-bpe"


def _special_tokens(metadata: Metadata, tokens: list[str]) -> dict[str, str]:
    names = {}
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in metadata:
            continue
        index = metadata.get(key, int)
        if not 0 <= index < len(tokens):
            raise ModelError(
                f"{metadata.file}: {key}: expected less than {len(tokens)}, got {index}"
            )
        names[f"{name}_token"] = tokens[index]
    return names


def _byte_level(metadata: Metadata, tokens: list[str]) -> "tokenizers.Tokenizer":
    """BPE over bytes, with a list of merges ("gpt2" in GGUF)."""
    library = optional_import("tokenizers")
    pre = metadata.get("tokenizer.ggml.pre", str, "")
    if pre not in _PRETOKENIZERS:
        raise ModelError(
            f"{metadata.file}: tokenizer.ggml.pre {pre!r} is not supported, only "
            f"{', '.join(_PRETOKENIZERS)}"
        )
    merges = []
    for merge in metadata.get_list("tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    backend = library.Tokenizer(
        library.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == "llama-bpe",
        )
    )
    split = library.pre_tokenizers
    if pre in _PATTERNS:
        pattern = library.Regex(_PATTERNS[pre])
        backend.pre_tokenizer = split.Sequence(
            [
                split.Split(pattern, "isolated"),
                split.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        digits = [split.Digits(individual_digits=True)] if pre == "smollm" else []
        backend.pre_tokenizer = split.Sequence([*digits, split.ByteLevel(add_prefix_space=False)])
    if pre == "qwen2":
        backend.normalizer = library.normalizers.NFC()
    backend.decoder = library.decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Metadata, tokens: list[str]) -> "tokenizers.Tokenizer":
    """BPE over characters, with scores instead of merges ("llama" in GGUF).

    SentencePiece merges the neighbours whose union has the highest score. As a list of merges:
    every way to split a token in two, the highest scores first.
    """
    library = optional_import("tokenizers")
    scores = metadata.get_list("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise ModelError(
            f"{metadata.file}: tokenizer.ggml.scores: expected {len(tokens)}, got {len(scores)}"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (token[:i], token[i:])
        for token in sorted(tokens, key=lambda token: (-scores[vocab[token]], vocab[token]))
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", int, 0)
    backend = library.Tokenizer(
        library.models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = library.normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        library.normalizers.Sequence([library.normalizers.Prepend(_SPACE), spaces])
        if prefix
        else spaces
    )
    decode = library.decoders
    steps = [decode.Replace(_SPACE, " "), decode.ByteFallback(), decode.Fuse()]
    backend.decoder = decode.Sequence([*steps, decode.Strip(" ", 1, 0)] if prefix else steps)
    return backend


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
