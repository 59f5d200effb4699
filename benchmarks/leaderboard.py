"""The leaderboard of docs/leaderboard.md: our codes and all baselines on SmolLM2 and real texts.

    make leaderboard TEXTS="prose.txt code.txt"

which calibrates first, and then runs

    .venv/bin/python benchmarks/leaderboard.py FILE... --profile FILE... --out docs

Three rounds: codes of a few bits at about 8.5, 6.5, 4.5, 3.5 and 2.5 bits; the same at 4.5 bits on
a copy of the model with outlier key channels; eviction. A method takes about ten CPU seconds for
each text and rate, and as much again for retrieval. What was measured is written after every one,
so that an interrupted run leaves a leaderboard of what it got to; `--resume` goes on from there, or
adds a method that is new.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from kvcompress_jax.lab.compare import UNCOMPRESSED_NAME, Comparison, Setting, compare, variants
from kvcompress_jax.lab.comparison_plots import plot_accuracy_against_bits
from kvcompress_jax.lab.leaderboard import as_json, as_markdown, from_json
from kvcompress_jax.lab.methods.base import UNCOMPRESSED
from kvcompress_jax.lab.methods.registry import ALL
from kvcompress_jax.lab.outliers import with_outlier_keys
from kvcompress_jax.lab.output import check_writable, replacing, write_json
from kvcompress_jax.lab.progress import stages
from kvcompress_jax.lab.texts import load_text
from kvcompress_jax.models.load import Model, load_model

RATES = (8.5, 6.5, 4.5, 3.5, 2.5)
OUTLIER_RATES = (4.5,)
ROUNDS = ("codes", "outliers", "evictions")
EVICTIONS = tuple(name for name in ALL if name.startswith("evict-"))
CODES = tuple(name for name in ALL if name not in EVICTIONS)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="texts, in UTF-8")
    for name, whose in (("--profile", "model"), ("--outlier-profile", "copy with outlier keys")):
        parser.add_argument(
            name,
            nargs="*",
            type=Path,
            default=[],
            metavar="FILE",
            help=f"of `kvcompress calibrate`, for the {whose}",
        )
    parser.add_argument("--model", default="smollm2", metavar="smollm2|FILE.gguf|DIR")
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR")
    parser.add_argument("--codes", nargs="+", choices=CODES, default=CODES, metavar="NAME")
    parser.add_argument("--evictions", nargs="*", choices=EVICTIONS, default=EVICTIONS)
    parser.add_argument("--bits", nargs="+", type=float, default=RATES, metavar="B")
    parser.add_argument("--rounds", nargs="+", choices=ROUNDS, default=ROUNDS)
    parser.add_argument("--context", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--continuation", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--facts", type=int, default=16)
    parser.add_argument(
        "--resume", action="store_true", help="keep what leaderboard.json in DIR already has"
    )
    args = parser.parse_args(argv)
    files = [args.out / f"leaderboard.{kind}" for kind in ("md", "json", "png")]
    for file in files:
        check_writable(file)
    setting = Setting(
        bits=tuple(args.bits),
        context=args.context,
        continuation=args.continuation,
        facts=args.facts,
    )
    texts = {path.stem: load_text(path) for path in args.files}
    words = sys.argv[1:] if argv is None else argv
    # As typed, but for folders: where the texts lie is nobody's business.
    words = [Path(w).name if Path(w).is_absolute() else w for w in words if w != "--resume"]
    command = shlex.join(["python", "benchmarks/leaderboard.py", *words])
    before = from_json(files[1], setting, texts) if args.resume else Comparison((), ())
    with stages(Console()) as progress:
        model = load_model(args.model)
        codes, evictions = tuple(args.codes), tuple(args.evictions)
        rounds: dict[str, tuple[Model, tuple[str, ...], tuple[float, ...], list[Path]]] = {
            "codes": (model, codes, setting.bits, args.profile),
            "outliers": (with_outlier_keys(model), codes, OUTLIER_RATES, args.outlier_profile),
            "evictions": (model, evictions, setting.bits, []),
        }
        todo = [
            (subject, methods, dataclasses.replace(setting, bits=rates, profiles=tuple(profiles)))
            for subject, methods, rates, profiles in (rounds[name] for name in args.rounds)
        ]
        current = {
            (subject.name, name, repr(method))
            for subject, methods, at in todo
            for name, _, method in [
                (UNCOMPRESSED_NAME, (), UNCOMPRESSED),
                *variants(methods, at, subject),
            ]
        }
        kept = [r for r in before.results if (r.model, r.method, r.settings) in current]
        found = Comparison(tuple(kept), ())
        for subject, methods, at in todo:
            if not methods:
                continue

            def write(more: Comparison, before: Comparison = found) -> None:
                _write(files, _and(before, more), setting, command, texts)

            more = compare(
                [subject], texts, methods, at, known=found, progress=progress, measured=write
            )
            found = _and(found, more)
        _write(files, found, setting, command, texts)


def _and(found: Comparison, more: Comparison) -> Comparison:
    return Comparison((*found.results, *more.results), ())


def _write(
    files: list[Path],
    found: Comparison,
    setting: Setting,
    command: str,
    texts: Mapping[str, str],
) -> None:
    table, numbers, plot = files
    text = as_markdown(found, setting, command=command)
    text += f"\n![Fidelity against bits]({plot.name})\n"
    with replacing(table) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(numbers, as_json(found, setting, command=command, texts=texts))
    plot_accuracy_against_bits(plot, found)


if __name__ == "__main__":
    main()
