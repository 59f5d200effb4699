"""A process that makes others, which kill themselves with SIGKILL while they write pages.

    python -m tests.storage.killed FOLDER

For every step of a write, FOLDER/STEP-new and FOLDER/STEP-replace are what a tier left behind when
it was killed before that step; FOLDER/random-N when it was killed at any time.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from kvcompress_jax.storage.disk_tier import DiskTier
from kvcompress_jax.storage.files import Files
from tests.storage.pages import planes

STEPS = ("create", "write", "write again", "sync", "close", "rename", "sync_folder", "end")
KEPT = 3
RANDOM = 8


class Deadly(Files):
    """Kills the process before the named step, once armed."""

    step: str | None = None
    written = 0

    def _at(self, step):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def create(self, path):
        self._at("create")
        return super().create(path)

    def write(self, handle, data):
        self._at("write" if self.written == 0 else "write again")
        self.written += self.step is not None
        return super().write(handle, data[: 1 + len(data) // 2])

    def sync(self, handle):
        self._at("sync")
        super().sync(handle)

    def close(self, handle):
        self._at("close")
        super().close(handle)

    def rename(self, source, target):
        self._at("rename")
        super().rename(source, target)

    def sync_folder(self, folder):
        self._at("sync_folder")
        super().sync_folder(folder)
        self._at("end")


def write_and_die(folder: Path, step: str, key: bytes) -> None:
    files = Deadly()
    tier = DiskTier(folder, 1 << 20, model="m", codec="c", files=files)
    for i in range(KEPT):
        tier.put(b"%d" % i, planes(i))
    assert tier.flush(timeout_s=60)
    files.step = step
    tier.put(key, planes(100))
    tier.flush(timeout_s=60)


def write_for_ever(folder: Path) -> None:
    tier = DiskTier(folder, 1 << 20, model="m", codec="c", compression=1)
    n = 0
    while True:
        tier.put(b"%d" % (n % 50), planes(n % 50))
        tier.drop(b"%d" % (n * 7 % 50))
        n += 1
        tier.flush(timeout_s=60)


def die(what, *args) -> None:
    """Runs something in a process of its own, which must be killed and not end."""
    pid = os.fork()
    if pid == 0:
        try:
            what(*args)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (args, status)


def kill(folder: Path, seconds: float) -> None:
    """Kills a process that writes for ever, some time after it began to."""
    pid = os.fork()
    if pid == 0:
        try:
            write_for_ever(folder)
        finally:
            os._exit(1)
    while len(list(folder.glob("*.kvpage"))) < 5:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), status


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for step in STEPS:
        die(write_and_die, root / f"{step}-new", step, b"new")
        die(write_and_die, root / f"{step}-replace", step, b"1")
    for n in range(RANDOM):
        kill(root / f"random-{n}", random.Random(n).uniform(0.0, 0.1))
