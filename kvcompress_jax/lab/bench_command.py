"""`kvcompress bench`: its arguments."""

import argparse
from pathlib import Path

from kvcompress_jax.lab.arguments import at_least

TOKENS = 128  # the context is a multiple of it, which every recipe's page size divides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure the settings of the GPU kernels on the GPU at hand and store the best, by"
        " device name, in $KVCOMPRESS_TUNED_DIR or the user's cache",
    )
    parser.add_argument("--quick", action="store_true", help="one shape only")
    parser.add_argument(
        "--tokens",
        type=_tokens,
        default=2048,
        help=f"of the context that is attended to, a multiple of {TOKENS} (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        default=5,
        help="of which the median is shown (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
      DeviceError: `--tune` without a GPU.
      OutputError: the results cannot be written.
    """
    from rich.console import Console

    from kvcompress_jax.lab.bench_speed import bench_speed, tune_and_store
    from kvcompress_jax.lab.output import check_writable, write_json

    if args.json is not None:
        check_writable(args.json)
    console = Console()
    if args.tune:
        result = tune_and_store(console)
    else:
        result = bench_speed(console, tokens=args.tokens, repeats=args.repeats, quick=args.quick)
    if args.json is not None:
        write_json(args.json, result)
        console.print(f"json: {args.json}")


def _tokens(text: str) -> int:
    value = at_least(TOKENS)(text)
    if value % TOKENS:
        raise argparse.ArgumentTypeError(f"expected a multiple of {TOKENS}, got {value}")
    return value
