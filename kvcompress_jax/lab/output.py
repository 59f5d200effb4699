"""Results to files, whole or not at all."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


class OutputError(ValueError):
    """A result that cannot be written where it was asked for."""


def check_writable(path: Path) -> None:
    """Fails now rather than after minutes of work.

    Raises:
      OutputError: the folder does not exist or cannot be written to, or `path` is a folder.
    """
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: expected a file in a folder that can be written to")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends without an error.

    Raises:
      OutputError: the file cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.resolve().parent, suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(f"{path}: {e.strerror or e}") from None


def write_json(path: Path, result: object) -> None:
    """Writes a result as JSON; numbers that are not finite become null, as JSON has none.

    Raises:
      OutputError: the file cannot be written.
    """
    with replacing(path) as temporary:
        text = json.dumps(_finite(result), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(x: object) -> object:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x
