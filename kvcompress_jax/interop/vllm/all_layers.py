"""What all layers do alike."""

import numpy as np
import torch

from kvcompress_jax.interop.vllm.layer import LayerMemory
from kvcompress_jax.interop.vllm.pools import SEALED_POOLS
from kvcompress_jax.interop.vllm.step import Seals


class AllLayers:
    """The `Executor` of `blocks`."""

    def __init__(self) -> None:
        self.memories: dict[str, LayerMemory] = {}

    def seal(self, seals: Seals) -> None:
        for memory in self.memories.values():
            memory.seal(seals)

    def save_fine(self, chunk: int) -> list[np.ndarray]:
        return [m.pools["fine"][chunk].cpu().numpy().copy() for m in self.memories.values()]

    def load_fine(self, chunk: int, saved: list[np.ndarray]) -> None:
        for memory, fine in zip(self.memories.values(), saved, strict=True):
            memory.pools["fine"][chunk] = torch.from_numpy(fine).to(memory.device)

    def take(self, name: str, i: int) -> np.ndarray:
        """An entry of a pool of each layer: [layers, ...]."""
        return np.stack([m.take(name, i) for m in self.memories.values()])

    def take_sealed(self, block: int) -> dict[str, np.ndarray]:
        """A sealed page without its fine planes."""
        return {name: self.take(name, block) for name in SEALED_POOLS}

    def put(self, name: str, i: int, array: np.ndarray) -> None:
        """The reverse of `take`."""
        for memory, entry in zip(self.memories.values(), array, strict=True):
            memory.put(name, i, entry)

    def code(self, raw: int, *, first: bool) -> dict[str, np.ndarray]:
        """The code of a raw page, with fine planes where the layers have such."""
        codes = [m.code(raw, first=first) for m in self.memories.values()]
        return {name: np.stack([code[name] for code in codes]) for name in codes[0]}

    def code_sinks(self, block: int, chunk: int, exact: np.ndarray) -> None:
        """See `LayerMemory.code_sinks`."""
        for memory, tokens in zip(self.memories.values(), exact, strict=True):
            memory.code_sinks(block, chunk, tokens)
