"""A cache on eight simulated devices. They must be asked for before JAX starts: `checks` runs in a
process of its own, once, and each of its checks is a test here."""

import json
import os
import subprocess
import sys

import pytest

from tests.sharding.checks import CHECKS, DEVICES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharding") / "results.json"
    # Compiling takes half the time at level 1, and a sum that is rounded otherwise still shows.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    flags += " --xla_backend_optimization_level=1"
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharding.checks", str(path)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(results, check):
    assert not results[check], results[check]
