"""The one error of reading a model."""

import contextlib
from collections.abc import Iterator


class ModelError(ValueError):
    """A model that cannot be read or is not supported; the message is one line that names it."""


@contextlib.contextmanager
def settings_of(where: str) -> Iterator[None]:
    """Turns the `ValueError` of settings that were read from a file into one that names it.

    Args:
      where: the file.

    Raises:
      ModelError: instead of any other `ValueError`.
    """
    try:
        yield
    except ModelError:
        raise
    except ValueError as e:
        raise ModelError(f"{where}: {one_line(e)}") from e


def one_line(error: BaseException) -> str:
    """Message of an error of another package: its start, without line breaks."""
    return " ".join(str(error).split())[:200] or type(error).__name__
