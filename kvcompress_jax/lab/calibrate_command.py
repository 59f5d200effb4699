"""`kvcompress calibrate`: its arguments, and what it does with them."""

import argparse
from pathlib import Path

from kvcompress_jax.config import ConfigError
from kvcompress_jax.lab.arguments import add_model, at_least, at_least_two
from kvcompress_jax.paged.layout import PAGE_SIZES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_model(parser)
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 texts of any kind (default: the language reference that comes with CPython)",
    )
    parser.add_argument(
        "--bits",
        type=float,
        nargs="+",
        required=True,
        help="stored bits per value of sealed pages, every overhead counted; not exceeded. A code"
        " for each",
    )
    parser.add_argument(
        "--samples",
        type=at_least(1),
        default=3,
        help="taken from the texts, spread evenly, and two more to try codes on (default:"
        " %(default)s)",
    )
    parser.add_argument(
        "--sample-tokens",
        type=at_least_two,
        default=1024,
        metavar="TOKENS",
        help="of each sample (default: %(default)s)",
    )
    parser.add_argument(
        "--page-size",
        type=int,
        choices=PAGE_SIZES,
        default=64,
        help="of the cache (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.safetensors",
        help="the profile; {bits} in it stands for the bits, where there are several",
    )


def run(args: argparse.Namespace) -> None:
    """Fits, writes and says how it went."""
    from rich.console import Console

    from kvcompress_jax.calibrated.calibrate import calibrate, gather
    from kvcompress_jax.calibrated.profile import save_profile
    from kvcompress_jax.lab.arguments import read_model
    from kvcompress_jax.lab.output import check_writable
    from kvcompress_jax.lab.progress import stages
    from kvcompress_jax.lab.texts import check_positions, load_text, take_apart

    if len(set(args.bits)) > 1 and "{bits}" not in args.out.name:
        raise ConfigError(f"--out: expected {{bits}} in it for several --bits, got {args.out}")
    files = {
        bits: args.out.with_name(args.out.name.replace("{bits}", f"{bits:g}")) for bits in args.bits
    }
    for file in files.values():
        check_writable(file)
    texts = [load_text(path) for path in args.text or [None]]
    profiles = {}
    with stages(Console()) as progress:
        model = read_model(args, progress)
        check_positions(model, args.sample_tokens)
        samples, apart = take_apart(model, texts, count=args.samples, tokens=args.sample_tokens)
        statistics = gather(
            model, samples, held_out=apart, page_size=args.page_size, progress=progress
        )
        for bits, file in files.items():
            profiles[file] = calibrate(model, statistics, bits=bits, progress=progress)
            save_profile(file, profiles[file])
    for file, profile in profiles.items():
        keys = 8 * profile.rows.key_bytes / model.config.head_dim
        print(
            f"{file}: {keys:.2f} bits for keys, {profile.rows.value_bits} for values,"
            f" KL {profile.about['kl']} on samples that were kept apart"
        )
