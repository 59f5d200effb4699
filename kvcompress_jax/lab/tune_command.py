"""`kvcompress tune`: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.lab.arguments import add_kv_dtype, add_model, at_least
from kvcompress_jax.quality import QualityBound, QualityError

if TYPE_CHECKING:
    from rich.console import Console

    from kvcompress_jax.lab.tune import Tuned
    from kvcompress_jax.models.load import Model

KL, TOP1 = 0.05, 0.9  # a model that keeps less than this is broken, whatever it was asked to save
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SHOWN = 12  # rows of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_model(parser)
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 texts; the worst counts (default: the language reference that comes with"
        " CPython)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--bits",
        type=float,
        help="stored bits per value of a sequence's cache, everything counted, at most",
    )
    budget.add_argument(
        "--bytes",
        type=_bytes,
        metavar="N[MB|MiB|...]",
        help="of a sequence's cache, at most",
    )
    parser.add_argument(
        "--length",
        type=at_least(256),
        metavar="TOKENS",
        help="of the sequence that the budget is for (default: 8192, or what the model can)",
    )
    parser.add_argument(
        "--kl",
        type=float,
        metavar="NATS",
        help=f"most KL from the uncompressed model, per token (default: {KL:g})",
    )
    parser.add_argument(
        "--top1",
        type=float,
        metavar="SHARE",
        help=f"least share of tokens with the same most likely successor (default: {TOP1:g})",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="of `kvcompress calibrate`, to choose from as well",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="make a profile for the budget as well, beside the output; takes minutes more",
    )
    parser.add_argument(
        "--for-vllm",
        action="store_true",
        help="as the vLLM plug-in does it: keys are rounded to the nearest, unless the checked file"
        " says error_feedback = true",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE.toml",
        help="measure this configuration for the model instead of searching for one",
    )
    parser.add_argument(
        "--context",
        type=at_least(64),
        default=1024,
        metavar="TOKENS",
        help="that are compressed to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--continuation",
        type=at_least(16),
        default=256,
        metavar="TOKENS",
        help="that are teacher-forced on them (default: %(default)s)",
    )
    add_kv_dtype(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.toml",
        help="the configuration, for `--config` and KVCOMPRESS_CONFIG",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")


def run(args: argparse.Namespace) -> None:
    """Searches or measures, shows and writes.

    Raises:
      QualityError: the bound cannot be kept, or nothing fits; no configuration is written.
    """
    from rich.console import Console

    from kvcompress_jax.config_file import as_toml
    from kvcompress_jax.lab.arguments import read_model
    from kvcompress_jax.lab.gate import BUILT_IN
    from kvcompress_jax.lab.output import check_writable, replacing, write_json
    from kvcompress_jax.lab.progress import stages
    from kvcompress_jax.lab.texts import load_text

    budget = args.bits is not None or args.bytes is not None
    bounded = args.kl is not None or args.top1 is not None
    if not (budget or bounded or args.check):
        raise ConfigError("expected --bits, --bytes, --kl, --top1 or --check, got none of them")
    if args.check and (budget or args.profile or args.calibrate):
        raise ConfigError("--check: expected no budget and no profile beside it")
    if args.calibrate and not budget:
        raise ConfigError("--calibrate: expected --bits or --bytes with it")
    checked = CompressionConfig.from_toml(args.check) if args.check else None
    if checked is not None and args.for_vllm:
        checked = dataclasses.replace(checked, error_feedback=bool(checked.error_feedback))
    bound = checked.bound if checked is not None and not bounded else None
    try:
        bound = bound or QualityBound(
            kl=KL if args.kl is None else args.kl, top1=TOP1 if args.top1 is None else args.top1
        )
    except ValueError as e:
        raise ConfigError(str(e)) from None
    texts = {path.stem: load_text(path) for path in args.text or []}
    texts = texts or {BUILT_IN: load_text()}
    for path in (args.out, args.json):
        if path is not None:
            check_writable(path)
    command = shlex.join(["kvcompress", *sys.argv[1:]])
    console = Console()
    found: Tuned | None = None
    written: dict[str, object] = {"command": command, "bound": dataclasses.asdict(bound)}
    try:
        with stages(console) as progress:
            model = read_model(args, progress)
            written |= {"model": model.name, "fingerprint": model.fingerprint}
            if checked is not None:
                config = _check(args, model, texts, checked, bound)
            else:
                found = _search(args, model, texts, bound, progress)
                config = found.config
    except QualityError as e:
        if args.json is not None:
            write_json(args.json, written | {"refused": str(e)})
        raise
    measured = config.measured
    assert measured is not None
    comment = (
        f"{command}\nFor {model.name}. Measured on the paged cache, {measured.context_tokens}"
        f" tokens of context, worst of: {measured.texts}.\nUnder memory pressure a manager may"
        " demote pages from 8 bits to 4, which is not measured here."
    )
    with replacing(args.out) as temporary:
        text = as_toml(config, folder=args.out.resolve().parent, comment=comment)
        temporary.write_text(text, encoding="utf-8")
    if found is not None:
        _show(console, found)
        written |= {
            "bits": found.bits,
            "tried": [dataclasses.asdict(c) for c in found.tried],
            "gains": found.gains,
        }
    console.print(
        f"KL {measured.kl:.5f} nats, same top token {measured.top1:.1%}; written to {args.out}"
    )
    if args.json is not None:
        write_json(args.json, written | {"config": dataclasses.asdict(config)})


def _check(
    args: argparse.Namespace,
    model: Model,
    texts: dict[str, str],
    config: CompressionConfig,
    bound: QualityBound,
) -> CompressionConfig:
    """The configuration with its bound and what was measured.

    Raises:
      QualityError: the bound is not kept.
    """
    from kvcompress_jax.lab.gate import Judge

    judge = Judge(
        model,
        texts,
        context_tokens=args.context,
        continuation_tokens=args.continuation,
        kv_dtype=args.kv_dtype,
    )
    measured = judge.measure(config)
    broken = bound.broken_by(measured.kl, measured.top1)
    if broken is not None:
        raise QualityError(f"{args.check}: {broken}")
    return dataclasses.replace(config, bound=bound, measured=measured, force=False)


def _search(
    args: argparse.Namespace,
    model: Model,
    texts: dict[str, str],
    bound: QualityBound,
    progress: Callable[[str, float], None],
) -> Tuned:
    from kvcompress_jax.lab.tune import Goal, Tuner

    length = args.length or min(8192, model.config.max_positions)
    bits = args.bits
    if args.bytes is not None:
        values = 2 * model.config.num_layers * model.config.num_kv_heads * model.config.head_dim
        bits = 8 * args.bytes / (length * values)
    profiles = [str(path) for path in args.profile]
    if args.calibrate:
        profiles.append(str(_calibrate(args, model, length, bits, progress)))
    tuner = Tuner(
        model,
        texts,
        context_tokens=args.context,
        continuation_tokens=args.continuation,
        kv_dtype=args.kv_dtype,
        progress=progress,
    )
    feedback = False if args.for_vllm else None
    goal = Goal(bound=bound, bits=bits, length_tokens=length, error_feedback=feedback)
    return tuner.tune(goal, profiles)


def _calibrate(
    args: argparse.Namespace,
    model: Model,
    length: int,
    bits: float,
    progress: Callable[[str, float], None],
) -> Path:
    """A profile that fits the budget with a raw window, on text that nothing is measured on.

    Raises:
      ProfileError: no code of so few bits.
    """
    from kvcompress_jax.calibrated.calibrate import calibrate, gather
    from kvcompress_jax.calibrated.profile import save_profile
    from kvcompress_jax.lab.budget import bits_for_code
    from kvcompress_jax.lab.output import check_writable
    from kvcompress_jax.lab.texts import load_text, take_apart
    from kvcompress_jax.models.cache_settings import cache_layout

    path: Path = args.out.with_suffix(".safetensors")
    check_writable(path)
    config = CompressionConfig()
    layout = cache_layout(model.config, config, args.kv_dtype)
    text = load_text()
    tokens = min(1024, model.config.max_positions)
    samples, apart = take_apart(model, [text[len(text) // 4 :]], count=3, tokens=tokens)
    statistics = gather(model, samples, held_out=apart, progress=progress)
    rate = bits_for_code(layout, config, length, bits=bits)
    save_profile(path, calibrate(model, statistics, bits=rate, progress=progress))
    return path


def _show(console: Console, found: Tuned) -> None:
    from rich.table import Table

    from kvcompress_jax.lab.tune import describe

    table = Table(title="Tried, best first", title_justify="left")
    for column in ("bits", "KL", "same top token"):
        table.add_column(column, justify="right")
    table.add_column("configuration")
    for c in found.tried[:SHOWN]:
        table.add_row(f"{c.bits:.2f}", f"{c.kl:.5f}", f"{c.top1:.1%}", describe(c.config))
    if len(found.tried) > SHOWN:
        table.caption = f"and {len(found.tried) - SHOWN} more"
    console.print(table)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(
            f"expected a number of bytes, with {', '.join(u for u in UNITS if u)} or none,"
            f" got {text!r}"
        )
    return int(float(match[1]) * UNITS[match[2]])
