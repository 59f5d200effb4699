"""The `kvcompress` command."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kvcompress_jax import doctor
from kvcompress_jax.config import RECIPES, CompressionConfig, ConfigError
from kvcompress_jax.lab import bench_command, calibrate_command, compare_command, tune_command
from kvcompress_jax.lab.arguments import add_kv_dtype, add_model, at_least_two, read_model
from kvcompress_jax.metrics import commands as metrics_commands
from kvcompress_jax.metrics.commands import MetricsError
from kvcompress_jax.quality import QualityError
from kvcompress_jax.storage import commands as storage_commands
from kvcompress_jax.storage.errors import DiskTierError

USAGE_ERROR = 2
REFUSED = 3  # by the quality gate
EXTRAS = {
    "flax": "lab",
    "optax": "lab",
    "xxhash": "storage",
    "zstandard": "storage",
    "prometheus_client": "serve",
}


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. A user's mistake is one line and code 2, fidelity that
    is not kept one line and code 3."""
    args = _parser().parse_args(argv)
    # Only now: reading a model needs packages that --help does not.
    from kvcompress_jax.lab.device import DeviceError
    from kvcompress_jax.lab.output import OutputError
    from kvcompress_jax.lab.texts import TextError
    from kvcompress_jax.models.errors import ModelError

    try:
        return args.run(args) or 0
    except QualityError as e:
        print(f"kvcompress {args.command}: {e}", file=sys.stderr)
        return REFUSED
    except (
        ConfigError,
        DeviceError,
        DiskTierError,
        MetricsError,
        ModelError,
        OutputError,
        TextError,
    ) as e:
        print(f"kvcompress {args.command}: {e}", file=sys.stderr)
        return USAGE_ERROR
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("kvcompress_jax"):
            raise
        extra = EXTRAS.get(e.name or "", "demo")
        reason = f"package {e.name} is not installed: pip install 'kvcompress-jax[{extra}]'"
        print(f"kvcompress {args.command}: {reason}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"kvcompress {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kvcompress",
        description="KV-cache compression for JAX: measure it on a real model.",
        epilog="VLLM_ENABLE_KV_COMPRESSION, VLLM_KV_COMPRESSION_RATIO, VLLM_KV_COMPRESSION_LEVELS"
        " and KVCOMPRESS_* variables are honoured where no recipe and no file is named.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="answer questions on a long text from a compressed cache, beside the uncompressed one",
    )
    _add_inputs(demo)
    demo.add_argument(
        "--plot",
        type=Path,
        default=Path("kvcompress-demo.png"),
        metavar="FILE.png",
        help="accuracy against bits, pages over time (default: %(default)s)",
    )
    metrics_commands.add_serving(demo)
    demo.set_defaults(run=_demo)

    evaluate = commands.add_parser(
        "eval", help="measure the fidelity, memory and time of one configuration"
    )
    _add_inputs(evaluate)
    evaluate.add_argument(
        "--context",
        type=at_least_two,
        default=1024,
        metavar="TOKENS",
        help="that are compressed (default: %(default)s)",
    )
    evaluate.add_argument(
        "--continuation",
        type=at_least_two,
        default=256,
        metavar="TOKENS",
        help="that are teacher-forced on the compressed cache (default: %(default)s)",
    )
    evaluate.add_argument(
        "--chunk",
        type=at_least_two,
        metavar="TOKENS",
        help="of the context's prefill, compressed in between (default: all at once)",
    )
    evaluate.add_argument(
        "--facts",
        type=int,
        default=32,
        choices=range(33),
        metavar="0..32",
        help="planted for the retrieval measure; 0 skips it (default: %(default)s)",
    )
    evaluate.set_defaults(run=_eval)

    train = commands.add_parser(
        "train-importance",
        help="train the learned importance score of a model; minutes on a CPU",
    )
    add_model(train)
    train.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 texts (default: the language reference that comes with CPython)",
    )
    train.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.safetensors",
        help="the trained score; use it with KVCOMPRESS_LEARNED_IMPORTANCE=FILE.safetensors",
    )
    train.add_argument(
        "--tokens",
        type=at_least_two,
        default=9216,
        help="to train on, the same number of each text (default: %(default)s)",
    )
    train.add_argument(
        "--steps", type=at_least_two, default=400, help="of training (default: %(default)s)"
    )
    train.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    train.set_defaults(run=_train_importance)

    calibrate = commands.add_parser(
        "calibrate", help="fit a code of a few bits to a model, for `--profile`"
    )
    calibrate_command.add_arguments(calibrate)
    calibrate.set_defaults(run=calibrate_command.run)

    tune = commands.add_parser(
        "tune",
        help="find the configuration that keeps most in a budget, or takes least within a bound",
    )
    tune_command.add_arguments(tune)
    tune.set_defaults(run=tune_command.run)

    compare = commands.add_parser(
        "compare", help="measure many methods, ours and others', at the same bits: a leaderboard"
    )
    compare_command.add_arguments(compare)
    compare.set_defaults(run=compare_command.run)
    storage_commands.add_commands(commands.add_parser)

    bench = commands.add_parser(
        "bench", help="time the codec and attention here; --tune: the GPU kernels' settings"
    )
    bench_command.add_arguments(bench)
    bench.set_defaults(run=bench_command.run)

    doctor.add_arguments(
        commands.add_parser(
            "doctor", help="what is installed, what will be used, and why something will not be"
        )
    )

    top = commands.add_parser("top", help="watch a running process that serves metrics")
    metrics_commands.add_arguments(top)
    top.set_defaults(run=metrics_commands.run)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text (default: the language reference that comes with CPython)",
    )
    config = parser.add_mutually_exclusive_group()
    config.add_argument("--recipe", choices=RECIPES, help="a named configuration")
    config.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="fields of CompressionConfig"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE.safetensors",
        help="a calibrated code of `kvcompress calibrate` for the sealed pages",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on with a configuration that does not keep its bound; the log says so",
    )
    add_kv_dtype(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")


def _config(args: argparse.Namespace) -> CompressionConfig:
    """What is named wins over the environment, which must be valid all the same."""
    config = environment = CompressionConfig.from_env()
    if args.recipe is not None:
        config = CompressionConfig.recipe(args.recipe)
    if args.config is not None:
        config = CompressionConfig.from_toml(args.config)
    if args.profile is not None:
        config = dataclasses.replace(config, profile=str(args.profile))
    return dataclasses.replace(config, force=config.force or args.force or environment.force)


def _demo(args: argparse.Namespace) -> None:
    from rich.console import Console

    from kvcompress_jax.lab import demo
    from kvcompress_jax.lab.gate import with_measurement
    from kvcompress_jax.lab.output import check_writable, write_json
    from kvcompress_jax.lab.plots import plot_accuracy
    from kvcompress_jax.lab.progress import stages
    from kvcompress_jax.lab.tables import show_demonstration
    from kvcompress_jax.lab.texts import load_text

    config = _config(args)
    text = load_text(args.text)
    for path in (args.plot, args.json):
        if path is not None:
            check_writable(path)
    console = Console()
    with metrics_commands.serving(args) as board, stages(console) as progress:
        model = read_model(args, progress)
        config = with_measurement(config, model, kv_dtype=args.kv_dtype, progress=progress)
        shown = demo.demonstrate(
            model, text, config, kv_dtype=args.kv_dtype, board=board, progress=progress
        )
    show_demonstration(console, shown)
    plot_accuracy(
        args.plot,
        shown.recipes,
        shown.compressed.history,
        title=f"{model.name}, {args.text.name if args.text else 'CPython language reference'}",
        kv_bits=32 if args.kv_dtype == "float32" else 16,
    )
    console.print(f"plot: {args.plot}")
    if args.json is not None:
        write_json(args.json, demo.as_json(shown, model))
        console.print(f"json: {args.json}")


def _eval(args: argparse.Namespace) -> None:
    from rich.console import Console

    from kvcompress_jax.lab.demo import config_name
    from kvcompress_jax.lab.evaluate import Evaluator
    from kvcompress_jax.lab.gate import with_measurement
    from kvcompress_jax.lab.output import check_writable, write_json
    from kvcompress_jax.lab.progress import stages
    from kvcompress_jax.lab.tables import show_evaluations
    from kvcompress_jax.lab.texts import load_text

    config = _config(args)
    text = load_text(args.text)
    if args.json is not None:
        check_writable(args.json)
    console = Console()
    with stages(console) as progress:
        model = read_model(args, progress)
        config = with_measurement(config, model, kv_dtype=args.kv_dtype, progress=progress)
        evaluator = Evaluator(
            model,
            text,
            context_tokens=args.context,
            continuation_tokens=args.continuation,
            facts=args.facts,
            kv_dtype=args.kv_dtype,
            chunk_tokens=args.chunk,
            progress=lambda stage: progress(stage, 0.0),
        )
        evaluation = evaluator.evaluate(config)
    name = config_name(config)
    show_evaluations(console, {name: evaluation}, f"{model.name}, {args.context} tokens of context")
    if args.json is not None:
        settings = {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "text": str(args.text) if args.text else None,
            "context": args.context,
            "continuation": args.continuation,
            "kv_dtype": args.kv_dtype,
            "recipe": name,
            "config": dataclasses.asdict(config),
        }
        write_json(args.json, dataclasses.asdict(evaluation) | settings)
        console.print(f"json: {args.json}")


def _train_importance(args: argparse.Namespace) -> None:
    from kvcompress_jax.lab.importance_command import train

    config = CompressionConfig.from_env()
    train(
        args.model,
        args.text or [None],
        config,
        out=args.out,
        tokens=args.tokens,
        steps=args.steps,
        json=args.json,
    )
