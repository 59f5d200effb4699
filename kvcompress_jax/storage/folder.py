"""A folder of page files: index, budget, and what to do about files that are not right.

Everything here waits for the disk; `DiskTier` does it on a thread.
"""

import collections
import dataclasses
import fcntl
import logging
import os
from pathlib import Path

from kvcompress_jax.storage.errors import DiskTierError, PageFileError
from kvcompress_jax.storage.files import TEMPORARY, Files, write_atomically
from kvcompress_jax.storage.header import MAX_HEADER_BYTES, PageHeader
from kvcompress_jax.storage.page_file import (
    PREFIX_BYTES,
    PageRecord,
    decode_page,
    encode_page,
    read_header,
)

SUFFIX = ".kvpage"
LOCK = ".lock"

logger = logging.getLogger(__name__)


def file_name(key: bytes) -> str:
    """Of a page, within its folder."""
    return key.hex() + SUFFIX


def check_name(path: Path, key: bytes) -> None:
    """Raises PageFileError when a page's file has the name of another page."""
    if path.name != file_name(key):
        raise PageFileError("misnamed", f"expected the name {file_name(key)}, got {path.name}")


def lock(folder: Path) -> int:
    """Takes a folder for this process alone; closing the handle that it returns gives it back.

    Raises:
      DiskTierError: it cannot be written to, or somebody has it.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise DiskTierError(f"{folder}: expected a folder to write to: {e.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise DiskTierError(f"{folder}: expected it for us alone, another tier uses it") from None
    return handle


def is_temporary(name: str) -> bool:
    """Whether it is the name of a file that was never finished."""
    return name.startswith(".") and name.endswith(TEMPORARY)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A page on disk."""

    file_bytes: int
    plane_bytes: int  # in memory


@dataclasses.dataclass
class FolderCounters:
    """Events since the folder was opened; files."""

    written: int = 0
    read: int = 0
    dropped: int = 0  # deleted for lack of room
    skipped: int = 0  # found at the start and not used: see the log
    damaged: int = 0  # were right when written or found, and not when read
    refused: int = 0  # larger than the whole budget


class PageFolder:
    """The pages of one model and code in one folder, which no other process uses meanwhile.

    Attributes:
      index: of the pages that are there, least recently used first.
      used_bytes: of their files.
    """

    def __init__(
        self,
        folder: Path,
        budget_bytes: int,
        *,
        model: str,
        codec: str,
        session: bytes,
        compression: int | None,
        files: Files,
    ) -> None:
        """Makes the folder if need be, and reads the headers of what is there.

        Raises:
          DiskTierError: it cannot be used, or another process uses it.
        """
        self.folder = folder
        self.budget_bytes = budget_bytes
        self.model = model
        self.codec = codec
        self.session = session
        self.compression = compression
        self.files = files
        self.counters = FolderCounters()
        self.index: collections.OrderedDict[bytes, Entry] = collections.OrderedDict()
        self.used_bytes = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise DiskTierError(f"{folder}: expected a folder to write to: {e.strerror}") from None
        self._lock = lock(folder)
        try:
            self._scan()
        except OSError as e:
            self.close()
            raise DiskTierError(f"{folder}: expected a folder to read: {e.strerror}") from None
        self._make_room(0)

    def close(self) -> None:
        """Lets another process have the folder."""
        os.close(self._lock)

    def path(self, key: bytes) -> Path:
        """Of a page's file."""
        return self.folder / file_name(key)

    def write(self, record: PageRecord) -> None:
        """Stores a page in the place of the one under its key; others go if there is no room, least
        recently used first.

        Raises:
          OSError: it could not be written; there is no page under its key then.
        """
        parts = encode_page(record, compression=self.compression)
        size = sum(len(p) for p in parts)
        if size > self.budget_bytes:
            self.counters.refused += 1
            self.delete(record.key)
            return
        old = self.index.get(record.key)
        self._make_room(size - (old.file_bytes if old else 0), keep=record.key)
        path, durable = self.path(record.key), record.session == b""
        try:
            write_atomically(self.files, path, parts, durable=durable)
        except BaseException:
            self.delete(record.key)
            raise
        if old is not None:
            self.used_bytes -= self.index.pop(record.key).file_bytes
        self.index[record.key] = Entry(size, record.nbytes)
        self.used_bytes += size
        self.counters.written += 1

    def read(self, key: bytes) -> PageRecord | None:
        """The page of a key; None if there is none. A file that is not right is deleted."""
        if key not in self.index:
            return None
        path = self.path(key)
        try:
            data, _ = self.files.read(path)
            record = decode_page(data)
            self._check(path, record)
        except (OSError, PageFileError) as e:
            logger.warning("%s: dropped, it cannot be read: %s", path, e)
            self.counters.damaged += 1
            self.delete(key)
            return None
        self.index.move_to_end(key)
        self.counters.read += 1
        return record

    def delete(self, key: bytes) -> None:
        """Forgets a page. A file that the system does not delete is forgotten all the same: the
        next page of that key, or the next start, deals with it."""
        entry = self.index.pop(key, None)
        if entry is None:
            return
        self.used_bytes -= entry.file_bytes
        try:
            self.files.delete(self.path(key))
        except OSError as e:
            logger.warning("%s: cannot be deleted: %s", self.path(key), e.strerror)

    def differences(self) -> list[str]:
        """Where the index does not say what is on disk, a line each."""
        wrong = []
        for key, entry in self.index.items():
            path = self.path(key)
            try:
                got: object = path.stat().st_size
            except OSError as e:
                got = e.strerror
            if got != entry.file_bytes:
                wrong.append(f"{path}: expected {entry.file_bytes} bytes, got {got}")
        claimed = sum(e.file_bytes for e in self.index.values())
        if claimed != self.used_bytes:
            wrong.append(f"disk tier, bytes of files: expected {self.used_bytes}, got {claimed}")
        if self.used_bytes > self.budget_bytes:
            wrong.append(f"disk tier: expected at most {self.budget_bytes}, got {self.used_bytes}")
        return wrong

    def _make_room(self, more_bytes: int, keep: bytes | None = None) -> None:
        for key in list(self.index):
            if self.used_bytes + more_bytes <= self.budget_bytes:
                return
            if key != keep:
                self.delete(key)
                self.counters.dropped += 1

    def _scan(self) -> None:
        """Rebuilds the index from the headers; planes are checked when they are read."""
        found: list[tuple[int, bytes, Entry]] = []
        skipped: collections.Counter[str] = collections.Counter()
        with os.scandir(self.folder) as entries:
            for each in entries:
                path = Path(each.path)
                if each.name == LOCK:
                    continue
                if is_temporary(each.name):
                    self.files.delete(path)  # of a process that was killed while it wrote
                    continue
                try:
                    data, size = self.files.read(path, PREFIX_BYTES + MAX_HEADER_BYTES)
                    header = read_header(data, file_bytes=size)
                    if header.session and header.session != self.session:
                        self.files.delete(path)
                        continue
                    self._check(path, header)
                    modified = each.stat(follow_symlinks=False).st_mtime_ns
                except PageFileError as e:
                    skipped[e.fault] += 1
                    logger.debug("%s: skipped: %s", path, e)
                except OSError as e:
                    skipped["unreadable"] += 1
                    logger.debug("%s: skipped: %s", path, e)
                else:
                    found.append((modified, header.key, Entry(size, header.nbytes)))
        for _, key, entry in sorted(found, key=lambda f: f[0]):
            self.index[key] = entry
            self.used_bytes += entry.file_bytes
        self.counters.skipped = skipped.total()
        if skipped:
            kinds = ", ".join(f"{n} {fault}" for fault, n in sorted(skipped.items()))
            logger.warning(
                "%s: skipped %d of %d files: %s; `kvcompress scrub` says which",
                self.folder,
                skipped.total(),
                skipped.total() + len(found),
                kinds,
            )

    def _check(self, path: Path, header: PageHeader | PageRecord) -> None:
        if (header.model, header.codec) != (self.model, self.codec):
            raise PageFileError(
                "foreign",
                f"expected a page of model {self.model} and code {self.codec},"
                f" got {header.model} and {header.codec}",
            )
        check_name(path, header.key)
