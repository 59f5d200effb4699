"""Pages and planes on disk, below host memory; nobody waits for the disk."""

import secrets
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kvcompress_jax.storage.files import Files
from kvcompress_jax.storage.folder import PageFolder
from kvcompress_jax.storage.page_file import PageRecord
from kvcompress_jax.storage.stats import DiskStats
from kvcompress_jax.storage.worker import Worker


class DiskTier:
    """Keeps planes by key in a folder, within a budget in bytes; the least recently used ones go
    first. What it holds survives a restart.

    `put`, `get`, `in`, `drop` and `settle` never wait for the disk: one thread writes and reads.
    What waits to be written, and what was read last and is still in memory, is bounded by
    `queue_bytes` each. All methods may be called from any thread.

        tier.put(key, {"fine": planes})      # later:
        planes = tier.get(key)               # None: not here, or not here yet (`key in tier`)
        for key in tier.settle(): ...        # now `get` has them
    """

    def __init__(
        self,
        folder: str | Path,
        budget_bytes: int,
        *,
        model: str,
        codec: str,
        compression: int | None = None,
        queue_bytes: int = 1 << 28,
        pause_s: float = 1.0,
        files: Files | None = None,
    ) -> None:
        """Reads the headers of what is in the folder and starts the thread.

        Args:
          folder: made if need be; for this tier alone. Files that it cannot use stay, and are
            counted.
          budget_bytes: of all files.
          model: fingerprint of the model; pages of others are not used.
          codec: fingerprint of the code that planes are in; pages in others are not used.
          compression: level of zstandard; None: planes as they are.
          queue_bytes: of host memory for what waits to be written, and as many for what was read.
          pause_s: after a write that failed; doubled while they fail, up to a minute.
          files: system calls.

        Raises:
          DiskTierError: the folder cannot be used, or another tier uses it.
          ValueError: a size below 1.
        """
        for name, size in (("budget_bytes", budget_bytes), ("queue_bytes", queue_bytes)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.session = secrets.token_bytes(16)
        store = PageFolder(
            Path(folder),
            budget_bytes,
            model=model,
            codec=codec,
            session=self.session,
            compression=compression,
            files=files or Files(),
        )
        self._work = Worker(store, queue_bytes=queue_bytes, pause_s=pause_s)
        # The thread does not hold the tier: one that nobody holds ends its thread.
        self._finalizer = weakref.finalize(self, Worker.stop, self._work)

    def __contains__(self, key: object) -> bool:
        """Whether `get` has the planes, or will have them."""
        work = self._work
        with work.condition:
            return isinstance(key, bytes) and work.has(key)

    def __len__(self) -> int:
        """Pages on disk."""
        return len(self._work.store.index)

    @property
    def used_bytes(self) -> int:
        """Of files."""
        return self._work.store.used_bytes

    def put(
        self,
        key: bytes,
        planes: Mapping[str, np.ndarray],
        *,
        level: int = 0,
        tokens_hash: bytes = b"",
        durable: bool = True,
    ) -> bool:
        """Takes planes to write them; they must not change any more.

        Args:
          key: 1 to 64 bytes; what was there under it is replaced.
          planes: arrays in host memory, by name.
          level: of the page, to tell whoever inspects the file.
          tokens_hash: of the page's tokens, likewise.
          durable: whether they mean anything after this process; if not, nobody waits for the disk
            and the next tier in this folder deletes them.

        Returns:
          Whether they were taken; False when too much waits to be written already.

        Raises:
          ValueError: key or planes are not what a page file can hold, or the tier is closed.
        """
        work = self._work
        record = PageRecord(
            key=key,
            model=work.store.model,
            codec=work.store.codec,
            level=level,
            tokens_hash=tokens_hash,
            session=b"" if durable else self.session,
            planes=dict(planes),
        )
        return work.put(record)

    def get(self, key: bytes) -> Mapping[str, np.ndarray] | None:
        """The planes of a key, if they are in memory; if they are on disk, begins to read them.

        Returns:
          Read-only arrays by name, which stay in memory until `drop`, or until others that were
          read since take their room. None: there are none, or, if `key in tier`, not yet; ask
          again when `settle` names the key.
        """
        return self._work.get(key)

    def load(self, key: bytes, *, timeout_s: float) -> Mapping[str, np.ndarray] | None:
        """Like `get`, but waits for the disk, at most so many seconds."""
        work, end = self._work, time.monotonic() + timeout_s
        while (planes := work.get(key)) is None and key in self:
            with work.condition:
                left = end - time.monotonic()
                if left <= 0:
                    return None
                if not work.has_arrived(key):
                    work.condition.wait(left)
        return planes

    def drop(self, key: bytes) -> None:
        """Forgets the planes of a key, if they are here."""
        self._work.drop(key)

    def clear(self) -> None:
        """Forgets all planes."""
        for key in self._work.all_keys():
            self._work.drop(key)

    def settle(self) -> list[bytes]:
        """Keys whose reads, begun by `get`, ended since the last call, well or not."""
        return self._work.settle()

    def flush(self, *, timeout_s: float) -> bool:
        """Waits until nothing is queued, or writing fails, or time is up; whether nothing is."""
        work = self._work
        with work.condition:
            work.condition.wait_for(lambda: work.idle or work.paused, timeout_s)
            return work.idle

    def stats(self) -> DiskStats:
        """Figures of the moment."""
        work, store = self._work, self._work.store
        with work.condition:
            return DiskStats(
                budget_bytes=store.budget_bytes,
                used_bytes=store.used_bytes,
                pages=len(store.index),
                queued_bytes=work.queued_bytes,
                arrived_bytes=work.arrived_bytes,
                written=store.counters.written,
                read=store.counters.read,
                hits=work.counters.hits,
                misses=work.counters.misses,
                dropped=store.counters.dropped,
                refused=work.counters.refused + store.counters.refused,
                lost=work.counters.lost,
                damaged=store.counters.damaged,
                skipped=store.counters.skipped,
                errors=work.counters.errors,
            )

    def verify(self, *, timeout_s: float = 30.0) -> None:
        """Checks the bytes that are claimed against the files and the planes in memory; waits until
        nothing is queued.

        Raises:
          AssertionError: something does not add up.
          TimeoutError: there was still something queued when time was up, or writing fails.
        """
        work = self._work
        if not self.flush(timeout_s=timeout_s):
            raise TimeoutError("verify: expected an idle disk tier, got one that cannot write")
        with work.condition:
            work.verify()

    def close(self, *, timeout_s: float = 30.0) -> None:
        """Writes what waits, for at most so many seconds, and ends; a second call does nothing."""
        if self._finalizer.alive:
            self.flush(timeout_s=timeout_s)
            self._finalizer()
