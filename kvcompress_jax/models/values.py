"""Typed access to settings that were read from a file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from kvcompress_jax.models.errors import ModelError, one_line

T = TypeVar("T", int, float, str, bool)


def typed(where: str, value: Any, kind: type[T]) -> T:
    """Checks the kind of a value.

    Args:
      where: file and key, for the message.
      value: as read.
      kind: int, float (an int will do), str or bool.

    Returns:
      The value.

    Raises:
      ModelError: another kind.
    """
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ModelError(f"{where}: expected {kind.__name__}, got {value!r:.40}")
    return value


class Values:
    """A JSON object. A key that is null is a key that is not there.

    Attributes:
      where: file, for messages.
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        """Wraps the object.

        Args:
          where: file, for messages.
          values: the object.
        """
        self.where = where
        self._values = {k: v for k, v in values.items() if v is not None}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """One value; `ModelError` if it is of another kind, or missing without a default."""
        value = self._values.get(key, default)
        if value is None:
            raise ModelError(f"{self.where}: {key} is missing")
        return typed(f"{self.where}: {key}", value, kind)

    def optional(self, key: str, kind: type[T]) -> T | None:
        """One value, or None."""
        return self.get(key, kind) if key in self else None

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object in the object, or an empty one."""
        value = self._values.get(key, {})
        if not isinstance(value, Mapping):
            raise ModelError(f"{self.where}: {key}: expected an object, got {value!r:.40}")
        return value

    def items_of(self, key: str) -> list[Any]:
        """A list, or the only item of one, or an empty one."""
        value = self._values.get(key, [])
        return value if isinstance(value, list) else [value]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Args:
      path: of the file.

    Returns:
      Its contents.

    Raises:
      ModelError: unreadable, not JSON, or not an object.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{where}: not readable ({one_line(e)})") from e
    if not isinstance(values, dict):
        raise ModelError(f"{where}: expected a JSON object")
    return values
