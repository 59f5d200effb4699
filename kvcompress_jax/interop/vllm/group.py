"""The layers that share block ids: their states, their memory and their figures."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.kv_cache_interface import AttentionSpec

from kvcompress_jax.interop.vllm import metrics, settings
from kvcompress_jax.interop.vllm.all_layers import AllLayers
from kvcompress_jax.interop.vllm.blocks import BlockStates
from kvcompress_jax.interop.vllm.carve import Carve, carve, layer_layout
from kvcompress_jax.interop.vllm.layer import LayerMemory
from kvcompress_jax.interop.vllm.offload.worker import OffloadWorker
from kvcompress_jax.interop.vllm.stats import VllmCompressionStats, compression_stats
from kvcompress_jax.interop.vllm.step import Step
from kvcompress_jax.interop.vllm.verify import verify

# Of this process, for the worker to find.
GROUPS: list[Group] = []


class Group:
    """One KV cache group of vLLM."""

    def __init__(
        self, spec: AttentionSpec, layer_names: list[str], *, dtype: str, blocks: int
    ) -> None:
        """Divides the layers' memory.

        Args:
          spec: of a layer, as customised.
          layer_names: of the group.
          dtype: of the model.
          blocks: of vLLM's pool.

        Raises:
          ConfigError: the memory is too small.
        """
        self.config = settings.read_config(spec.block_size)
        self.carve = divide(spec, dtype=dtype, blocks=blocks)
        self.layers = len(layer_names)
        self.states = BlockStates(self.carve, self.config, self.layers)
        self.executor = AllLayers()
        self.offload: OffloadWorker | None = None
        # A new engine in the same process takes the place of the one before.
        GROUPS[:] = [self]

    def plan(self, starts: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> Step:
        """See `BlockStates.plan`."""
        step = self.states.plan(starts, lengths, tables, self.executor)
        metrics.publish(self.stats)
        return step

    def memory(self, name: str, kv_cache: torch.Tensor) -> LayerMemory:
        """A layer's pools in its memory, made at the first call and when vLLM moved it."""
        memory = self.executor.memories.get(name)
        if memory is None or memory.address != kv_cache.data_ptr():
            memory = LayerMemory(kv_cache, self.carve, self.config)
            self.executor.memories[name] = memory
        return memory

    def stats(self) -> VllmCompressionStats:
        """The figures of the moment."""
        damaged = max((m.damaged for m in self.executor.memories.values()), default=0)
        moved = (self.offload.stored, self.offload.loaded) if self.offload else (0, 0)
        return compression_stats(self.states, damaged=damaged, moved=moved)

    def verify(self) -> None:
        """Raises AssertionError for whatever does not add up."""
        verify(self.states)
        for name, memory in self.executor.memories.items():
            end = 0
            for region in self.carve.regions:
                pool = memory.pools[region.name]
                start = pool.data_ptr() - memory.address if pool.numel() else region.offset_bytes
                if start < end or start + pool.nbytes > self.carve.buffer_bytes:
                    raise AssertionError(f"{name}: {region.name} is not inside its memory")
                end = start + pool.nbytes


def divide(spec: AttentionSpec, *, dtype: str, blocks: int) -> Carve:
    """The division of a layer's memory; the same in every process that knows the spec."""
    config = settings.read_config(spec.block_size)
    layout = layer_layout(config, heads=spec.num_kv_heads, dim=spec.head_size, dtype=dtype)
    return carve(
        config,
        layout,
        blocks=blocks,
        content=spec.state_content_size_bytes,
        fine_share=settings.fine_share(),
    )
