"""What was measured, as tables, JSON and Markdown."""

import dataclasses
import importlib.metadata
import json
import platform
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .growth import growth
from .harness import OPERATIONS
from .section import Section
from .verdict import best, times

PACKAGES = (
    "kvcompress-jax jax jaxlib numpy torch transformers hqq optimum-quanto turboquant tqai"
    " turboquantcpu tiny-turboquant tqkv kvq"
).split()


HEADING = """# Beside other projects' own code, on a CPU

`make peers` makes this page. Compress, decompress and decode attention (one query per sequence and
head) for layers of a Llama-3-8B-like shape, in milliseconds for 1,024 tokens. Ours is jitted; of a
peer's own code the public quantizer or cache is called, layer by layer. All use the same threads
and random bfloat16 numbers, and take turns, so that what disturbs the machine disturbs all. Every
result is checked before it is timed: the round trip against what the bits allow, and attention
against float64 attention to the very keys and values that the contender decompresses. Medians,
quartiles in parentheses; ratios are of times in the same round. Slow contenders have fewer rounds.
Peers' attention is their own, or torch's on what they decompress, called as it is fastest.

*KIVI in plain torch* is KIVI as we would write it, since its own code needs a GPU; *in compiled
torch* it goes through `torch.compile`: what fusing alone gives, of keys and values that stay in the
order in which they came. An 8-bit page of ours lies in two planes of nibbles, values transposed, so
that it can be demoted without coding it again and read by GPUs as it lies; both planes have to be
joined when it is opened, where others read one byte. Opening is for export and for long prompts:
generation attends to the planes as they are."""


def machine(threads: int) -> dict[str, object]:
    """Processor, threads and versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": model,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One run."""

    machine: dict[str, object]
    command: str
    repeats: int
    sections: list[Section]
    scaling: list[Section]

    def json(self) -> str:
        """Everything, every round's seconds included."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def print(self, console: Console) -> None:
        """The same tables as in Markdown, and under them how to get them again."""
        for title, columns, rows in self._tables():
            table = Table(title=title, title_justify="left")
            for i, column in enumerate(columns):
                table.add_column(column, justify="left" if i == 0 else "right")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for line in self._notes():
            console.print(line, markup=False)

    def markdown(self) -> str:
        """Tables and notes."""
        parts = [HEADING]
        for title, columns, rows in self._tables():
            lines = [
                f"**{title}**",
                "",
                _line(columns),
                _line(["---"] + ["---:"] * (len(columns) - 1)),
            ]
            parts.append("\n".join(lines + [_line(row) for row in rows]))
        return "\n\n".join([*parts, *self._notes()]) + "\n"

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        beside = [section for section in self.sections if section.timed]
        tables = [best(beside)] if any(len(s.timed) > 1 for s in beside) else []
        return tables + [_beside(section) for section in beside] + growth(self.scaling)

    def _notes(self) -> list[str]:
        notes = [
            f"Not timed: {r.name}, {r.bits} bits: {r.reason}"
            for section in self.sections
            for r in section.refused
        ]
        versions = self.machine["versions"]
        assert isinstance(versions, dict)
        notes.append(
            f"{self.machine['processor']}, {self.machine['system']}, {self.machine['threads']}"
            f" threads, Python {self.machine['python']}, "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
        )
        notes.append(f"Again: {self.command}")
        return notes


def _beside(section: Section) -> tuple[str, list[str], list[list[str]]]:
    shape, ours = section.shape, section.timed[0]
    columns = ["", "rounds", "bits stored", "error / bound"]
    for operation in OPERATIONS:
        columns += [f"{operation}, ms", "times ours"]
    rows = []
    for t in section.timed:
        row = [
            t.name,
            f"{t.rounds}",
            f"{t.checked.bits_stored:.2f}",
            f"{t.checked.error / t.checked.bound:.2f}",
        ]
        for operation in OPERATIONS:
            low, high = t.spread(operation, shape.thousands)
            row.append(f"{t.milliseconds(operation, shape.thousands):.1f} ({low:.1f}-{high:.1f})")
            row.append("1" if t is ours else times(*t.ratio(operation, ours)))
        rows.append(row)
    title = (
        f"{ours.bits} bits: ms per 1K tokens, {shape.layers} layers x {shape.kv_heads} KV heads x"
        f" {shape.head_dim}, {shape.heads} query heads, {shape.tokens} tokens, batch {shape.batch}"
    )
    return title, columns, rows


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
