"""The README's tables of what compression costs and saves: every recipe, and calibrated codes.

    make fidelity TEXTS="prose.txt code.txt"

which calibrates first, and then runs

    .venv/bin/python benchmarks/fidelity.py FILE... --profile FILE...

Every row is what `kvcompress eval` says of one configuration and text; the calibrated codes are
measured with the raw window and, in a second table, without it. Some minutes on two cores.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kvcompress_jax.calibrated.profile import read_origin
from kvcompress_jax.config import RECIPES, CompressionConfig
from kvcompress_jax.lab.evaluate import Evaluation, Evaluator
from kvcompress_jax.lab.output import check_writable, write_json
from kvcompress_jax.lab.texts import load_text
from kvcompress_jax.models.load import load_model

COLUMNS = (
    "recipe | text | bits | cache bits | memory saved | KL, nats | KL p99 | ΔNLL | same top token |"
    " facts recalled (uncompressed)"
)


def row(name: str, text: str, found: Evaluation, facts: int) -> str:
    """A line of the table in Markdown."""
    recalled = "-"
    if facts:
        shares = found.retrieval_accuracy, found.retrieval_accuracy_uncompressed
        ours, plain = (round(share * facts) for share in shares)
        recalled = f"{ours} of {facts} ({plain})"
    cells = (
        name,
        text,
        f"{found.effective_bits:.2f}",
        f"{found.cache_bits:.2f}",
        f"{found.memory_saved_fraction:.0%}",
        f"{found.kl_mean:.5f}",
        f"{found.kl_p99:.4f}",
        f"{found.delta_nll:+.4f}",
        f"{found.top1_agreement:.1%}",
        recalled,
    )
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="texts, in UTF-8")
    parser.add_argument("--model", default="smollm2", metavar="smollm2|FILE.gguf|DIR")
    parser.add_argument("--profile", nargs="*", type=Path, default=[], metavar="FILE")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--context", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--continuation", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--facts", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json)
    model = load_model(args.model)
    configs = {f"`{name}`": RECIPES[name] for name in args.recipes}
    without = {}
    for path in args.profile:
        name = f"calibrated, {read_origin(path).bits:g}"
        configs[name] = CompressionConfig(profile=str(path))
        without[f"{name}, no window"] = CompressionConfig(profile=str(path), window_tokens=0)
    configs |= without
    measured: dict[str, dict[str, Evaluation]] = {name: {} for name in configs}
    for file in args.files:
        evaluator = Evaluator(
            model,
            load_text(file),
            context_tokens=args.context,
            continuation_tokens=args.continuation,
            facts=args.facts,
        )
        for name, config in configs.items():
            measured[name][file.stem] = evaluator.evaluate(config)
    print(f"| {COLUMNS} |")
    print("|" + "---|" * (COLUMNS.count("|") + 1))
    for name, by_text in measured.items():
        for text, found in by_text.items():
            print(row(name, text, found, args.facts))
    if args.json:
        found = {
            name: {text: dataclasses.asdict(e) for text, e in by_text.items()}
            for name, by_text in measured.items()
        }
        write_json(args.json, found)


if __name__ == "__main__":
    main()
