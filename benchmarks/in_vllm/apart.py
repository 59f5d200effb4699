"""Configurations of vLLM, each measured in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STOCK = "vLLM"
_FED = {"KVCOMPRESS_ERROR_FEEDBACK": "1"}
CONFIGURATIONS = {
    STOCK: {"VLLM_ENABLE_KV_COMPRESSION": "0"},
    "one level": {"VLLM_KV_COMPRESSION_LEVELS": "1"},
    "balanced": {"KVCOMPRESS_RECIPE": "balanced"},
    "balanced, error feedback": {"KVCOMPRESS_RECIPE": "balanced"} | _FED,
    "compact": {"KVCOMPRESS_RECIPE": "compact"},
    "compact, error feedback": {"KVCOMPRESS_RECIPE": "compact"} | _FED,
}
_RESULT = "result: "
_SCRIPTS = Path(__file__).parent.parent


def give(found: object) -> None:
    """Hands a result to the process that `measured_apart` was called in."""
    print(_RESULT + json.dumps(found))


def measured_apart(
    script: str, words: Sequence[str], settings: dict[str, str], *, name: str, gib: int
) -> Any:
    """What a script gives when it is run under some settings of the environment.

    Args:
      script: its name in benchmarks/.
      words: arguments.
      settings: variables of the environment.
      name: of the configuration, for the error.
      gib: of KV memory.

    Raises:
      RuntimeError: it failed; the message ends with what it wrote.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KVCOMPRESS_", "VLLM_"))}
    kept |= {
        "JAX_PLATFORMS": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": str(gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(_SCRIPTS / script), *words],
        env=kept | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith(_RESULT):
            return json.loads(line.removeprefix(_RESULT))
    raise RuntimeError(f"{name}: no result: {(done.stdout + done.stderr)[-2000:]}")
