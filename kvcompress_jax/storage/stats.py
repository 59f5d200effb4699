"""Figures of a disk tier."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DiskStats:
    """Figures of the moment, and counts since the tier was made; pages unless said otherwise."""

    budget_bytes: int = 0
    used_bytes: int = 0  # of files
    pages: int = 0
    queued_bytes: int = 0  # planes in memory that wait to be written
    arrived_bytes: int = 0  # planes in memory that were read
    written: int = 0
    read: int = 0
    hits: int = 0  # `get` that returned planes
    misses: int = 0  # `get` of a key that was not there
    dropped: int = 0  # deleted for lack of room on disk
    refused: int = 0  # not taken: the queue was full, or larger than the budget
    lost: int = 0  # taken, and could not be written
    damaged: int = 0  # could not be read back as it was written
    skipped: int = 0  # files found at the start that are not ours to read
    errors: int = 0  # of the system, writing or reading
