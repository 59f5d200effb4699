"""Small vocabularies as GGUF files without weights."""

import itertools
from pathlib import Path

import gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def write_byte_level(path: Path, pre: str, text: str, *, merges: int = 400) -> Path:
    """Byte-level BPE whose merges are those of the commonest pairs of a text's words.

    Args:
      path: of the file.
      pre: name of the way to split text.
      text: to learn from.
      merges: how many.

    Returns:
      `path`.
    """
    letters = byte_letters()
    words = ["".join(letters[b] for b in word) for word in text.encode().split(b" ")]
    pieces = [[letters[32], *word] for word in words]
    tokens, learned = list(letters), []
    for _ in range(merges):
        counts: dict[tuple[str, str], int] = {}
        for word in pieces:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        learned.append(best)
        tokens.append("".join(best))
        pieces = [_merge(word, best) for word in pieces]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *control, "<think>"])
    writer.add_token_types([NORMAL] * len(tokens) + [CONTROL] * len(control) + [USER_DEFINED])
    writer.add_token_merges([" ".join(pair) for pair in learned])
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens) + 2)
    return _close(writer, path)


def write_sentencepiece(
    path: Path, pieces: dict[str, float], *, add_space_prefix: bool | None = None
) -> Path:
    """SentencePiece BPE with scores.

    Args:
      path: of the file.
      pieces: tokens with their scores.
      add_space_prefix: None leaves it out.

    Returns:
      `path`.
    """
    control = ["<unk>", "<s>", "</s>"]
    letters = [f"<0x{b:02X}>" for b in range(256)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*control, *letters, *pieces])
    writer.add_token_scores([0.0] * (len(control) + 256) + list(pieces.values()))
    writer.add_token_types([UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if add_space_prefix is not None:
        writer.add_add_space_prefix(add_space_prefix)
    return _close(writer, path)


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(word):
        joined = tuple(word[i : i + 2]) == pair
        out.append("".join(pair) if joined else word[i])
        i += 2 if joined else 1
    return out


def _close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
