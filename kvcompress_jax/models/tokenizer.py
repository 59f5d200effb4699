"""Text to token ids and back, and the prompt format of a chat model."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvcompress_jax.models.errors import ModelError, one_line
from kvcompress_jax.models.optional import optional_import

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """A tokenizer of the `tokenizers` library with the chat template of its model.

    Attributes:
      eos_ids: any of them ends a text.
      chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        eos_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Wraps a backend.

        Args:
          backend: of the `tokenizers` library.
          eos_ids: any of them ends a text.
          chat_template: Jinja source, or None.
          special_tokens: names that the template may use ("bos_token") and their text.
        """
        self._backend = backend
        self.eos_ids = eos_ids
        self.chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return self._backend.get_vocab_size()

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text. Special tokens that are spelled out in the text become their ids.

        Args:
          text: any text.
          add_special: add what the model wants around a text, for many a token that begins it.
            Text of `chat` has it already.

        Returns:
          Token ids.
        """
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of token ids.

        Args:
          ids: token ids; the bytes of a character may be spread over several.
          skip_special: leave special tokens out.

        Returns:
          The text; bytes that are not UTF-8 become U+FFFD.
        """
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def chat(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True
    ) -> str:
        """Renders the chat template of the model, sandboxed.

        Args:
          messages: with "role" and "content".
          add_generation_prompt: end with what an answer starts with.

        Returns:
          Text for `encode`.

        Raises:
          ModelError: no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ModelError("the model has no chat template: use it with plain text")
        jinja2 = optional_import("jinja2")
        sandbox = optional_import("jinja2.sandbox")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = refuse
        try:
            return str(
                environment.from_string(self.chat_template).render(
                    messages=list(messages),
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._special_tokens,
                )
            )
        # A template is a program of whoever published the model: it can fail in any way.
        except Exception as e:
            raise ModelError(f"the model's chat template failed: {one_line(e)}") from e


def _to_json(value: object, indent: int | None = None) -> str:
    """Unlike Jinja's own filter it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
