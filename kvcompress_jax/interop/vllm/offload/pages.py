"""Blocks of vLLM to pages of all layers in host memory, and back."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvcompress_jax.interop.vllm.all_layers import FLOOR_FINE, AllLayers
from kvcompress_jax.interop.vllm.blocks import BlockStates
from kvcompress_jax.interop.vllm.offload.slots import Plane
from kvcompress_jax.interop.vllm.step import NONE
from kvcompress_jax.manager.disk import code_fingerprint


class BlockPages:
    """Takes blocks out of the layers' pools and puts them in, with what the host knows of them.

    A page that leaves is compressed: one that is still raw, because it is recent, is coded on its
    way. A page of level 1 has the plane `fine`, one of level 2 has not; floor layers have their own
    plane, `floor_fine`, at both. The first page of a sequence has `sinks`, its exact first tokens.
    Without compression there is `raw` alone.
    """

    def __init__(self, states: BlockStates, layers: AllLayers) -> None:
        self.states, self.layers = states, layers
        self.without_sink = 0  # loaded first pages that found no slot for their exact tokens

    @property
    def planes(self) -> list[Plane]:
        """That a page can have."""
        carve, count, floors = self.states.carve, self.states.layers, self.states.floors
        layers = {"raw": count}  # how many of them a plane is of
        if self.states.config.compresses:
            layers = dict.fromkeys(self.layers.sealed_pools, count)
            layers |= {"fine": count - floors} if carve.sizes.fine_chunks else {}
            layers |= {FLOOR_FINE: floors} if floors else {}
            layers |= {"sinks": count} if carve.sizes.sink_slots else {}
        regions = {r.name: r for r in carve.regions}
        regions[FLOOR_FINE] = regions["fine"]
        planes = [
            Plane(name=name, dtype=regions[name].dtype.name, shape=(n, *regions[name].shape[1:]))
            for name, n in layers.items()
        ]
        return [*planes, Plane(name="heat", dtype="float32", shape=(1,))]

    @property
    def uncompressed_bytes(self) -> int:
        """Of a page of all layers, as vLLM would store it."""
        return self.states.layers * self.states.carve.layout.uncompressed_page_bytes

    @property
    def code(self) -> str:
        """Names what the planes mean: equal where pages can be exchanged."""
        config = self.states.config
        kind = "coded" if config.compresses else "raw"
        code = f"vllm-{kind}-{self.states.layers}-{code_fingerprint(self.states.carve.layout)}"
        profile = self.layers.code_digest
        code += f"-profile-{profile}" if profile else ""
        floors = sum(1 << i for i in self.layers.floors)  # short, however many they are
        return f"{code}-floors-{floors:x}" if floors else code

    def take_out(self, block: int) -> dict[str, np.ndarray]:
        """The page of a full block, as a copy.

        Raises:
          RuntimeError: the block is not full, or empty.
        """
        states = self.states
        raw = states.raw_page(block)
        if states.filled[block] != states.page_size or (raw == NONE and not states.sealed[block]):
            raise RuntimeError(f"block {block}: expected a full one, got {states.filled[block]}")
        first = bool(states.index[block] == 0)
        if raw == NONE:
            page = self.layers.take_sealed(block)
            if states.chunk_of[block] != NONE:
                page["fine"] = np.stack(self.layers.save_fine(int(states.chunk_of[block])))
            elif block in states.kept:
                page["fine"] = np.stack(states.kept[block])
            if states.sink_of[block] != NONE:
                page["sinks"] = self.layers.take("sinks", int(states.sink_of[block]))
        elif not states.config.compresses:
            page = {"raw": self.layers.take("raw", raw)}
        else:
            with_sinks = first and states.sinks.capacity > 0
            (position,) = states.first_of([block]).tolist()
            page = self.layers.code(raw, first=position, exact=with_sinks)
            if with_sinks:
                tokens = states.carve.layout.sink_tokens
                page["sinks"] = self.layers.take("raw", raw)[:, :, :, :tokens].copy()
        page["heat"] = np.asarray([states.heat[block]], np.float32)
        return page

    def put_in(self, block: int, place: int, page: Mapping[str, np.ndarray]) -> None:
        """Makes a page the content of a block, whose own is forgotten.

        Args:
          block: of no running sequence.
          place: of the page in its sequence.
          page: as `take_out` gave it.
        """
        states, layers = self.states, self.layers
        if "raw" in page:
            layers.put("raw", states.adopt_raw(block, place), page["raw"])
            return
        fine = list(page["fine"]) if "fine" in page else None
        chunk, sink = states.adopt_sealed(
            block, place, layers, fine=fine, sinks="sinks" in page, heat=float(page["heat"][0])
        )
        layers.put_sealed(block, page)
        if chunk != NONE and fine is not None:
            layers.load_fine(chunk, fine)
        if sink != NONE:
            layers.put("sinks", sink, page["sinks"])
        elif "sinks" in page:
            self.without_sink += 1
            layers.code_sinks(block, chunk, page["sinks"])


def check_layers(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """Raises RuntimeError unless there is one contiguous memory for each layer."""
    if len(names) != len(tensors) or not all(t.is_contiguous() for t in tensors):
        raise RuntimeError(
            f"KV offloading: expected {len(names)} contiguous memories, one for each layer, got"
            f" {[tuple(t.shape) for t in tensors]}"
        )
