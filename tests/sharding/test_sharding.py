"""A cache on eight simulated devices. They must be asked for before JAX starts: `checks` runs in a
process of its own, once. It is one test, as workers that share tests would each run it anew."""

import json
import os
import subprocess
import sys

import pytest

from tests.sharding.checks import CHECKS, DEVICES


@pytest.mark.first
def test_on_eight_devices(tmp_path):
    path = tmp_path / "results.json"
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
    results = json.loads(path.read_text())
    assert set(results) == set(CHECKS)
    wrong = {check: found for check, found in results.items() if found}
    assert not wrong
