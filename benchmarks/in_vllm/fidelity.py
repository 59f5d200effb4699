"""Perplexity and capacity of a model in vLLM, as it is and with its KV cache compressed.

    make vllm-fidelity TEXTS="prose.txt code.txt"

which writes SmolLM2 as a folder, calibrates codes for it, and runs, in vLLM's environment,

    python benchmarks/vllm_fidelity.py DIR FILE... --profile FILE...

Every configuration has a process of its own. In float32: in bfloat16 vLLM does not agree with
itself when it batches otherwise. Teacher-forced on prompts from all over each text, prefilled in
chunks of 256 tokens. *Nats from vLLM* is the mean over tokens of how far the loss is from vLLM's
own, in either direction. Minutes.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from kvcompress_jax.calibrated.profile import read_origin
from kvcompress_jax.lab.output import check_writable, write_json
from kvcompress_jax.lab.texts import load_text

from .apart import CONFIGURATIONS as ALL
from .apart import STOCK, give, measured_apart

FP8 = "fp8"
CONFIGURATIONS = {STOCK: ALL[STOCK], FP8: ALL[STOCK]} | ALL


def measure(
    model: str, texts: Sequence[Path], *, kv_cache_dtype: str, prompts: int, tokens: int
) -> dict[str, object]:
    """Losses in this process, and how many tokens fit."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype="float32",
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        block_size=64,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    encode, losses = llm.get_tokenizer().encode, []
    for path in texts:
        text = encode(load_text(path))
        for i in range(prompts):
            start = i * len(text) // prompts
            prompt = {"prompt_token_ids": text[start : start + tokens]}
            (output,) = llm.generate([prompt], settings, use_tqdm=False)
            losses += [-next(iter(d.values())).logprob for d in output.prompt_logprobs[1:]]
    cache = llm.llm_engine.vllm_config.cache_config
    manager = getattr(llm, "kv_cache_manager", None)
    bits = manager.get_compression_stats()["effective_bits"] if manager else None
    return {
        "losses": losses,
        "capacity": cache.num_gpu_blocks * cache.block_size,
        "bits": bits,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="DIR", help="of a model that vLLM reads")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--profile", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--prompts", type=int, default=4, help="of each text (default: 4)")
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt")
    parser.add_argument("--gib", type=int, default=1, help="of KV memory")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", metavar="KV_CACHE_DTYPE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        options = {"prompts": args.prompts, "tokens": args.tokens}
        found = measure(args.model, args.files, kv_cache_dtype=args.one, **options)
        give(found)
        return
    if args.json:
        check_writable(args.json)
    wanted = {name: CONFIGURATIONS[name] for name in dict.fromkeys([STOCK, *args.only])}
    for path in args.profile:
        bits = read_origin(path).bits
        wanted[f"calibrated, {bits:g} bits"] = {"KVCOMPRESS_PROFILE": str(path.resolve())}
    words = [args.model, *map(str, args.files)]
    words += ["--prompts", str(args.prompts), "--tokens", str(args.tokens)]
    console, found = Console(), {}
    for name, settings in wanted.items():
        try:
            found[name] = measured_apart(
                "vllm_fidelity.py",
                [*words, "--one", FP8 if name == FP8 else "auto"],
                {"OMP_NUM_THREADS": "1"} | settings,
                name=name,
                gib=args.gib,
            )
        except RuntimeError as e:
            if name != FP8:
                raise
            # vLLM's fp8 cache on CPUs needs AVX-512.
            console.print(str(e)[-300:], style="dim", markup=False)
        console.print(name, style="dim")
    stock = found[STOCK]["losses"]
    table = Table(title=f"{args.model} in vLLM, float32, {args.gib} GiB, {len(stock)} tokens")
    for column in ("", "perplexity", "", "nats from vLLM", "bits when sealed", "tokens that fit"):
        table.add_column(column, justify="right" if column else "left")
    own = fmean(stock)
    for name, result in found.items():
        loss = fmean(result["losses"])
        far = fmean([abs(a - b) for a, b in zip(result["losses"], stock, strict=True)])
        bits = "" if result["bits"] is None else f"{result['bits']:.2f}"
        change = f"{math.expm1(loss - own):+.2%}"
        fit = f"{result['capacity']:,}"
        table.add_row(name, f"{math.exp(loss):.3f}", change, f"{far:.4f}", bits, fit)
    console.print(table)
    if args.json:
        write_json(args.json, found)
