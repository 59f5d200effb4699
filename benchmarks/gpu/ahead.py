"""Compiling for a GPU that is not there.

Importing this module decides how the process compiles, so that it comes before anything asks JAX
for a device; and a process compiles for one architecture only.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu.target import NAMES, Target


@dataclasses.dataclass(frozen=True)
class _Device(jax.sharding.AbstractDevice):
    """Mosaic GPU compiles for what the device says it is, as real ones do."""

    compute_capability: str


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
    device = _Device(
        device_kind=NAMES[target.name],
        num_cores=None,
        platform="gpu",
        compute_capability=".".join(map(str, target.capability)),
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function, donate_argnums=tuple(donate)).trace(*placed)
        return traced.lower(lowering_platforms=("cuda",)).compile()
