"""All contenders on all workloads, and the report."""

import dataclasses
import sys

from rich.console import Console

from .contract import Contender, Shape, Workload
from .growth import growing
from .harness import Refused, Timed, compare
from .hf_quantized import HuggingFace
from .kivi_torch import Kivi
from .kvq_package import Kvq
from .ours import Ours
from .report import Report, machine
from .section import Section
from .tiny_turboquant import TinyTurboquant
from .tqai import Tqai
from .tqkv import Tqkv
from .turboquant import Turboquant
from .turboquantcpu import TurboquantCpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for on the command line."""

    bits: tuple[int, ...]
    layers: int
    tokens: int
    repeats: int
    threads: int
    scaling: bool
    json: str | None
    markdown: str | None
    command: str


def contenders(bits: int) -> list[Contender]:
    """Ours first."""
    return [
        Ours(bits),
        Kivi(bits),
        Kivi(bits, compiled=True),
        TinyTurboquant(bits),
        HuggingFace(bits, "quanto"),
        HuggingFace(bits, "hqq"),
        Tqkv(bits),
        Turboquant(bits),
        Tqai(bits),
        TurboquantCpu(bits),
        Kvq(bits),
    ]


def grown_contenders(bits: int) -> list[Contender]:
    """Of whom we see how the cost grows."""
    return [Ours(bits), Kivi(bits)]


def run(options: Options) -> None:
    """Times everything that was asked for, prints it and writes the files."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    shape = Shape(layers=options.layers, tokens=options.tokens)
    sections, alone = [], []
    with console.status("") as status:
        for bits in options.bits:
            timed, refused = compare(
                contenders(bits),
                Workload.random(shape),
                repeats=options.repeats,
                note=status.update,
            )
            sections.append(Section(shape=shape, timed=timed, refused=refused))
        if options.scaling:
            for bits in options.bits:
                for grown in growing(shape):
                    timed, refused = compare(
                        grown_contenders(bits),
                        Workload.random(grown),
                        repeats=max(3, options.repeats // 2),
                        note=status.update,
                    )
                    alone.append(Section(shape=grown, timed=timed, refused=refused))
    report = Report(
        machine=machine(options.threads),
        command=options.command,
        repeats=options.repeats,
        sections=sections,
        scaling=alone,
    )
    report.print(console)
    for path, text in ((options.json, report.json()), (options.markdown, report.markdown())):
        if path:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
    if not any(
        isinstance(t, Timed) and t.name == "kvcompress_jax" for s in sections for t in s.timed
    ):
        raise SystemExit("our own results were refused; see above")


__all__ = ["Options", "Refused", "contenders", "growing", "run"]
