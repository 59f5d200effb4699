"""Starts `drive.py`, and asks it for engines."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = 900  # for one engine on a busy machine


def environment(settings):
    """Of processes of vLLM: without this process's settings, and with what suits few cores."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KVCOMPRESS_", "VLLM_"))}
    return (
        kept
        | {
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": "1",  # its threads spin, which on few cores is all that they do
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        | settings
    )


class Driver:
    """A process of `drive.py`. It outlives its engines: vLLM is imported once, and what several
    engines have in common is compiled once."""

    def __init__(self, model, name, settings):
        self.log = model.parent / f"{name}.log"
        reading, writing = os.pipe()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "drive.py"), str(model), str(writing)],
                cwd=model.parent,
                env=environment(settings),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                pass_fds=[writing],
                start_new_session=True,
            )
        os.close(writing)
        self.results = os.fdopen(reading)

    def __call__(self, scenario, settings, options):
        """What a scenario found, and what vLLM printed meanwhile."""
        begin = self.log.stat().st_size
        request = {"scenario": scenario, "settings": settings, "options": options}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.results], [], [], SECONDS)
        line = self.results.readline() if ready else ""
        log = self.log.read_text()[begin:]
        assert line, f"{request}: no result within {SECONDS} s: {log[-3000:]}"
        return json.loads(line) | {"log": log}

    def close(self):
        """Ends the process and its children."""
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            self.results.close()
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
