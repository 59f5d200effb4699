"""Which reading of "magnitude importance" orders the tokens of a page best: KL by variant.

    .venv/bin/python benchmarks/importance.py FILE...

For each text file: 1,024 tokens of context at 6.5 bits (half of each page's tokens refined), 256
teacher-forced tokens, SmolLM2. The specification's weights, 0.4, 0.4 and 0.2, in all rows.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.importance import MAGNITUDES
from kvcompress_jax.lab.evaluate import Evaluator
from kvcompress_jax.lab.texts import load_text
from kvcompress_jax.models.load import load_model


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    files = parser.parse_args().files or [None]
    model = load_model("smollm2")
    evaluators = [Evaluator(model, load_text(file), facts=0) for file in files]
    table = Table(title="KL from the uncompressed model, 1e-4 nats per token")
    table.add_column("magnitude")
    for file in files:
        table.add_column(file.name if file else "language reference", justify="right")
    configs = {name: CompressionConfig(magnitude=name) for name in MAGNITUDES}
    configs["nobody refined (compact)"] = CompressionConfig.recipe("compact")
    for name, config in configs.items():
        kl = [evaluator.evaluate(config).kl_mean for evaluator in evaluators]
        table.add_row(name, *(f"{1e4 * x:.2f}" for x in kl))
    Console().print(table)


if __name__ == "__main__":
    main()
