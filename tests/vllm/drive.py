"""Runs vLLM's engines, one after the other: `drive.py MODEL_DIR DESCRIPTOR` reads a request a line
and writes a line of JSON with what it found to that file descriptor.

A script of its own, away from the checkout, whose folder `kernels` would shadow another package.
What a request sets in the environment is there while its engine runs; whether vLLM compresses at
all is decided once, when this process starts.
"""

import contextlib
import gc
import json
import math
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from pydoc_data.topics import topics

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Photosynthesis is the process by which",
    "The three laws of thermodynamics state that",
    "In 1969, Neil Armstrong",
    "To make a good cup of coffee, you should",
    "The best way to learn a language is",
    "Water boils at",
    "My favourite book is",
]
TOPICS = ("import", "with", "exceptions", "naming")
MIB = 1 << 20
ENGINES = []  # that run


def compresses():
    return os.environ.get("VLLM_ENABLE_KV_COMPRESSION") != "0"


def engine(model, **options):
    from vllm import LLM

    defaults = {
        "max_model_len": 1024,
        "enforce_eager": True,
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "disable_log_stats": False,
        "block_size": 64,
        "seed": 0,
    }
    llm = LLM(model=model, **(defaults | options))
    ENGINES.append(llm)
    return llm


def capacity(llm):
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def greedy(llm, prompts, tokens, **options):
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **options)
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def long_prompts(llm, tokens=400):
    encode = llm.get_tokenizer().encode
    return [{"prompt_token_ids": encode(topics[name])[:tokens]} for name in TOPICS]


def losses(llm, prompts):
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    found = []
    for prompt in prompts:
        (output,) = llm.generate([prompt], settings, use_tqdm=False)
        found += [-next(iter(d.values())).logprob for d in output.prompt_logprobs[1:]]
    return found


def figures(llm):
    if not compresses():
        return None
    llm.kv_cache_manager.verify()
    return llm.kv_cache_manager.get_compression_stats()


def counted(llm, name):
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def preemptions(llm):
    return counted(llm, "vllm:num_preemptions")


def quality(model, *, answers=False, text=True, kv_cache_dtype="auto", eager=True):
    """Greedy tokens of short and long prompts in batches; loss of 2,000 tokens of text."""
    llm = engine(
        model, enable_prefix_caching=False, kv_cache_dtype=kv_cache_dtype, enforce_eager=eager
    )
    compilation = llm.llm_engine.vllm_config.compilation_config
    results = {"capacity": capacity(llm), "compiled": [compilation.mode.name, compilation.backend]}
    if answers:
        started = time.monotonic()
        prompts = [{"prompt": p} for p in PROMPTS] + long_prompts(llm, 150)
        prompts += [{"prompt": f"Question: {p}"} for p in PROMPTS[:6]]
        results["greedy"] = greedy(llm, prompts, 64)
        results["greedy_seconds"] = time.monotonic() - started
    if text:
        started = time.monotonic()
        loss = losses(llm, long_prompts(llm, 512))
        results["loss"], results["tokens"] = sum(loss) / len(loss), len(loss)
        results["perplexity"], results["losses"] = math.exp(results["loss"]), loss
        results["loss_seconds"] = time.monotonic() - started
    return results | {"stats": figures(llm)}


def capacity_only(model):
    """What vLLM says it can hold, in bfloat16."""
    llm = engine(model, dtype="bfloat16")
    greedy(llm, ["The capital of France is"], 2)
    return {"capacity": capacity(llm), "stats": figures(llm)}


def preempt(model):
    """Four long answers in memory that holds two and a half of them uncompressed."""
    llm = engine(model, max_num_seqs=4, kv_cache_memory_bytes=70 * MIB, enable_prefix_caching=False)
    started = time.monotonic()
    tokens = greedy(llm, long_prompts(llm, 400), 110)
    seconds = time.monotonic() - started
    found = {"preemptions": preemptions(llm), "tokens": tokens, "seconds": seconds}
    return found | {"stats": figures(llm)}


def matrix(model, *, mebibytes, prefix_caching, max_model_len=1024):
    """Everything that moves blocks, one after the other in one engine."""
    from vllm import SamplingParams

    llm = engine(
        model,
        max_num_seqs=4,
        kv_cache_memory_bytes=mebibytes * MIB,
        max_model_len=max_model_len,
        max_num_batched_tokens=128,
        enable_prefix_caching=prefix_caching,
    )
    # Each of them begins one more block with its answer.
    results, prompts = {}, long_prompts(llm, 370)
    results["first"] = greedy(llm, prompts, 24)
    figures(llm)
    # The prefix cache holds sealed blocks of a moment ago; the last prompt shares a part.
    results["again"] = greedy(llm, prompts, 24)
    figures(llm)
    cut = [{"prompt_token_ids": p["prompt_token_ids"][:200]} for p in prompts]
    results["cut"] = greedy(llm, cut, 24)
    figures(llm)
    # Without a seed: on CPUs vLLM fails to rewind a generator after a chunk of a prompt.
    several = SamplingParams(n=3, max_tokens=24, temperature=1.0, ignore_eos=True)
    outputs = llm.generate(prompts[:2], several, use_tqdm=False)
    results["several"] = [[len(c.token_ids) for c in o.outputs] for o in outputs]
    figures(llm)
    # Aborted in the middle of a prompt and in the middle of an answer.
    settings = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        llm.llm_engine.add_request(f"abort-{i}", prompt, settings)
    for _ in range(9):
        llm.llm_engine.step()
    llm.llm_engine.abort_request([f"abort-{i}" for i in range(len(prompts))])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    figures(llm)
    results["after"] = greedy(llm, prompts, 24)
    llm.reset_prefix_cache()
    results["reset"] = greedy(llm, prompts, 24)
    results["stats"], results["preemptions"] = figures(llm), preemptions(llm)
    results["capacity"] = capacity(llm)
    return results


def overwrite():
    """Fills vLLM's KV memory with ones: NaN, where it is read as a number."""
    import torch

    from kvcompress_jax.interop.vllm.group import GROUPS

    for memory in GROUPS[0].executor.memories.values():
        for pool in memory.pools.values():
            pool.view(-1).view(torch.uint8).fill_(255)


def sleep(model):
    """The same prompts before and after vLLM slept. A GPU's memory is another one then; a CPU's
    stays, so that this does what a GPU's allocator would have done. At last without any sleep."""
    from vllm import SamplingParams

    llm = engine(model, kv_cache_memory_bytes=100 * MIB, enable_prefix_caching=True)
    prompts = long_prompts(llm, 330)
    results = {"before": greedy(llm, prompts, 16)}
    cut_short = [f"cut-short-{i}" for i in range(len(prompts))]
    for name, prompt in zip(cut_short, prompts, strict=True):
        llm.llm_engine.add_request(name, prompt, SamplingParams(max_tokens=99))
    llm.llm_engine.step()
    llm.sleep(level=1)  # ends them in the engine; the front end has to be told
    llm.llm_engine.abort_request(cut_short)
    overwrite()
    llm.wake_up()
    figures(llm)
    results["after"] = greedy(llm, prompts, 16)
    results["stats"] = figures(llm)
    overwrite()
    results["overwritten"] = greedy(llm, prompts, 16)
    return results


def offloading_engine(model, options):
    """With a prefix cache; `options` are those of offloading."""
    extra = {
        "spec_name": "KVCompressOffloadingSpec",
        "spec_module_path": "kvcompress_jax.interop.vllm.offload",
    }
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra | options,
    }
    return engine(
        model,
        max_num_seqs=4,
        kv_cache_memory_bytes=100 * MIB,
        enable_prefix_caching=True,
        kv_transfer_config=transfer,
    )


def offload(model, *, options, rounds=2):
    """The same prompts, again after vLLM forgot them; `options` are those of offloading."""
    llm = offloading_engine(model, options)
    prompts = long_prompts(llm, 330)
    # One that is nothing but whole blocks: its last token is computed again all the same.
    prompts.append({"prompt_token_ids": prompts[0]["prompt_token_ids"][:128]})
    greedy(llm, ["The capital of France is"], 2)
    results = {"answers": [], "loads": []}
    for _ in range(rounds):
        results["answers"].append(greedy(llm, prompts, 16))
        results["loads"].append(figures(llm)["offload_loads"])
        llm.reset_prefix_cache()
    results["metrics"] = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return results


def floors(model, *, options):
    """Loss of half of the text of `quality`; then answers to it: its blocks are on the device, on
    the host, nowhere."""
    llm = offloading_engine(model, options)
    prompts = long_prompts(llm, 512)[:2]
    results = {"losses": losses(llm, prompts), "answers": [], "hits": [], "loads": []}
    results |= {"capacity": capacity(llm), "stats": figures(llm)}
    for last in (False, True, True):
        before = counted(llm, "vllm:prefix_cache_hits")
        # One at a time, as for the loss: nothing more is compiled.
        results["answers"].append([greedy(llm, [prompt], 16)[0] for prompt in prompts])
        results["hits"].append(counted(llm, "vllm:prefix_cache_hits") - before)
        results["loads"].append(figures(llm)["offload_loads"])
        llm.reset_prefix_cache(reset_connector=last)
    return results


def snippet(model):
    """The specification's example, word for word but for the model."""
    from vllm import LLM

    llm = LLM(model=model)
    stats = llm.kv_cache_manager.get_compression_stats()
    print(f"Memory saved: {stats['memory_saved_mb']:.2f} MB")
    print(f"Average compression ratio: {stats['avg_compression_ratio']:.2f}")
    tokens = greedy(llm, [{"prompt_token_ids": list(range(100, 1100))}], 4)
    after = llm.kv_cache_manager.get_compression_stats()
    llm.kv_cache_manager.verify()
    return {"before": stats, "after": after, "tokens": tokens}


def start(model, *, options, config=None):
    """Starts an engine and ends it; with a configuration of a model that is nowhere."""
    if config is not None:
        folder = Path(tempfile.mkdtemp(dir="."))
        (folder / "config.json").write_text(json.dumps(config))
        model, options = (
            str(folder),
            {"load_format": "dummy", "skip_tokenizer_init": True} | options,
        )
    engine(model, **options)
    return {}


SCENARIOS = {
    f.__name__: f
    for f in (quality, capacity_only, preempt, matrix, sleep, offload, floors, snippet, start)
}


@contextlib.contextmanager
def environment(settings):
    """Sets variables for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def answer(model, request):
    """Runs one scenario; what it raises is its result."""
    from vllm.distributed import cleanup_dist_env_and_memory

    started = time.monotonic()
    try:
        with environment(request["settings"]):
            result = SCENARIOS[request["scenario"]](model, **request["options"])
    except Exception as e:
        traceback.print_exc()
        result = {"error": f"{type(e).__name__}: {e}"}
    while ENGINES:
        ENGINES.pop().llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()
    return result | {"total_seconds": time.monotonic() - started}


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[2]), "w") as results:
        for line in sys.stdin:
            print(json.dumps(answer(sys.argv[1], json.loads(line))), file=results, flush=True)
