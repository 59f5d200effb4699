"""Texts to measure on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvcompress_jax.models.default_text import default_text
from kvcompress_jax.models.load import Model

HELD_OUT = 2  # samples: one decides badly between close calls


class TextError(ValueError):
    """A text that cannot be measured on."""


def load_text(path: str | Path | None = None) -> str:
    """A text file, or without one the language reference that comes with CPython.

    Raises:
      TextError: the file cannot be read, is not UTF-8 or is empty.
    """
    if path is None:
        text = default_text()
        if text is None:
            raise TextError("text: this Python comes without pydoc_data.topics; name a file")
        return text
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TextError(f"{path}: expected a text file in UTF-8, got: {e}") from None
    if not text.strip():
        raise TextError(f"{path}: expected some text, got none")
    return text


def split_texts(texts: Mapping[str, str], parts: int) -> dict[str, str]:
    """Each text as so many pieces of its own, of equal length: one context is noise."""
    if parts == 1:
        return dict(texts)
    pieces = {}
    for name, text in texts.items():
        size = len(text) // parts
        for i in range(parts):
            pieces[f"{name} {i + 1}/{parts}"] = text[i * size : (i + 1) * size]
    return pieces


def check_positions(model: Model, tokens: int) -> None:
    """Refuses texts that are longer than what the model was made for.

    Raises:
      TextError: they are.
    """
    if tokens > model.config.max_positions:
        raise TextError(
            f"{model.name}: expected at most {model.config.max_positions} tokens, the positions of"
            f" the model, got {tokens}"
        )


def take_tokens(tokens: list[int], count: int, *, name: str) -> list[int]:
    """The first `count` tokens.

    Raises:
      TextError: there are fewer.
    """
    if len(tokens) < count:
        raise TextError(f"{name}: expected at least {count} tokens, got {len(tokens)}")
    return tokens[:count]


def take_samples(model: Model, texts: Sequence[str], *, count: int, tokens: int) -> list[list[int]]:
    """Pieces of texts, spread evenly over each, the texts in turn.

    Args:
      model: with a tokenizer.
      texts: to take them from.
      count: of the samples.
      tokens: of each.

    Raises:
      TextError: a text is too short for its samples, or the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise TextError(f"{model.name}: expected a model with a tokenizer")
    samples = []
    for i, text in enumerate(texts):
        own = len(range(i, count, len(texts)))
        every = model.tokenizer.encode(text)
        if len(every) < own * tokens:
            raise TextError(f"text: expected at least {own * tokens} tokens, got {len(every)}")
        gap = (len(every) - tokens) // max(1, own - 1)
        samples += [every[j * gap : j * gap + tokens] for j in range(own)]
    return samples


def take_apart(
    model: Model, texts: Sequence[str], *, count: int, tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """`take_samples` and `hold_out`: `count` samples to fit to and `HELD_OUT` to judge by, or one
    more and one less where `count` is 1."""
    return hold_out(take_samples(model, texts, count=count + HELD_OUT, tokens=tokens))


def hold_out(samples: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Samples to fit to, and at most `HELD_OUT` to judge by: every second one, so that both kinds
    come from all parts of the texts."""
    apart = list(samples[1::2][:HELD_OUT])
    return [s for i, s in enumerate(samples) if i % 2 == 0 or i >= 2 * HELD_OUT], apart
