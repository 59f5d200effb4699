"""`kvcompress compare`: its arguments, and what it does with them."""

import argparse
import shlex
import sys
from pathlib import Path

from kvcompress_jax.lab.arguments import add_kv_dtype, at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="smollm2|FILE.gguf|DIR",
        help="may be given several times (default: smollm2)",
    )
    parser.add_argument(
        "--outlier-keys",
        action="store_true",
        help="measure on a copy of each model with outlier key channels as well",
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 texts (default: the language reference that comes with CPython)",
    )
    parser.add_argument(
        "--parts",
        type=at_least(1),
        default=1,
        metavar="N",
        help="of each text, measured apart: a single context is noise of a fifth (default: 1)",
    )
    add_kv_dtype(parser)
    parser.add_argument(
        "--methods",
        default="all",
        metavar="all|importances|NAME,NAME",
        help="a name that does not exist is answered with all that do (default: %(default)s)",
    )
    parser.add_argument(
        "--bits",
        type=_rates,
        default=(8.0, 4.5, 3.5, 2.5),
        metavar="B,B",
        help="stored bits per value, about, everything counted (default: 8,4.5,3.5,2.5)",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="of `kvcompress calibrate`, one for each rate, for the method `calibrated`",
    )
    for name, default, least, what in (
        ("context", 1024, 64, "that are compressed"),
        ("continuation", 256, 2, "that are teacher-forced on the compressed context"),
        ("sinks", 4, 0, "first ones, exact in every method"),
        ("window", 0, 0, "newest ones, exact in every method"),
    ):
        parser.add_argument(
            f"--{name}",
            type=at_least(least),
            default=default,
            metavar="TOKENS",
            help=f"{what} (default: %(default)s)",
        )
    parser.add_argument(
        "--facts",
        type=int,
        default=32,
        choices=range(33),
        metavar="0..32",
        help="planted for the retrieval measure; 0 skips it (default: %(default)s)",
    )
    parser.add_argument(
        "--heat-bits",
        type=float,
        metavar="B",
        help="of --bits, for the retrieval heat map (default: the rate closest to 4.5)",
    )
    parser.add_argument(
        "--no-heat-map", action="store_true", help="leave it out: it is half of the work"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kvcompress-compare"),
        metavar="DIR",
        help="for leaderboard.md, leaderboard.json, accuracy-against-bits.png and"
        " retrieval-heat-map.png (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Measures, shows and writes."""
    from rich.console import Console
    from rich.markdown import Markdown

    from kvcompress_jax.config import ConfigError
    from kvcompress_jax.lab.compare import Setting, compare
    from kvcompress_jax.lab.comparison_plots import plot_accuracy_against_bits, plot_recall
    from kvcompress_jax.lab.leaderboard import as_json, as_markdown
    from kvcompress_jax.lab.methods.registry import find_methods
    from kvcompress_jax.lab.outliers import with_outlier_keys
    from kvcompress_jax.lab.output import check_writable, replacing, write_json
    from kvcompress_jax.lab.progress import stages
    from kvcompress_jax.lab.texts import load_text, split_texts
    from kvcompress_jax.models.load import load_model

    methods = find_methods(args.methods)
    heat = args.heat_bits
    if heat is None:
        heat = min(args.bits, key=lambda b: abs(b - 4.5))
    if heat not in args.bits:
        raise ConfigError(f"--heat-bits: expected one of --bits {args.bits}, got {heat:g}")
    if args.sinks + args.window >= args.context:
        raise ConfigError(
            f"--sinks and --window: expected less than --context {args.context} together,"
            f" got {args.sinks} and {args.window}"
        )
    setting = Setting(
        bits=args.bits,
        context=args.context,
        continuation=args.continuation,
        sinks=args.sinks,
        window=args.window,
        facts=args.facts,
        kv_dtype=args.kv_dtype,
        profiles=tuple(args.profile),
        heat_bits=heat if args.facts and not args.no_heat_map else None,
    )
    texts = {path.stem: load_text(path) for path in args.text or []}
    texts = texts or {"language reference": load_text()}
    if args.text and len(texts) < len(args.text):
        raise ConfigError("--text: expected files with different names")
    texts = split_texts(texts, args.parts)
    _make(args.out)
    names = "leaderboard.md", "leaderboard.json", "accuracy-against-bits.png"
    table, numbers, plot = (args.out / name for name in names)
    for path in (table, numbers, plot):
        check_writable(path)
    command = shlex.join(["kvcompress", *sys.argv[1:]])
    console = Console()
    with stages(console) as progress:
        progress("loading", 0.0)
        models = [load_model(source) for source in args.model or ["smollm2"]]
        if args.outlier_keys:
            models = [m for model in models for m in (model, with_outlier_keys(model))]
        progress("loading", 1.0)
        found = compare(models, texts, methods, setting, progress=progress)
    text = as_markdown(found, setting, command=command)
    console.print(Markdown(text))
    with replacing(table) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(numbers, as_json(found, setting, command=command, texts=texts))
    plot_accuracy_against_bits(plot, found)
    if found.recalled:
        title = f"Facts recalled at about {heat:g} bits"
        plot_recall(args.out / "retrieval-heat-map.png", found, title=title)
    console.print(f"written to {args.out}")


def _make(folder: Path) -> None:
    from kvcompress_jax.lab.output import OutputError

    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise OutputError(
            f"{folder}: expected a folder that can be written to ({e.strerror})"
        ) from e


def _rates(text: str) -> tuple[float, ...]:
    try:
        bits = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers, got {text!r}") from None
    if not all(1 <= b <= 16 for b in bits):
        raise argparse.ArgumentTypeError(f"expected numbers of 1 to 16, got {text!r}")
    return tuple(dict.fromkeys(bits))
