"""The system calls behind pages on disk, in one place: what can fail, fails here."""

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from kvcompress_jax.storage.errors import PageFileError

TEMPORARY = ".tmp"
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Files:
    """System calls. Tests replace single methods to inject faults; all raise `OSError`."""

    def create(self, path: Path) -> int:
        """Opens a new file that nobody else can read."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, handle: int, data: memoryview) -> int:
        """Writes some of the data; returns how much."""
        return os.write(handle, data)

    def sync(self, handle: int) -> None:
        """Waits until what was written is on the disk."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Closes a file."""
        os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Puts a file in the place of another one, at once."""
        os.replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        """Waits until the names in a folder are on the disk."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def delete(self, path: Path) -> None:
        """Removes a file; one that is not there is no error."""
        path.unlink(missing_ok=True)

    def read(self, path: Path, most_bytes: int | None = None) -> tuple[bytes, int]:
        """The beginning of a file, or all of it, and its size.

        Raises:
          PageFileError: it is no regular file. Links are not followed and pipes do not block.
        """
        handle = os.open(path, _READ)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise PageFileError("foreign", "expected a regular file")
            size = status.st_size
            left = size if most_bytes is None else min(size, most_bytes)
            parts = []
            while left > 0 and (part := os.read(handle, left)):
                parts.append(part)
                left -= len(part)
            return b"".join(parts), size
        finally:
            os.close(handle)


def write_atomically(
    files: Files, path: Path, parts: Iterable[bytes], *, durable: bool = True
) -> None:
    """Writes a file that is there as a whole or not at all, whatever happens in between.

    Args:
      files: system calls.
      path: of the file; a file that is there is replaced.
      parts: its bytes.
      durable: whether it must survive a crash of the machine: waits for the disk.

    Raises:
      OSError: it could not be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with contextlib.suppress(OSError):
        files.delete(temporary)
    handle = files.create(temporary)
    try:
        try:
            for part in parts:
                data = memoryview(part)
                while data:
                    data = data[files.write(handle, data) :]
            if durable:
                files.sync(handle)
        finally:
            files.close(handle)
        files.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            files.delete(temporary)
        raise
    if durable:
        files.sync_folder(path.parent)
