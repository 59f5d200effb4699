"""What is to be done between two steps, and what happened so far."""

import dataclasses
from typing import Protocol

import numpy as np

from kvcompress_jax.interop.vllm.step import Seals


class Executor(Protocol):
    """What all layers do between two steps."""

    def seal(self, seals: Seals) -> None:
        """Codes raw pages."""

    def save_fine(self, chunk: int) -> list[np.ndarray]:
        """The fine chunks of all layers but the floor layers, copied to the host."""

    def drop_sinks(self, block: int, chunk: int, slot: int) -> None:
        """Codes a first page again, with the exact tokens of a slot among the others."""

    def load_fine(self, chunk: int, saved: list[np.ndarray]) -> None:
        """The reverse of `save_fine`, to any chunk."""


@dataclasses.dataclass
class Counters:
    """Events so far, in blocks."""

    seals: int = 0
    early_seals: int = 0  # in their window, to make room for other raw pages
    unrefined: int = 0  # sealed at level 2 for want of a chunk
    demotions: int = 0
    promotions: int = 0
    refusals: int = 0  # promotions of hot blocks without a kept fine plane or a colder block
    without_sink: int = 0  # first pages whose first tokens are coded like the others
    reused: int = 0  # sealed blocks that another content took
    abandoned: int = 0  # unfinished blocks of sequences that are gone, whose raw page was needed
