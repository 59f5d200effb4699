"""Tokenizers of Hugging Face directories: tokenizer.json and its companions."""

from pathlib import Path
from typing import Any

from kvcompress_jax.models.errors import ModelError, one_line
from kvcompress_jax.models.optional import optional_import
from kvcompress_jax.models.tokenizer import Tokenizer
from kvcompress_jax.models.values import read_json


def tokenizer_from_directory(path: Path, *, eos_ids: tuple[int, ...]) -> Tokenizer | None:
    """Reads the tokenizer.

    Args:
      path: of the directory.
      eos_ids: of the model; the tokenizer's own end of text is added.

    Returns:
      The tokenizer, or None without a tokenizer.json.

    Raises:
      ModelError: a file is corrupt.
    """
    if not (path / "tokenizer.json").is_file():
        return None
    library = optional_import("tokenizers")
    try:
        backend = library.Tokenizer.from_file(str(path / "tokenizer.json"))
    # The library reports bad files with bare exceptions.
    except Exception as e:
        raise ModelError(f"{path.name}/tokenizer.json: not readable ({one_line(e)})") from e
    file = path / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    names = {key: _text(settings.get(key)) for key in ("bos_token", "eos_token")}
    special = {key: text for key, text in names.items() if text is not None}
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return Tokenizer(
        backend,
        eos_ids=tuple(sorted({*eos_ids, *(() if eos is None else (eos,))})),
        chat_template=_chat_template(path, settings),
        special_tokens=special,
    )


def _text(token: Any) -> str | None:
    """Special tokens are text, or an object with their text."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    """A file of its own (newer), a setting, or the one named "default" of several."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as e:
            raise ModelError(f"{path.name}/{file.name}: not readable ({one_line(e)})") from e
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
