"""The thread that reads and writes pages, and the queues that lead to it and from it."""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Mapping

import numpy as np

from kvcompress_jax.storage.folder import PageFolder
from kvcompress_jax.storage.page_file import PageRecord

LONGEST_PAUSE_SECONDS = 60.0

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class WorkCounters:
    """Events since the start; pages."""

    hits: int = 0
    misses: int = 0
    refused: int = 0
    lost: int = 0
    errors: int = 0


class Worker:
    """Does one thing at a time: reads first, somebody waits for them; then deletions; then writes.

    A write that fails loses its page and makes a pause, twice as long as the last one; what waits
    meanwhile stays in memory. `condition` guards everything here, and is never held during input or
    output.
    """

    def __init__(self, store: PageFolder, *, queue_bytes: int, pause_s: float) -> None:
        self.store = store
        self.queue_bytes = queue_bytes
        self.pause_s = pause_s
        self.condition = threading.Condition()
        self.counters = WorkCounters()
        self.queued_bytes = 0
        self.arrived_bytes = 0
        self._writes: collections.OrderedDict[bytes, PageRecord] = collections.OrderedDict()
        self._drops: set[bytes] = set()
        self._wanted: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._arrived: collections.OrderedDict[bytes, PageRecord] = collections.OrderedDict()
        # Reads that ended; who never asks for them loses the oldest ones.
        self._finished: collections.deque[bytes] = collections.deque(maxlen=1 << 16)
        self._writing: PageRecord | None = None
        self._dropping: bytes | None = None
        self._reading: bytes | None = None
        self._pause_seconds = 0.0
        self._pause_end = 0.0
        self._deadline: float | None = None  # set: finish what is queued until then, and end
        self._thread = threading.Thread(target=self._run, name="kvcompress-disk", daemon=True)
        self._thread.start()

    # Called from any thread

    def has(self, key: bytes) -> bool:
        """Whether the planes of a key are here or will be; `condition` is held already."""
        if key in self._writes or key in self._arrived:
            return True
        if key in self._drops or key == self._dropping:
            return False
        if self._writing is not None and self._writing.key == key:
            return True
        return key in self.store.index

    def has_arrived(self, key: bytes) -> bool:
        """Whether planes that were read are in memory; `condition` is held already."""
        return key in self._arrived

    def put(self, record: PageRecord) -> bool:
        """Queues a write; False when the queue is full."""
        with self.condition:
            if self._deadline is not None:
                raise ValueError("put: expected an open tier, it is closed")
            old = self._writes.get(record.key)
            queued = self.queued_bytes - (old.nbytes if old is not None else 0) + record.nbytes
            if queued > self.queue_bytes:
                self.counters.refused += 1
                return False
            self._forget_arrived(record.key)
            self._writes[record.key] = record
            self.queued_bytes = queued
            self.condition.notify_all()
            return True

    def get(self, key: bytes) -> Mapping[str, np.ndarray] | None:
        """Planes that are in memory; otherwise queues a read, if there is something to read."""
        with self.condition:
            record = self._writes.get(key)
            if record is None and key in self._arrived:
                record = self._arrived[key]
                self._arrived.move_to_end(key)
            writing = self._writing
            if record is None and self.has(key) and writing is not None and writing.key == key:
                record = writing
            if record is not None:
                self.counters.hits += 1
                return record.planes
            if not self.has(key):
                self.counters.misses += 1
            elif key not in self._wanted and key != self._reading and self._deadline is None:
                self._wanted[key] = None
                self.condition.notify_all()
            return None

    def drop(self, key: bytes) -> None:
        """Forgets the planes of a key; their file goes later."""
        with self.condition:
            record = self._writes.pop(key, None)
            if record is not None:
                self.queued_bytes -= record.nbytes
            self._forget_arrived(key)
            self._wanted.pop(key, None)
            on_its_way = self._writing is not None and self._writing.key == key
            if on_its_way or key in self.store.index:
                self._drops.add(key)
            self.condition.notify_all()

    def all_keys(self) -> list[bytes]:
        """Of all planes that are here or will be."""
        with self.condition:
            queued = set(self._writes) | set(self.store.index)
            if self._writing is not None:
                queued.add(self._writing.key)
            return list(queued)

    def settle(self) -> list[bytes]:
        """Keys of the reads that ended since the last call."""
        with self.condition:
            finished = list(self._finished)
            self._finished.clear()
            return finished

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or being done; `condition` is held already."""
        queued = self._writes or self._drops or self._wanted
        busy = self._writing is not None or self._dropping is not None or self._reading is not None
        return not queued and not busy

    @property
    def paused(self) -> bool:
        """Whether writing failed a moment ago; `condition` is held already."""
        return time.monotonic() < self._pause_end

    def verify(self) -> None:
        """Raises AssertionError when bytes are not those that are claimed; idle, and `condition` is
        held already."""
        wrong = []
        for what, claimed, records in (
            ("queued", self.queued_bytes, self._writes.values()),
            ("arrived", self.arrived_bytes, self._arrived.values()),
        ):
            got = sum(r.nbytes for r in records)
            if got != claimed:
                wrong.append(f"disk tier, {what} bytes: expected {claimed}, got {got}")
        wrong += self.store.differences()
        if wrong:
            raise AssertionError("\n".join(wrong))

    def stop(self, timeout_s: float = 5.0) -> None:
        """Does what is queued for at most so many seconds, then ends the thread."""
        with self.condition:
            self._deadline = time.monotonic() + timeout_s
            self.condition.notify_all()
        # A tier that nobody holds may be collected on any thread, also on this one.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The thread

    def _run(self) -> None:
        while self._do_something():
            pass
        if self._writes:
            self.counters.lost += len(self._writes)
            logger.warning("%s: closed, %d pages not written", self.store.folder, len(self._writes))
        self.store.close()

    def _do_something(self) -> bool:
        """One job; False when it is time to end."""
        with self.condition:
            while not self._choose():
                if self._deadline is not None:
                    return False
                left = self._pause_end - time.monotonic() if self._writes else None
                self.condition.wait(None if left is None else max(left, 0.0))
            reading, dropping, writing = self._reading, self._dropping, self._writing
        record, failed = None, False
        try:
            if reading is not None:
                record = self.store.read(reading)
            elif dropping is not None:
                self.store.delete(dropping)
            elif writing is not None:
                self.store.write(writing)
        except (OSError, MemoryError) as e:
            failed = True
            logger.warning("%s: %s", self.store.folder, _reason(e))
        except Exception:  # a bug; the tier goes on without this page
            failed = True
            logger.exception("%s: not expected", self.store.folder)
        with self.condition:
            self._reading = self._dropping = self._writing = None
            self.counters.errors += failed
            if reading is not None:
                self._end_read(reading, record)
            if writing is not None:
                self._end_write(writing, failed)
            self.condition.notify_all()
        return True

    def _choose(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return False
        if self._wanted:
            self._reading, _ = self._wanted.popitem(last=False)
        elif self._drops:
            self._dropping = self._drops.pop()
        elif self._writes and not self.paused:
            _, self._writing = self._writes.popitem(last=False)
        else:
            return False
        return True

    def _end_read(self, key: bytes, record: PageRecord | None) -> None:
        self._finished.append(key)
        if record is None or key in self._drops or key in self._writes:
            return
        while self._arrived and self.arrived_bytes + record.nbytes > self.queue_bytes:
            self._forget_arrived(next(iter(self._arrived)))  # it is still on disk
        self._arrived[key] = record
        self.arrived_bytes += record.nbytes

    def _end_write(self, record: PageRecord, failed: bool) -> None:
        self.queued_bytes -= record.nbytes
        if not failed:
            self._pause_seconds = 0.0
            return
        self.counters.lost += 1
        twice = 2 * self._pause_seconds
        self._pause_seconds = min(max(twice, self.pause_s), LONGEST_PAUSE_SECONDS)
        self._pause_end = time.monotonic() + self._pause_seconds

    def _forget_arrived(self, key: bytes) -> None:
        record = self._arrived.pop(key, None)
        if record is not None:
            self.arrived_bytes -= record.nbytes


def _reason(error: OSError | MemoryError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or repr(error)
