"""The disk tier: nobody waits, nothing is mixed up, a restart finds everything."""

import gc
import logging
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import kvcompress_jax
from kvcompress_jax.storage.disk_tier import DiskTier
from kvcompress_jax.storage.errors import DiskTierError
from tests.storage.pages import (
    BROKEN,
    FULL,
    READ_ONLY,
    FailingFiles,
    planes,
    record,
    same_planes,
)

ROOM = 1 << 20


def tier_in(folder, budget_bytes=ROOM, **options):
    return DiskTier(folder, budget_bytes, **({"model": "m", "codec": "c"} | options))


@pytest.fixture
def tier(tmp_path):
    tier = tier_in(tmp_path / "pages")
    yield tier
    tier.close()


def test_planes_come_back(tier):
    for i in range(5):
        assert tier.put(b"%d" % i, planes(i), level=2)
    assert tier.flush(timeout_s=30)
    assert len(tier) == 5 and b"3" in tier and b"5" not in tier
    assert tier.get(b"3") is None  # on disk: begins to read
    assert same_planes(tier.load(b"3", timeout_s=30), planes(3))
    assert not same_planes(tier.load(b"2", timeout_s=30), planes(3))
    assert tier.get(b"5") is None and tier.load(b"5", timeout_s=30) is None
    assert sorted(tier.settle()) == [b"2", b"3"] and tier.settle() == []
    stats = tier.stats()
    assert (stats.written, stats.read, stats.hits, stats.misses) == (5, 2, 2, 2)
    assert stats.errors == stats.lost == stats.damaged == 0
    assert stats.arrived_bytes == 2 * sum(p.nbytes for p in planes().values())
    tier.drop(b"2")
    tier.drop(b"3")
    assert tier.stats().arrived_bytes == 0 and tier.get(b"3") is None and b"3" not in tier


def test_empty_again(tier):
    for i in range(5):
        tier.put(b"%d" % i, planes(i))
    tier.load(b"0", timeout_s=30)
    tier.put(b"late", planes(9))
    tier.clear()
    assert not any(key in tier for key in (b"0", b"1", b"4", b"late"))
    tier.verify()
    assert len(tier) == 0 and tier.used_bytes == 0
    tier.put(b"1", planes(7))
    assert same_planes(tier.load(b"1", timeout_s=30), planes(7))


def test_a_restart_finds_everything(tmp_path):
    with_scale = {"fine": np.arange(256, dtype=np.uint8).reshape(4, 64)}
    first = tier_in(tmp_path, compression=3)
    first.put(b"a", with_scale)
    first.put(b"a", planes(1))  # replaces
    first.put(b"gone", planes(2))
    first.put(b"not for long", planes(3), durable=False)
    first.flush(timeout_s=30)
    first.drop(b"gone")
    assert b"gone" not in first
    first.close()
    with pytest.raises(ValueError, match="put: expected an open tier, it is closed"):
        first.put(b"b", planes())
    assert len(os.listdir(tmp_path)) == 3  # the lock as well
    second = tier_in(tmp_path)
    assert same_planes(second.load(b"a", timeout_s=30), planes(1))
    assert b"gone" not in second and b"not for long" not in second
    assert len(second) == 1 and second.stats().skipped == 0
    assert second.used_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.kvpage"))
    second.close()


def test_a_tier_that_nobody_holds_leaves_the_folder(tmp_path):
    tier_in(tmp_path).put(b"a", planes())
    gc.collect()
    again = tier_in(tmp_path)
    assert again.load(b"a", timeout_s=30) is not None
    with pytest.raises(DiskTierError, match="expected it for us alone, another tier uses it"):
        tier_in(tmp_path)
    again.close()
    tier_in(tmp_path).close()


def test_the_budget_holds_and_the_least_used_go(tmp_path):
    one = sum(len(p) for p in encoded(0))
    tier = tier_in(tmp_path, 3 * one + 10)
    for i in range(3):
        tier.put(b"%d" % i, planes(i))
    tier.flush(timeout_s=30)
    tier.load(b"0", timeout_s=30)
    tier.put(b"3", planes(3))
    tier.flush(timeout_s=30)
    assert [k in tier for k in (b"0", b"1", b"2", b"3")] == [True, False, True, True]
    on_disk = sum(p.stat().st_size for p in tmp_path.glob("*.kvpage"))
    assert on_disk == tier.used_bytes <= 3 * one + 10
    tier.put(b"huge", {"fine": np.ones(4 * one, np.uint8)})
    tier.flush(timeout_s=30)
    stats = tier.stats()
    assert b"huge" not in tier and (stats.dropped, stats.refused, stats.pages) == (1, 1, 3)
    tier.close()
    smaller = tier_in(tmp_path, one + 10)
    assert len(smaller) == 1 and smaller.used_bytes <= one + 10
    smaller.close()


def encoded(seed):
    from kvcompress_jax.storage.page_file import encode_page

    return encode_page(record(seed, key=b"%d" % seed, model="m", codec="c", tokens_hash=b""))


class SlowFiles(FailingFiles):
    """Writes and reads wait until they may."""

    def __init__(self):
        super().__init__()
        self.may = threading.Event()

    def create(self, path):
        assert self.may.wait(30)
        return super().create(path)

    def read(self, path, most_bytes=None):
        assert most_bytes is not None or self.may.wait(30)
        return super().read(path, most_bytes)


def test_nobody_waits_for_the_disk_and_queues_are_bounded(tmp_path):
    files = SlowFiles()
    size = sum(p.nbytes for p in planes().values())
    tier = tier_in(tmp_path, files=files, queue_bytes=4 * size)
    start = time.monotonic()
    taken = [tier.put(b"%d" % i, planes(i)) for i in range(20)]
    assert taken == [True] * 4 + [False] * 16
    assert same_planes(tier.get(b"2"), planes(2))  # from the queue
    assert same_planes(tier.get(b"0"), planes(0))  # being written
    tier.drop(b"0")
    assert b"0" not in tier and b"1" in tier
    assert tier.stats().queued_bytes <= 4 * size
    assert time.monotonic() - start < 5
    files.may.set()
    assert tier.flush(timeout_s=30)
    assert b"0" not in tier and len(tier) == 3 and tier.stats().refused == 16
    files.may.clear()
    start = time.monotonic()
    assert tier.get(b"1") is None and b"1" in tier
    assert tier.load(b"1", timeout_s=0.05) is None
    tier.drop(b"1")  # while it is read
    assert time.monotonic() - start < 5
    files.may.set()
    assert tier.flush(timeout_s=30)
    assert tier.settle() == [b"1"] and tier.get(b"1") is None
    tier.close()


def test_what_nobody_fetches_does_not_pile_up(tmp_path):
    size = sum(p.nbytes for p in planes().values())
    tier = tier_in(tmp_path, queue_bytes=3 * size)
    for i in range(8):
        tier.put(b"%d" % i, planes(i))
        tier.flush(timeout_s=30)
    for i in range(8):
        assert tier.get(b"%d" % i) is None
    assert tier.flush(timeout_s=30)
    assert len(tier.settle()) == 8 and tier.stats().arrived_bytes == 3 * size
    assert same_planes(tier.get(b"7"), planes(7)) and tier.get(b"0") is None and b"0" in tier
    tier.close()


@pytest.mark.parametrize(
    ("step", "error"),
    [("create", READ_ONLY), ("write", FULL), ("write", BROKEN), ("sync", FULL), ("rename", FULL)],
)
def test_a_disk_that_fails_loses_a_page_and_nothing_else(tmp_path, caplog, step, error):
    files = FailingFiles()
    tier = tier_in(tmp_path, files=files, pause_s=600.0)
    tier.put(b"before", planes(0))
    assert tier.flush(timeout_s=30)
    files.failing[step] = error
    with caplog.at_level(logging.WARNING):
        assert tier.put(b"lost", planes(1))
        assert tier.put(b"later", planes(2))
        tier.flush(timeout_s=30)
    assert os.strerror(error) in caplog.text
    assert b"lost" not in tier and tier.stats().lost == tier.stats().errors == 1
    assert same_planes(tier.load(b"before", timeout_s=30), planes(0))
    assert same_planes(tier.get(b"later"), planes(2))  # waits in memory
    files.failing.clear()
    assert [p.name for p in tmp_path.glob(".*.tmp")] == []
    tier.close()
    again = tier_in(tmp_path)
    assert len(again) == 1 and again.stats().skipped == 0
    assert same_planes(again.load(b"before", timeout_s=30), planes(0))
    again.close()


def test_writing_goes_on_after_a_pause(tmp_path):
    files = FailingFiles()
    tier = tier_in(tmp_path, files=files, pause_s=0.05)
    files.failing["write"] = FULL
    tier.put(b"lost", planes(1))
    tier.flush(timeout_s=30)
    files.failing.clear()
    tier.put(b"later", planes(2))
    end = time.monotonic() + 60
    while not tier.flush(timeout_s=30) and time.monotonic() < end:
        time.sleep(0.01)
    assert len(tier) == 1 and tier.stats().lost == 1
    assert same_planes(tier.load(b"later", timeout_s=30), planes(2))
    tier.close()


def test_pages_that_cannot_be_read_are_misses(tmp_path, caplog):
    files = FailingFiles()
    tier = tier_in(tmp_path, files=files)
    for i in range(3):
        tier.put(b"%d" % i, planes(i))
    tier.flush(timeout_s=30)
    (tmp_path / (b"1".hex() + ".kvpage")).write_bytes(b"overwritten")
    with caplog.at_level(logging.WARNING):
        assert tier.load(b"1", timeout_s=30) is None
        files.failing["read"] = BROKEN
        assert tier.load(b"2", timeout_s=30) is None
        files.failing.clear()
    assert "expected a page file" in caplog.text and os.strerror(BROKEN) in caplog.text
    assert b"1" not in tier and b"2" not in tier and tier.stats().damaged == 2
    assert same_planes(tier.load(b"0", timeout_s=30), planes(0))
    assert tier.used_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.kvpage"))
    tier.close()


def test_a_page_is_on_the_disk_before_its_name_is(tmp_path):
    files = FailingFiles()
    tier = tier_in(tmp_path, files=files)
    files.calls.clear()
    tier.put(b"a", planes())
    tier.flush(timeout_s=30)
    steps = [c for i, c in enumerate(files.calls) if files.calls[i - 1 : i] != [c]]
    assert steps == ["delete", "create", "write", "sync", "rename", "sync_folder"]
    files.calls.clear()
    tier.put(b"a", planes(1), durable=False)  # nobody needs it after a crash
    tier.flush(timeout_s=30)
    assert not {"sync", "sync_folder"} & set(files.calls) and "rename" in files.calls
    tier.close()


def test_what_could_not_be_written_at_the_end_is_said(tmp_path, caplog):
    files = FailingFiles()
    files.failing["write"] = FULL
    tier = tier_in(tmp_path, files=files, pause_s=60.0)
    for i in range(3):
        tier.put(b"%d" % i, planes(i))
    start = time.monotonic()
    tier.close()
    assert time.monotonic() - start < 30  # the pause is not waited for
    assert tier.stats().lost == 3 and "closed, 2 pages not written" in caplog.text


def test_clocks_that_jump(tmp_path):
    """Files from the future are files; what is put after a restart is newer all the same."""
    one = sum(len(p) for p in encoded(0))
    tier = tier_in(tmp_path)
    for i in range(3):
        tier.put(b"%d" % i, planes(i))
    tier.flush(timeout_s=30)
    tier.close()
    for i, year in enumerate((2100, 1970, 2026)):
        at = (year - 1970) * 31_556_952
        os.utime(tmp_path / f"{(b'%d' % i).hex()}.kvpage", (at, at))
    tier = tier_in(tmp_path, 3 * one + 10)
    assert len(tier) == 3 and tier.stats().skipped == 0
    for i in (3, 4):
        tier.put(b"%d" % i, planes(i))
        tier.flush(timeout_s=30)
    assert [b"%d" % i in tier for i in range(5)] == [True, False, False, True, True]
    tier.close()


def test_durations_are_not_measured_with_a_clock_that_can_jump():
    root = Path(kvcompress_jax.__file__).parent
    wall = re.compile(r"\btime\.time\(|\bdatetime\.(now|utcnow)\(|\bdate\.today\(")
    assert wall.search("start = time.time()")
    found = [str(p) for p in root.rglob("*.py") if wall.search(p.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_bytes": 0}, "budget_bytes: expected at least 1, got 0"),
        ({"queue_bytes": 0}, "queue_bytes: expected at least 1, got 0"),
    ],
)
def test_errors(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        tier_in(tmp_path, **arguments)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskTierError, match="expected a folder to write to: "):
        tier_in(tmp_path / "file")


def test_bad_planes_are_refused_at_once(tier):
    with pytest.raises(ValueError, match="key: expected 1 to 64 bytes, got b''"):
        tier.put(b"", planes())
    with pytest.raises(ValueError, match=r"plane x: expected one of .*, got 'float64'"):
        tier.put(b"a", {"x": np.zeros(3)})
    assert b"a" not in tier
