"""Compiling for a GPU that is not there.

A target is a text file as XLA describes a device (`targets/`): it compiles for it, and the roofline
takes the same file's bandwidth. Importing this module decides how the process compiles, so that it
comes first, and a process compiles for one architecture only.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

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


def compile_for(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    target: Target,
    *,
    donate: Sequence[int] = (),
) -> jax.stages.Compiled:
    """Compiles a function of abstract arrays for the target.

    Args:
      function: of `arguments`.
      arguments: pytrees of `jax.ShapeDtypeStruct`.
      target: what to compile for.
      donate: numbers of the arguments that may be updated in place.
    """
    topology = topologies.get_topology_desc(
        target.name, "cuda", target_config=target.text, topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tuple(arguments)
    )
    device = jax.sharding.AbstractDevice(
        device_kind=NAMES[target.name], num_cores=None, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function, donate_argnums=tuple(donate)).trace(*placed)
        return traced.lower(lowering_platforms=("cuda",)).compile()
