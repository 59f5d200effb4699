"""Where users meet the figures: `llm.kv_cache_manager`, and the server's `/metrics`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from tests.vllm.driving import SECONDS, environment

SPACE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
SERVER = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
TRANSFER = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "KVCompressOffloadingSpec",
        "spec_module_path": "kvcompress_jax.interop.vllm.offload",
        "cpu_bytes_to_use": 100 << 20,
    },
}


def test_the_specification_s_example_in_several_processes(drive):
    result = drive("snippet", processes=True, VLLM_CPU_CI_ENV="1", **SPACE)
    assert "Memory saved: 0.00 MB" in result["log"]
    assert "Average compression ratio: 1.00" in result["log"]
    after = result["after"]
    assert after["memory_saved_mb"] > 5
    assert after["avg_compression_ratio"] > 1.8
    assert after["blocks_level_1"] >= 14


def test_server_and_its_metrics(model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--port", port, "--host", "127.0.0.1", "--max-model-len", 1024, "--enforce-eager"]
    command += ["--served-model-name", "smollm2", "--dtype", "float32", "--max-num-seqs", 4]
    command += ["--kv-transfer-config", json.dumps(TRANSFER)]
    log = model.parent / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(x) for x in command],
            cwd=model.parent,
            env=environment(SPACE | SERVER),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 4}
        body |= {"temperature": 0}
        text = post(f"{address}/v1/completions", body)["choices"][0]["text"]
        assert "Paris" in text
        body |= {"prompt": "All work and no play makes Jack a dull boy. " * 30}
        assert post(f"{address}/v1/completions", body)["usage"]["completion_tokens"] == 4
        post(f"{address}/reset_prefix_cache", {})
        time.sleep(1)  # figures are written twice a second, at a step
        post(f"{address}/v1/completions", body)
        metrics = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode()
        figures = {
            line.split("{")[0]: float(line.rsplit(" ", 1)[1])
            for line in metrics.splitlines()
            if line.startswith("vllm:kv_compression_")
        }
        assert figures["vllm:kv_compression_seals_total"] >= 3
        assert figures["vllm:kv_compression_avg_compression_ratio"] > 1
        assert figures["vllm:kv_compression_memory_saved_mb"] > 0
        # What was forgotten came from host memory, between two processes.
        assert figures["vllm:kv_compression_offload_hits_total"] >= 4
        assert figures["vllm:kv_compression_offload_bytes_saved"] > 0
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def post(address, body):
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    answer = urllib.request.urlopen(request, timeout=SECONDS).read()
    return json.loads(answer) if answer else None
