"""KV offloading in vLLM: `python examples/vllm_offload.py MODEL FOLDER`.

Run it twice: the second time the long prompt is not computed again, its compressed pages come from
the folder.
"""

import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    """Answers a long prompt, with compressed pages in host memory and in a folder."""
    llm = LLM(
        model=sys.argv[1],
        max_model_len=2048,
        kv_transfer_config={
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "spec_name": "KVCompressOffloadingSpec",
                "spec_module_path": "kvcompress_jax.interop.vllm.offload",
                "cpu_bytes_to_use": 1 << 28,
                "disk_path": sys.argv[2],
                "disk_bytes": 1 << 30,
            },
        },
    )
    text = "All work and no play makes Jack a dull boy. " * 60
    for _ in range(2):
        started = time.monotonic()
        (output,) = llm.generate([text + "Jack is"], SamplingParams(max_tokens=8, temperature=0))
        loaded = llm.kv_cache_manager.get_compression_stats()["offload_loads"]
        print(
            f"{output.outputs[0].text!r}: {time.monotonic() - started:.1f} s, {loaded} pages loaded"
        )
        llm.reset_prefix_cache()  # as if others had taken its place on the device


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
