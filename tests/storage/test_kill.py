"""Killed while it writes, a tier loses the page that was being written and nothing else."""

import subprocess
import sys

import pytest

from kvcompress_jax.storage.disk_tier import DiskTier
from kvcompress_jax.storage.scrub import scrub
from tests.storage.killed import KEPT, RANDOM, STEPS
from tests.storage.pages import planes, same_planes


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Folders of tiers that were killed."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.storage.killed", folder],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["new", "replace"])
def test_killed_before_a_step(left, step, kind):
    folder = left / f"{step}-{kind}"
    before = scrub(folder)
    assert before.bad == []
    assert before.unfinished == (step in ("write", "write again", "sync", "close", "rename"))
    tier = DiskTier(folder, 1 << 20, model="m", codec="c")
    assert tier.stats().skipped == 0 and not list(folder.glob(".*.tmp"))
    visible = STEPS.index(step) > STEPS.index("rename")
    for i in range(KEPT):
        replaced = kind == "replace" and i == 1 and visible
        expected = planes(100) if replaced else planes(i)
        assert same_planes(tier.load(b"%d" % i, timeout_s=30), expected)
    assert len(tier) == KEPT + (kind == "new" and visible)
    if kind == "new" and visible:
        assert same_planes(tier.load(b"new", timeout_s=30), planes(100))
    assert tier.put(b"after", planes(5)) and tier.flush(timeout_s=30)
    tier.close()


def test_killed_at_any_time(left):
    pages = 0
    for n in range(RANDOM):
        folder = left / f"random-{n}"
        report = scrub(folder)
        assert report.bad == [] and report.unfinished <= 1
        tier = DiskTier(folder, 1 << 20, model="m", codec="c")
        assert tier.stats().skipped == 0 and len(tier) == report.pages
        for i in range(50):
            found = tier.load(b"%d" % i, timeout_s=30)
            assert found is None or same_planes(found, planes(i))
        pages += len(tier)
        tier.close()
    assert pages > 2 * RANDOM
