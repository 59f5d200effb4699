"""Results as tables in the terminal."""

import dataclasses
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from kvcompress_jax.lab.conversation import Conversation, Levels
from kvcompress_jax.lab.demo import Demonstration
from kvcompress_jax.lab.evaluate import Evaluation

_EVALUATION_ROWS = (
    ("effective_bits", "bits per value, sealed pages", "{:.2f}"),
    ("cache_bits", "bits per value, whole cache", "{:.2f}"),
    ("memory_saved_fraction", "memory saved", "{:.1%}"),
    ("allocated_bytes", "bytes allocated", "{:,}"),
    ("uncompressed_bytes", "bytes uncompressed", "{:,}"),
    ("delta_nll", "delta NLL, nats per token", "{:+.4f}"),
    ("kl_mean", "KL, mean, nats", "{:.5f}"),
    ("kl_p99", "KL, 99th percentile", "{:.5f}"),
    ("top1_agreement", "same most likely token", "{:.1%}"),
    ("retrieval_accuracy", "facts recalled", "{:.1%}"),
    ("retrieval_accuracy_uncompressed", "facts recalled, uncompressed", "{:.1%}"),
    ("attention_output_error", "attention output error", "{:.4f}"),
    ("key_cosine", "cosine of keys", "{:.5f}"),
    ("value_cosine", "cosine of values", "{:.5f}"),
    ("compress_ms_per_1k_tokens", "compress, ms per 1K tokens", "{:.1f}"),
    ("decompress_ms_per_1k_tokens", "decompress, ms per 1K tokens", "{:.1f}"),
)


def show_evaluations(console: Console, evaluations: Mapping[str, Evaluation], title: str) -> None:
    """A column for each configuration; measures that were not taken are left out."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in evaluations:
        table.add_column(name, justify="right")
    for field, label, form in _EVALUATION_ROWS:
        values = [getattr(e, field) for e in evaluations.values()]
        if all(v == v for v in values):  # not NaN
            table.add_row(label, *(form.format(v) for v in values))
    console.print(table)


def show_demonstration(console: Console, shown: Demonstration) -> None:
    """Answers side by side, memory, levels over time and fidelity."""
    plain, compressed = shown.uncompressed, shown.compressed
    answers = Table(title="Answers", title_justify="left", show_lines=True)
    answers.add_column("question")
    answers.add_column("uncompressed")
    answers.add_column(shown.name)
    for i, question in enumerate(shown.questions):
        asked = (
            f"{question}\n(planted: {shown.expected[i]})" if i < len(shown.expected) else question
        )
        given = (_beginning(shown.tokenizer.decode(c.answers[i])) for c in (plain, compressed))
        answers.add_row(*(_literal(text) for text in (asked, *given)))
    console.print(answers)

    memory = Table(title="The same conversation in either cache", title_justify="left")
    memory.add_column("")
    memory.add_column("uncompressed", justify="right")
    memory.add_column(shown.name, justify="right")
    for label, values in _memory_rows(plain, compressed):
        memory.add_row(label, *values)
    console.print(memory)

    levels = Table(title=f"Pages over time, {shown.name}", title_justify="left")
    for column in ("step", "tokens", "level 0", "level 1", "level 2"):
        levels.add_column(column, justify="right")
    for step in _some_steps(len(compressed.history)):
        row: Levels = compressed.history[step]
        levels.add_row(str(step + 1), *(str(x) for x in dataclasses.astuple(row)))
    console.print(levels)

    show_evaluations(console, shown.recipes, "Fidelity against bits")


def _memory_rows(
    plain: Conversation, compressed: Conversation
) -> list[tuple[str, tuple[str, str]]]:
    def both(form: str, *values: object) -> tuple[str, str]:
        first, second = (form.format(v) if v is not None else "-" for v in values)
        return first, second

    a, b = plain.stats, compressed.stats
    ratios = a["avg_compression_ratio"], b["avg_compression_ratio"]
    same = sum(x == y for x, y in zip(plain.answers, compressed.answers, strict=True))
    return [
        ("tokens in the cache", both("{:,}", a["tokens"], b["tokens"])),
        ("bytes allocated", both("{:,}", a["allocated_bytes"], b["allocated_bytes"])),
        ("tokens per GiB", both("{:,.0f}", plain.tokens_per_gib, compressed.tokens_per_gib)),
        ("compression ratio", both("{:.2f}", *ratios)),
        ("bits per value, sealed pages", both("{:.2f}", a["effective_bits"], b["effective_bits"])),
        ("bits per value, whole cache", both("{:.2f}", a["cache_bits"], b["cache_bits"])),
        (
            "facts recalled",
            both("{}", *(f"{sum(c.recalled)} of {len(c.recalled)}" for c in (plain, compressed))),
        ),
        ("answers equal to the last token", ("", f"{same} of {len(plain.answers)}")),
        ("seconds, compilation included", both("{:.1f}", plain.seconds, compressed.seconds)),
    ]


def _some_steps(steps: int, shown: int = 10) -> list[int]:
    """Evenly spread steps, the last one among them."""
    return sorted({round(i * (steps - 1) / (shown - 1)) for i in range(shown)})


def _beginning(answer: str) -> str:
    """An answer up to its first empty line: a base model goes on with the next question."""
    return answer.strip().split("\n\n")[0]


def _literal(text: str) -> str:
    """Text of a model may look like markup."""
    return text.replace("[", r"\[")
