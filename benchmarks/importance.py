"""Which importance orders the tokens of a page best: KL by score, with the specification's weights.

    make importance TEXTS="prose.txt code.txt"

which runs

    .venv/bin/python benchmarks/importance.py FILE...

A model on several parts of each text's second half: 1,024 tokens of context, then 256 tokens that
are teacher-forced; at a ratio of 0.25 (half of each page's tokens have 6 bits, the others 4) and of
0.125 (a quarter has). The learned scores are trained here, on the first halves of the texts: one
score for each text, one for all of them. The oracle knows the attention that those 256 tokens will
give: no score can be expected to do better. Geometric mean over the parts, 1e-4 nats per token.
Half an hour.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.importance import MAGNITUDES, LearnedScore, TokenStatistics
from kvcompress_jax.importance.learned import save_learned
from kvcompress_jax.lab.divergence import divergence
from kvcompress_jax.lab.output import check_writable, write_json
from kvcompress_jax.lab.texts import load_text
from kvcompress_jax.lab.train_importance import train_importance
from kvcompress_jax.models.dense import capture_forward
from kvcompress_jax.models.load import Model, load_model
from kvcompress_jax.models.runner import make_runner

DEFAULT = CompressionConfig.recipe("balanced")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Oracle:
    """Knows tokens by their keys."""

    keys: jax.Array  # f32[layers, context, heads, dim]
    attention: jax.Array  # f32[layers, context, heads], root mean square over later queries

    def __call__(self, statistics: TokenStatistics, where: jax.Array, /) -> jax.Array:
        """See `LearnedScore`."""
        squares = jnp.sum(self.keys**2, axis=-1)[None]
        products = jnp.einsum("thd,shd->tsh", statistics.keys, self.keys)
        known = jnp.argmin(squares - 2 * products, axis=1)
        return jnp.take_along_axis(self.attention, known, axis=0)


class Part:
    """A part of a text, and what the uncompressed model says about it."""

    def __init__(self, model: Model, tokens: list[int], *, context: int) -> None:
        self.model, self.tokens, self.context = model, tokens, context
        self.logits = self._logits(CompressionConfig(enabled=False), None)

    def kl(self, config: CompressionConfig, score: LearnedScore | None = None) -> float:
        """Mean KL from the uncompressed model, nats per token."""
        targets = np.array(self.tokens[self.context + 1 :], np.int32)
        logits = self._logits(config, score)
        return float(divergence(self.logits[:-1], logits[:-1], targets).kl.mean())

    def oracle(self) -> Oracle:
        """The score that knows what comes."""
        config, context = self.model.config, self.context
        tokens = jnp.asarray([self.tokens], jnp.int32)
        _, seen = capture_forward(self.model.params, config, tokens)

        def layer(q: jax.Array, k: jax.Array) -> jax.Array:
            q = q[context:].reshape(
                len(self.tokens) - context, config.num_kv_heads, -1, config.head_dim
            )
            logits = jnp.einsum("thgd,shd->hgts", q, k) * config.query_scale
            position = jnp.arange(len(self.tokens))
            later = position[None] > position[context:, None]
            weights = jax.nn.softmax(jnp.where(later, -jnp.inf, logits), axis=-1)
            return jnp.sqrt(jnp.mean(weights[..., :context] ** 2, axis=(1, 2))).T

        attention = jax.lax.map(lambda x: layer(*x), (seen.q[:, 0], seen.k[:, 0]))
        return Oracle(keys=seen.k[:, 0, :context], attention=attention)

    def _logits(self, config: CompressionConfig, score: LearnedScore | None) -> jax.Array:
        runner = make_runner(
            self.model, config, tokens=len(self.tokens), max_sequences=1, chunk_tokens=self.context
        )
        if score is not None:
            runner.cache = dataclasses.replace(runner.cache, learned=score)
        sequence = runner.manager.add()
        runner.extend(sequence, self.tokens[: self.context])
        runner.chunk_tokens = config.page_size  # pages are sealed as they leave the window
        return runner.extend(sequence, self.tokens[self.context :], all_logits=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--parts", type=int, default=3, help="of each text (default: %(default)s)")
    parser.add_argument("--model", default="smollm2", metavar="smollm2|FILE.gguf|DIR")
    parser.add_argument("--context", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--continuation", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--train-tokens", type=int, default=9216, metavar="TOKENS")
    parser.add_argument("--magnitudes", nargs="*", choices=MAGNITUDES, default=[DEFAULT.magnitude])
    parser.add_argument(
        "--ratios", nargs="+", type=float, default=[0.25, 0.125], help="shares of the fine plane"
    )
    parser.add_argument("--fine-bits", type=int, choices=(2, 4), help="default: by the ratio")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every part's KL")
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json)
    if 0.5 in args.ratios and args.fine_bits is None:
        parser.error("--ratios: 0.5 has 6 bits for all tokens, and no order: add --fine-bits 4")
    model = load_model(args.model)
    if model.tokenizer is None:
        parser.error(f"{args.model}: expected a model with a tokenizer, got none")
    names = [file.name for file in args.files]
    texts = [model.tokenizer.encode(load_text(file)) for file in args.files]
    parts, size = [], args.context + args.continuation
    for text in texts:
        if len(text) < 2 * size:
            parser.error(f"text: expected at least {2 * size} tokens, got {len(text)}")
        starts = np.linspace(len(text) // 2, len(text) - size, args.parts).astype(int)
        parts.append([Part(model, text[at : at + size], context=args.context) for at in starts])
    console, found = Console(), {}

    def measure(name: str, config: CompressionConfig, ratios: Iterable[float]) -> None:
        for ratio in ratios:
            at = dataclasses.replace(config, ratio=ratio)
            found[f"{name}, ratio {ratio}"] = [[part.kl(at) for part in row] for row in parts]
        console.print(name, style="dim")

    plain = dataclasses.replace(DEFAULT, fine_bits=args.fine_bits)
    for name in args.magnitudes:
        ratios = args.ratios if name == plain.magnitude else args.ratios[:1]
        measure(name, dataclasses.replace(plain, magnitude=name), ratios)
    measure("nobody refined (compact)", CompressionConfig.recipe("compact"), args.ratios[:1])
    halves = [text[: len(text) // 2] for text in texts]
    groups = {name: [half] for name, half in zip(names, halves, strict=True)}
    if len(names) > 1:
        groups["all of them"] = halves
    with tempfile.TemporaryDirectory() as folder:
        for name, group in groups.items():
            trained = train_importance(model, group, plain, tokens=args.train_tokens)
            path = Path(folder) / "learned.safetensors"
            save_learned(path, trained.learned, fingerprint=model.fingerprint)
            config = dataclasses.replace(plain, learned_importance=str(path))
            measure(f"{plain.magnitude}, learned from {name}", config, args.ratios)
    for ratio in args.ratios:
        config = dataclasses.replace(plain, ratio=ratio)
        found[f"{plain.magnitude}, oracle, ratio {ratio}"] = [
            [part.kl(config, part.oracle()) for part in row] for row in parts
        ]
    table = Table(title="KL from the uncompressed model, 1e-4 nats per token")
    table.add_column("importance")
    for name in names:
        table.add_column(name, justify="right")
    for name, rows in found.items():
        table.add_row(name, *(f"{1e4 * np.exp(np.mean(np.log(row))):.2f}" for row in rows))
    console.print(table)
    if args.json:
        write_json(args.json, {"texts": names, "kl": found})


if __name__ == "__main__":
    main()
