"""The benchmarks of the manager measure what they say, on a small scale."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import manager_overhead
import tiering


def test_a_step_without_seals_asks_the_device_for_nothing():
    """The hot path: what would wait for the device is called for seals alone, once a plan."""
    manager, ids = manager_overhead.filled(6, 4, pressure=1.0)
    calls = []
    manager.device.sealed = lambda cache: calls.append("sealed") or manager.device.all_sealed
    for name in ("apply", "fine_planes", "heat"):
        before = getattr(manager.device, name)
        setattr(
            manager.device,
            name,
            lambda *args, name=name, before=before: calls.append(name) or before(*args),
        )
    quiet = sealing = 0
    for step in range(130):
        calls.clear()
        seals = manager.counters.seals
        manager_overhead.step(manager, ids)
        if manager.counters.seals == seals:
            quiet += 1
            assert calls in ([], ["heat"])  # begun, not waited for
        else:
            sealing += 1
            assert [c for c in calls if c != "heat"] == ["apply", "sealed"]
        del step
    assert quiet > 100 and sealing in (12, 13)


def test_the_overhead_is_that_of_steps_that_seal():
    found = manager_overhead.measure(8, 6, 64, pressure=0.25)
    assert found["seals_a_step"] == 8 / 64
    assert found["demotions_a_step"] > 0
    parts = found["advance"] + found["append_step"] + found["table"]
    assert 0 < found["fastest"] <= found["median"] <= found["p99"]
    assert parts > 0


@pytest.mark.parametrize("policy", tiering.POLICIES)
def test_a_simulation_adds_up(policy):
    found = tiering.simulate("documents", policy, steps=60, refined=0.02, seed=1)
    mass = [found[f"mass at level {level}"] for level in range(3)]
    assert np.isclose(sum(mass), 1.0)
    assert mass[2] > 0  # there is pressure
    assert 0 <= found["prompt tokens found"] < 1
