"""Fine planes in host memory and on disk come back bit for bit, or the promotion is refused."""

import dataclasses

import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.manager import KVCacheManager
from kvcompress_jax.manager.disk import code_fingerprint, open_disk_tier
from kvcompress_jax.manager.host_tier import HostTier
from kvcompress_jax.paged import PoolSizes
from kvcompress_jax.storage import DiskTier
from tests.manager.fake_device import FakeDevice, fake_cache
from tests.storage.pages import FULL, FailingFiles

PAGES, SIZE = 8, 16
SIZES = PoolSizes(raw_pages=PAGES, sealed_pages=PAGES, fine_chunks=2 * PAGES, sink_slots=1)
CONFIG = CompressionConfig(
    page_size=SIZE, window_tokens=0, host_bytes=40, disk_path="unset", disk_bytes=1 << 16
)
LAYOUT = CONFIG.layout(layers=2, kv_heads=1, head_dim=2, dtype="float32")


class Cache:
    """A sequence of eight pages at level 1, and their fine planes."""

    def __init__(self, disk):
        self.manager = KVCacheManager(
            LAYOUT, SIZES, CONFIG, max_sequences=1, disk=disk, device=FakeDevice()
        )
        self.cache = fake_cache(LAYOUT, SIZES)
        self.sequence = self.manager.add()
        slots = self.manager.append_slots(self.sequence, PAGES * SIZE)
        raw, at = slots // SIZE, slots % SIZE
        self.cache.raw[:, raw, :, :, at] = np.arange(PAGES * SIZE, dtype=np.float32)[
            :, None, None, None, None
        ]
        self.cache.mass[...] = self.cache.seen[...] = 0.0
        self.advance()
        self.pages = list(self.manager.pages.values())
        assert [p.level for p in self.pages] == [1] * PAGES
        self.planes = [self.cache.fine[list(p.chunks)].copy() for p in self.pages]
        assert len({p.tobytes() for p in self.planes}) == PAGES

    def advance(self):
        self.cache = self.manager.advance(self.cache)

    def demote_all(self):
        self.manager.demote_pages(self.sequence, range(PAGES))
        self.advance()
        assert [p.level for p in self.pages] == [2] * PAGES
        self.cache.fine[...] = 255  # free chunks hold nothing

    def promote_all(self):
        self.manager.promote_pages(self.sequence, range(PAGES))
        for _ in range(PAGES):
            self.advance()
            self.manager.host.disk.flush(timeout_s=30)

    def at_level_1(self):
        """Which pages are there, with the right bits."""
        for page, planes in zip(self.pages, self.planes, strict=True):
            if page.level == 1:
                assert np.array_equal(self.cache.fine[list(page.chunks)], planes)
        return [p.index for p in self.pages if p.level == 1]


def disk_in(folder, **options):
    return DiskTier(folder, CONFIG.disk_bytes, model="m", codec="c", **options)


def test_planes_go_down_and_come_back_bit_for_bit(tmp_path):
    disk = disk_in(tmp_path)
    lives = Cache(disk)
    lives.demote_all()
    manager = lives.manager
    assert manager.host.used_bytes <= CONFIG.host_bytes < 2 * lives.planes[0].nbytes
    assert disk.flush(timeout_s=30)
    stats = manager.get_compression_stats()
    assert stats["disk_pages"] == stats["disk_pages_written"] == PAGES - 1
    assert stats["disk_bytes"] == sum(f.stat().st_size for f in tmp_path.glob("*.kvpage"))
    assert stats["disk_budget_bytes"] == CONFIG.disk_bytes and stats["planes_dropped"] == 0
    manager.verify(lives.cache)
    lives.promote_all()
    assert lives.at_level_1() == list(range(PAGES))
    stats = manager.get_compression_stats()
    assert stats["promotions"] == PAGES and stats["refusals"] == 0
    assert stats["disk_pages_read"] == PAGES - 1 and stats["disk_pages"] == 0
    manager.verify(lives.cache)
    manager.free(lives.sequence)
    manager.verify(lives.cache)
    assert manager.get_compression_stats()["disk_queue_bytes"] == 0
    disk.close()


def test_the_planes_of_another_manager_are_not_ours(tmp_path):
    """Uids begin anew; the same disk may serve both."""
    disk = disk_in(tmp_path)
    first, second = Cache(disk), Cache(disk)
    first.demote_all()
    second.planes = [p ^ 85 for p in second.planes]
    for page, planes in zip(second.pages, second.planes, strict=True):
        second.cache.fine[list(page.chunks)] = planes
    second.demote_all()
    first.promote_all()
    second.promote_all()
    assert first.at_level_1() == second.at_level_1() == list(range(PAGES))
    disk.close()


def test_a_full_disk_means_refusals_and_nothing_else(tmp_path):
    files = FailingFiles()
    disk = disk_in(tmp_path, files=files, pause_s=0.01, queue_bytes=64)
    lives = Cache(disk)
    files.failing["write"] = FULL
    lives.demote_all()
    for _ in range(20):
        disk.flush(timeout_s=0.05)
    lives.promote_all()
    promoted = lives.at_level_1()
    stats = lives.manager.get_compression_stats()
    assert PAGES - 1 in promoted  # the last one was in host memory
    assert 0 < stats["promotions"] == len(promoted) < PAGES
    assert stats["disk_errors"] > 0 and stats["disk_pages_lost"] > 0
    assert stats["promotions"] + stats["refusals"] >= PAGES
    files.failing.clear()
    assert disk.flush(timeout_s=30)
    lives.manager.verify(lives.cache)
    disk.close()


@pytest.mark.parametrize("tamper", ["file", "budget", "memory"])
def test_verify_finds_what_is_not_there(tmp_path, tamper):
    disk = disk_in(tmp_path)
    lives = Cache(disk)
    lives.demote_all()
    assert disk.flush(timeout_s=30)
    lives.manager.verify(lives.cache)
    if tamper == "file":
        next(tmp_path.glob("*.kvpage")).unlink()
        message = "expected .* bytes, got No such file"
    elif tamper == "budget":
        disk._work.store.used_bytes += 1
        message = "disk tier, bytes of files: expected "
    else:
        lives.manager.host._planes.clear()
        message = "bytes of the host tier: expected 32, got 0"
    with pytest.raises(AssertionError, match=message):
        lives.manager.verify(lives.cache)
    disk.close()


def test_no_host_memory_for_planes_that_arrive(caplog):
    class NoMemory:
        nbytes = 32

        def __array__(self, *_, **__):
            raise MemoryError("no room for 32 bytes")

    host = HostTier(100)
    host.put(1, np.zeros(32, np.uint8))
    host.put(2, NoMemory())
    host._arriving.append(2)
    host.settle()
    assert 1 in host and 2 not in host and host.dropped == 1
    assert host.used_bytes == host.measured_bytes() == 32
    assert "no host memory: no room for 32 bytes" in caplog.text


def test_the_tier_that_a_configuration_asks_for(tmp_path):
    ours = dataclasses.replace(CONFIG, disk_path=str(tmp_path / "planes"))
    tier = open_disk_tier(ours, LAYOUT, model_fingerprint="f")
    assert tier.stats().budget_bytes == 1 << 16
    with pytest.raises(ConfigError, match=r"disk_path: .*another tier uses it"):
        open_disk_tier(ours, LAYOUT, model_fingerprint="f")
    tier.close()
    nothing = dataclasses.replace(ours, enabled=False)
    assert open_disk_tier(nothing, LAYOUT, model_fingerprint="f") is None
    alone = dataclasses.replace(CONFIG, disk_path=None)
    with pytest.raises(ConfigError, match="disk_bytes: expected 0 without disk_path, got 65536"):
        open_disk_tier(alone, LAYOUT, model_fingerprint="f")
    assert open_disk_tier(CompressionConfig(), LAYOUT, model_fingerprint="f") is None


def test_codes_that_differ_have_other_names():
    names = {
        code_fingerprint(dataclasses.replace(LAYOUT, **change))
        for change in (
            *({}, {"head_dim": 4}, {"layers": 3}, {"fine_bits": 4}),
            *({"fine_bits": 4, "page_size": 32}, {"fine_bits": 4, "fine_rows": 4}),
        )
    }
    assert len(names) == 6 and code_fingerprint(LAYOUT) in names
