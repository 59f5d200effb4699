"""What all layers do alike."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from kvcompress_jax.interop.vllm.carve import sealed_pools
from kvcompress_jax.interop.vllm.layer import LayerMemory
from kvcompress_jax.interop.vllm.step import Seals

FLOOR_FINE = "floor_fine"  # of a page: the fine planes of the floor layers


class AllLayers:
    """The `Executor` of `blocks`."""

    def __init__(self) -> None:
        self.memories: dict[str, LayerMemory] = {}

    @property
    def floors(self) -> list[int]:
        """Which of the layers are floor layers."""
        return [i for i, m in enumerate(self.memories.values()) if m.carve.floor]

    @property
    def sealed_pools(self) -> tuple[str, ...]:
        """See `carve.sealed_pools`; alike in all layers."""
        return sealed_pools(next(iter(self.memories.values())).carve.layout)

    @property
    def code_digest(self) -> str:
        """See `CodeTables.code_digest`."""
        digests = "".join(m.tables.code_digest for m in self.memories.values())
        return hashlib.blake2b(digests.encode(), digest_size=12).hexdigest() if digests else ""

    def _of_kind(self, *, floor: bool) -> list[LayerMemory]:
        return [m for m in self.memories.values() if m.carve.floor == floor]

    def seal(self, seals: Seals) -> None:
        for memory in self.memories.values():
            memory.seal(seals)

    def save_fine(self, chunk: int) -> list[np.ndarray]:
        return [m.pools["fine"][chunk].cpu().numpy().copy() for m in self._of_kind(floor=False)]

    def load_fine(self, chunk: int, saved: list[np.ndarray]) -> None:
        for memory, fine in zip(self._of_kind(floor=False), saved, strict=True):
            memory.pools["fine"][chunk] = torch.from_numpy(fine).to(memory.device)

    def take(self, name: str, i: int) -> np.ndarray:
        """An entry of a pool of each layer: [layers, ...]."""
        return np.stack([m.take(name, i) for m in self.memories.values()])

    def take_sealed(self, block: int) -> dict[str, np.ndarray]:
        """A sealed page without the fine planes that it may lack."""
        page = {name: self.take(name, block) for name in self.sealed_pools}
        if floors := self._of_kind(floor=True):
            page[FLOOR_FINE] = np.stack([m.take("fine", block) for m in floors])
        return page

    def put_sealed(self, block: int, page: Mapping[str, np.ndarray]) -> None:
        """The reverse of `take_sealed`."""
        for name in self.sealed_pools:
            self.put(name, block, page[name])
        if floors := self._of_kind(floor=True):
            for memory, fine in zip(floors, page[FLOOR_FINE], strict=True):
                memory.put("fine", block, fine)

    def put(self, name: str, i: int, array: np.ndarray) -> None:
        """The reverse of `take`."""
        for memory, entry in zip(self.memories.values(), array, strict=True):
            memory.put(name, i, entry)

    def code(self, raw: int, *, first: int, exact: bool) -> dict[str, np.ndarray]:
        """The code of a raw page, with fine planes where the layers have such; see
        `LayerMemory.code`."""
        memories = self.memories.values()
        codes = [(m.code(raw, first=first, exact=exact), m.carve.floor) for m in memories]
        page = {name: np.stack([code[name] for code, _ in codes]) for name in self.sealed_pools}
        for name, of_floors in (("fine", False), (FLOOR_FINE, True)):
            fine = [code["fine"] for code, floor in codes if floor == of_floors and "fine" in code]
            page |= {name: np.stack(fine)} if fine else {}
        return page

    def drop_sinks(self, block: int, chunk: int, slot: int) -> None:
        self.code_sinks(block, chunk, self.take("sinks", slot))

    def code_sinks(self, block: int, chunk: int, exact: np.ndarray) -> None:
        """See `LayerMemory.code_sinks`."""
        for memory, tokens in zip(self.memories.values(), exact, strict=True):
            memory.code_sinks(block, chunk, tokens)
