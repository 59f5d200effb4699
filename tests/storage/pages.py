"""Pages to store, and ways for the disk to fail."""

import errno
import os

import ml_dtypes
import numpy as np

from kvcompress_jax.storage.files import Files
from kvcompress_jax.storage.page_file import PageRecord


def planes(seed: int = 0, *, tokens: int = 16) -> dict[str, np.ndarray]:
    """A small page: codes that compress a little, scales, an order."""
    rng = np.random.default_rng(seed)
    return {
        "base": np.minimum(rng.integers(0, 256, (2, 2, tokens, 8)), 99).astype(np.uint8),
        "step": rng.normal(size=(2, 8)).astype(ml_dtypes.bfloat16),
        "zero": rng.normal(size=(2, 8)).astype(np.float16),
        "order": rng.permuted(np.tile(np.arange(tokens, dtype=np.uint8), (2, 1)), axis=1),
    }


def record(seed: int = 0, **changes) -> PageRecord:
    fields = {
        "key": b"key-%d" % seed,
        "model": "tiny-model",
        "codec": "embedded-16",
        "level": 2,
        "tokens_hash": bytes(range(32)),
        "planes": planes(seed),
    }
    return PageRecord(**(fields | changes))


def same_planes(a, b) -> bool:
    """Names, dtypes, shapes and every bit."""
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )


class FailingFiles(Files):
    """The system calls in `failing` fail with an errno, for as long as it is set."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise OSError(self.failing[name], os.strerror(self.failing[name]))

    def create(self, path):
        self._call("create")
        return super().create(path)

    def write(self, handle, data):
        if "write" in self.failing and len(data) > 1:  # a part of it still fits
            super().write(handle, data[: len(data) // 2])
        self._call("write")
        return super().write(handle, data[: max(1, len(data) // 2)])  # short writes are allowed

    def sync(self, handle):
        self._call("sync")
        super().sync(handle)

    def rename(self, source, target):
        self._call("rename")
        super().rename(source, target)

    def sync_folder(self, folder):
        self._call("sync_folder")
        super().sync_folder(folder)

    def delete(self, path):
        self._call("delete")
        super().delete(path)

    def read(self, path, most_bytes=None):
        self._call("read")
        return super().read(path, most_bytes)


FULL, READ_ONLY, BROKEN = errno.ENOSPC, errno.EROFS, errno.EIO
