"""Typed access to the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.values import T, typed

_MISSING = object()


class Metadata:
    """Key-value pairs of a file.

    Attributes:
      file: its name, for messages.
      architecture: `general.architecture`; "{arch}" in a key stands for it.
    """

    def __init__(self, file: str, fields: Mapping[str, Any]) -> None:
        """Wraps the fields.

        Args:
          file: name for messages.
          fields: of a `gguf.GGUFReader`.
        """
        self.file = file
        self._fields = fields
        self.architecture = ""
        self.architecture = self.get("general.architecture", str)

    def __contains__(self, key: str) -> bool:
        return self._name(key) in self._fields

    def is_list(self, key: str) -> bool:
        """Whether the key is there and holds an array."""
        return key in self and isinstance(self._contents(self._name(key)), list)

    def get(self, key: str, kind: type[T], default: T | object = _MISSING) -> T:
        """One value.

        Args:
          key: "{arch}" stands for the architecture.
          kind: int, float (an int will do), str or bool.
          default: if the key is not there; without one it has to be.

        Returns:
          The value.

        Raises:
          ModelError: missing or of another kind.
        """
        name = self._name(key)
        if name not in self._fields:
            if default is _MISSING:
                raise ModelError(f"{self.file}: metadata {name} is missing")
            return default  # type: ignore[return-value]
        return typed(f"{self.file}: metadata {name}", self._contents(name), kind)

    def get_list(self, key: str, kind: type[T]) -> list[T]:
        """All values of an array, or [] if the key is not there."""
        name = self._name(key)
        if name not in self._fields:
            return []
        values = self._contents(name)
        if not isinstance(values, list):
            raise ModelError(f"{self.file}: metadata {name}: expected a list, got {values!r:.40}")
        return [typed(f"{self.file}: metadata {name}", value, kind) for value in values]

    def _name(self, key: str) -> str:
        return key.replace("{arch}", self.architecture)

    def _contents(self, name: str) -> Any:
        try:
            return self._fields[name].contents()
        except (ValueError, IndexError, KeyError) as e:  # text that is not UTF-8, cut-off arrays
            raise ModelError(f"{self.file}: metadata {name} is corrupt") from e
