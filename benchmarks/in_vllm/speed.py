"""Time of a model in vLLM, as it is and with its KV cache compressed.

    make vllm-speed TEXTS="prose.txt code.txt"

which writes SmolLM2 as a folder, and runs, in vLLM's environment,

    python benchmarks/vllm_speed.py DIR FILE...

Every configuration has a process of its own, in bfloat16, with all cores. Prompts are read in
chunks of 512 tokens; answers are those of all prompts at once, without the time to read them. The
first turn, in which JAX compiles, is not timed. Medians of the others, which the JSON has all.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from kvcompress_jax.lab.output import check_writable, write_json
from kvcompress_jax.lab.texts import load_text

from .apart import CONFIGURATIONS, STOCK, give, measured_apart

ANSWER = 64  # tokens
DEFAULT = ["one level", "balanced", "compact"]


def measure(
    model: str, texts: Sequence[Path], *, prompts: int, tokens: int, turns: int
) -> dict[str, list[float]]:
    """Seconds of each turn in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=tokens + ANSWER,
        max_num_seqs=prompts,
        max_num_batched_tokens=512,
        block_size=64,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    encode = llm.get_tokenizer().encode
    text = [token for path in texts for token in encode(load_text(path))]
    starts = [i * (len(text) - tokens) // max(prompts - 1, 1) for i in range(prompts)]
    asked = [{"prompt_token_ids": text[i : i + tokens]} for i in starts]

    def seconds(answer: int) -> float:
        settings = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(asked, settings, use_tqdm=False)
        return time.perf_counter() - start

    found: dict[str, list[float]] = {"prompts": [], "answers": []}
    for turn in range(turns + 1):
        reading = seconds(1)
        answering = seconds(ANSWER) - reading
        if turn:
            found["prompts"].append(reading)
            found["answers"].append(answering)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="DIR", help="of a model that vLLM reads")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=DEFAULT)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--gib", type=int, default=1, help="of KV memory")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sizes = {"prompts": args.prompts, "tokens": args.tokens, "turns": args.turns}
    if args.here:
        give(measure(args.model, args.files, **sizes))
        return
    if args.json:
        check_writable(args.json)
    words = [args.model, *map(str, args.files), "--here"]
    words += [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    console, found = Console(), {}
    for name in dict.fromkeys([STOCK, *args.only]):
        found[name] = measured_apart(
            "vllm_speed.py", words, CONFIGURATIONS[name], name=name, gib=args.gib
        )
        console.print(name, style="dim")
    title = (
        f"{args.model} in vLLM: {args.prompts} prompts of {args.tokens} tokens, tokens per second"
    )
    table = Table(title=title)
    for column in ("", "prompts", "times vLLM's time", "answers", "times vLLM's time"):
        table.add_column(column, justify="right" if column else "left")
    counts = {"prompts": args.prompts * args.tokens, "answers": args.prompts * (ANSWER - 1)}
    for name, seconds in found.items():
        row = [name]
        for what, count in counts.items():
            own = median(seconds[what])
            row += [f"{count / own:,.0f}", f"{own / median(found[STOCK][what]):.1f}"]
        table.add_row(*row)
    console.print(table)
    if args.json:
        write_json(args.json, found)
