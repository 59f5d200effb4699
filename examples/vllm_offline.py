"""KV compression in vLLM, offline: `python examples/vllm_offline.py MODEL`.

The package is installed, and nothing else is needed. `VLLM_ENABLE_KV_COMPRESSION=0` turns it off.
"""

import sys

from vllm import LLM, SamplingParams


def main() -> None:
    """Answers two prompts with a common beginning, and shows what compression saved."""
    llm = LLM(model=sys.argv[1], max_model_len=2048)
    text = "All work and no play makes Jack a dull boy. " * 60
    prompts = [text + "Jack is", text + "Play is"]
    for output in llm.generate(prompts, SamplingParams(max_tokens=16, temperature=0)):
        print(repr(output.outputs[0].text))
    stats = llm.kv_cache_manager.get_compression_stats()
    print(f"Memory saved: {stats['memory_saved_mb']:.2f} MB")
    print(f"Average compression ratio: {stats['avg_compression_ratio']:.2f}")
    print(
        f"Tokens that fit: {stats['capacity_tokens']}, not {stats['uncompressed_capacity_tokens']}"
    )


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
