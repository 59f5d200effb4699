"""Workloads of ops as data, shared by the gate, the tests and the benchmarks."""

import dataclasses
from collections.abc import Callable
from typing import Any

MOST_BYTES = 1.05  # times the floor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one size.

    Attributes:
      name: unique, such as "seal_page/64x128".
      op: the op's folder.
      build: gives a function and its abstract arguments (pytrees of `jax.ShapeDtypeStruct`); the
        function calls the kernel itself, not the dispatcher.
      floor_bytes: that any implementation has to move: each stored byte read or written once.
      most_bytes: times `floor_bytes` that the program may move.
      most_spilled: bytes of a thread that are known to spill.
      needs_tensor_cores: whether it would be slow without.
      donate: numbers of the arguments that are updated in place.
      example: gives real arguments to check and time the function with; None: it is not timed.
      reference: of the same arguments, gives what the function must give; None: it is not checked.
      relative_from: see `kvcompress_jax.lab.agreement.disagreement`.
    """

    name: str
    op: str
    build: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    floor_bytes: int
    needs_tensor_cores: bool
    most_bytes: float = MOST_BYTES
    most_spilled: int = 0
    donate: tuple[int, ...] = ()
    example: Callable[[], tuple[Any, ...]] | None = None
    reference: Callable[..., Any] | None = None
    relative_from: float = 1 / 16
