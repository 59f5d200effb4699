"""Typed access to the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.values import T, typed


class Metadata:
    """Key-value pairs of a file.

    Attributes:
      file: its name, for messages.
      architecture: `general.architecture`; "{arch}" in a key stands for it.
    """

    def __init__(self, file: str, values: Mapping[str, Any]) -> None:
        """Wraps the values.

        Args:
          file: name for messages.
          values: of a `kvcompress_jax.models.gguf_header.GgufHeader`.
        """
        self.file = file
        self._values = values
        self.architecture = ""
        self.architecture = self.get("general.architecture", str)

    def __contains__(self, key: str) -> bool:
        return self._name(key) in self._values

    def is_list(self, key: str) -> bool:
        """Whether the key is there and holds a list."""
        return isinstance(self._values.get(self._name(key)), list)

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
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
        value = self._values.get(name, default)
        if value is None:
            raise ModelError(f"{self.file}: metadata {name} is missing")
        return typed(f"{self.file}: metadata {name}", value, kind)

    def get_list(self, key: str, kind: type[T]) -> list[T]:
        """All values of a list, or [] if the key is not there."""
        name = self._name(key)
        values = self._values.get(name, [])
        where = f"{self.file}: metadata {name}"
        if not isinstance(values, list):
            raise ModelError(f"{where}: expected a list, got {values!r:.40}")
        return [typed(where, value, kind) for value in values]

    def _name(self, key: str) -> str:
        return key.replace("{arch}", self.architecture)
