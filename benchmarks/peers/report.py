"""What was measured, as tables, JSON and Markdown."""

import dataclasses
import importlib.metadata
import json
import platform
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .contract import Shape
from .harness import OPERATIONS, Refused, Timed

PACKAGES = (
    "kvcompress-jax jax jaxlib numpy torch transformers hqq optimum-quanto turboquant tqai"
    " turboquantcpu tiny-turboquant kvq"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Contenders of one shape and number of bits."""

    shape: Shape
    timed: list[Timed]
    refused: list[Refused]


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
        parts = []
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
        tables = [_beside(section) for section in self.sections if section.timed]
        bits = sorted({t.bits for s in self.scaling for t in s.timed}, reverse=True)
        return tables + [_growth(self.scaling, n) for n in bits]

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
        notes.append(f"Medians of {self.repeats} rounds. Again: {self.command}")
        return notes


def _beside(section: Section) -> tuple[str, list[str], list[list[str]]]:
    shape, ours = section.shape, section.timed[0]
    columns = ["", "bits stored", "error / bound"]
    for operation in OPERATIONS:
        columns += [f"{operation}, ms", "times ours"]
    rows = []
    for t in section.timed:
        row = [
            t.name,
            f"{t.checked.bits_stored:.2f}",
            f"{t.checked.error / t.checked.bound:.2f}",
        ]
        for operation in OPERATIONS:
            row.append(f"{t.milliseconds(operation, shape.thousands):.2f}")
            middle, least, most = t.ratio(operation, ours)
            row.append("1" if t is ours else f"{middle:.2f} ({least:.2f}-{most:.2f})")
        rows.append(row)
    title = (
        f"{ours.bits} bits: ms per 1K tokens, {shape.layers} layers x {shape.kv_heads} KV heads x"
        f" {shape.head_dim}, {shape.heads} query heads, {shape.tokens} tokens, batch {shape.batch}"
    )
    return title, columns, rows


def _growth(sections: list[Section], bits: int) -> tuple[str, list[str], list[list[str]]]:
    columns = ["tokens x KV heads x batch"]
    rows = []
    for section in sections:
        shape, timed = section.shape, [t for t in section.timed if t.bits == bits]
        if not timed:
            continue
        if len(columns) == 1:
            columns += [f"{t.name}: {operation}" for t in timed for operation in OPERATIONS]
        row = [f"{shape.tokens} x {shape.kv_heads} x {shape.batch}"]
        row += [f"{t.milliseconds(o, shape.thousands):.2f}" for t in timed for o in OPERATIONS]
        rows.append(row)
    return f"{bits} bits: how the cost grows, ms per 1K tokens of all sequences", columns, rows


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
