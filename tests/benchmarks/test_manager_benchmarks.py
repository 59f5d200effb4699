"""The benchmarks of the manager measure what they say, on a small scale."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import manager_overhead
import tiering

from kvcompress_jax.config import CompressionConfig


class Outcome:
    """What a plan's seals became: a busy device knows it a step later."""

    def __init__(self, clock, waits):
        self.clock, self.begun, self.waits = clock, clock.step, waits

    def __array__(self, dtype=None, copy=None):
        if self.clock.step == self.begun:
            self.waits.append(self.begun)
        return np.ones(16, bool)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("window_tokens", [64, 1, 0])
def test_decoding_waits_for_no_seal(window_tokens, ahead):
    """The hot path, and the judge that sees waiting: without a window a page is full just when it
    is due, and where nobody looks ahead, its seal is begun when somebody needs it."""
    config = CompressionConfig(window_tokens=window_tokens)
    manager, ids = manager_overhead.filled(6, 4, pressure=1.0, config=config)
    manager.advance(None)  # what is due after the last steps of the prompts
    clock, calls, waits = SimpleNamespace(step=0), [], []
    manager.device.sealed = lambda cache: pytest.fail("waits")

    def apply(cache, plan):
        calls.append("apply")
        return cache, None if plan.seals is None else Outcome(clock, waits)

    manager.device.apply = apply
    if not ahead:
        manager.look_ahead = lambda cache: cache
    sealing = 0
    for clock.step in range(130):
        calls.clear()
        seals = manager.counters.seals
        manager_overhead.step(manager, ids)
        sealing += manager.counters.seals > seals
        assert len(calls) <= 1
    assert sealing in (12, 13)
    assert bool(waits) == (window_tokens == 0 and not ahead)


def test_the_overhead_is_that_of_steps_that_seal():
    found = manager_overhead.measure(8, 6, 64, pressure=0.25)
    assert found["seals_a_step"] == 8 / 64
    assert found["demotions_a_step"] > 0
    assert all(found[part] > 0 for part in ("advance", "append_step", "table", "look_ahead"))
    assert 0 < found["fastest"] <= found["median"] <= found["p99"]
    assert 0 < found["before the step"] < found["median"]


@pytest.mark.parametrize("policy", tiering.POLICIES)
def test_a_simulation_adds_up(policy):
    found = tiering.simulate("documents", policy, steps=60, refined=0.02, seed=1)
    mass = [found[f"mass at level {level}"] for level in range(3)]
    assert np.isclose(sum(mass), 1.0)
    assert mass[2] > 0  # there is pressure
    assert 0 <= found["prompt tokens found"] < 1
