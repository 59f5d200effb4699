"""GPUs, as XLA describes them to itself (`targets/`): it compiles for such a text, and the roofline
takes the same text's bandwidth."""

import dataclasses
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "targets"
NAMES = {"a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200", "b200": "NVIDIA B200"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU, as its file describes it."""

    name: str
    text: str
    capability: tuple[int, int]
    bandwidth: float  # bytes per second
    clock: float  # cycles per second
    cores: int  # streaming multiprocessors
    registers: int  # of a core
    shared_bytes: int  # of a core
    threads: int  # of a core

    @property
    def architecture(self) -> str:
        """As people name it: "sm_90"."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def assembler_architecture(self) -> str:
        """As the assembler wants it: Hopper and later have features of their own only."""
        return self.architecture + ("a" if self.capability >= (9, 0) else "")

    @property
    def bytes_per_cycle(self) -> float:
        """Of device memory, for each core."""
        return self.bandwidth / (self.cores * self.clock)


def load_target(name: str) -> Target:
    """Reads `targets/<name>.txtpb`.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"target: expected one of {list(NAMES)}, got {name!r}")
    text = (FOLDER / f"{name}.txtpb").read_text()

    def number(field: str) -> float:
        found = re.search(rf"\b{field}: ([0-9.]+)", text)
        if found is None:
            raise ValueError(f"{name}.txtpb: expected a field {field}, got none")
        return float(found[1])

    return Target(
        name=name,
        text=text,
        capability=(int(number("major")), int(number("minor"))),
        bandwidth=number("memory_bandwidth"),
        clock=number("clock_rate_ghz") * 1e9,
        cores=int(number("core_count")),
        registers=int(number("registers_per_core_limit")),
        shared_bytes=int(number("shared_memory_per_core")),
        threads=int(number("threads_per_core_limit")),
    )
