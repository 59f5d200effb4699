import importlib.util
import json
import subprocess
import sys

import pytest

from tests.models.smollm2 import smollm2_file
from tests.vllm.driving import HERE, SECONDS, Driver, environment


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """SmolLM2 as a folder that vLLM reads."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make test-vllm")
    smollm2_file()
    target = tmp_path_factory.mktemp("model") / "smollm2"
    subprocess.run(
        [sys.executable, str(HERE / "model_dir.py"), str(target)],
        cwd=target.parent,
        env=environment({}),
        check=True,
        timeout=SECONDS,
    )
    return target


@pytest.fixture(scope="session")
def profile(model):
    """A calibrated code of 3.5 bits for that folder, in half a minute."""
    path = model.parent / "profile-3.5.safetensors"
    options = ["--bits", "3.5", "--samples", "1", "--sample-tokens", "512", "--out", str(path)]
    subprocess.run(
        [
            *(sys.executable, "-c", "from kvcompress_jax.cli import main; main()"),
            *("calibrate", "--model", str(model), *options),
        ],
        cwd=model.parent,
        env=environment({}),
        check=True,
        timeout=SECONDS,
    )
    return path


@pytest.fixture(scope="session")
def drive(model):
    """`drive(scenario, options, compress=..., **settings)` runs a scenario once for each
    configuration (`anew`: again), in a process that compresses or in one that does not. With
    `fails`, what it raised."""
    drivers, results = {}, {}

    def result(
        scenario,
        options=None,
        *,
        compress=True,
        processes=False,
        fails=False,
        anew=False,
        **settings,
    ):
        options = options or {}
        key = json.dumps([scenario, options, compress, processes, settings])
        if anew or key not in results:
            kind = (compress, processes)
            if kind not in drivers:
                fixed = {
                    "VLLM_ENABLE_KV_COMPRESSION": str(int(compress)),
                    "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)),
                }
                drivers[kind] = Driver(model, f"compress-{compress}-{processes}", fixed)
            results[key] = drivers[kind](scenario, settings, options)
        found = results[key]
        if fails:
            assert "error" in found, f"expected a failure, got {found}"
            return found["error"] + found["log"]
        assert "error" not in found, found["error"] + found["log"][-3000:]
        print(f"{scenario} {options} {settings}: {found['total_seconds']:.0f} s")
        return found

    yield result
    for driver in drivers.values():
        driver.close()
