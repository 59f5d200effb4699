"""The layers that share block ids: their states, their memory and their figures."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.kv_cache_interface import AttentionSpec

from kvcompress_jax.interop.vllm import metrics, settings
from kvcompress_jax.interop.vllm.all_layers import AllLayers
from kvcompress_jax.interop.vllm.blocks import BlockStates
from kvcompress_jax.interop.vllm.carve import Carve, Carves, carve_layers, layer_layout
from kvcompress_jax.interop.vllm.layer import LayerMemory
from kvcompress_jax.interop.vllm.model_files import Source, layer_index, outline
from kvcompress_jax.interop.vllm.offload.worker import OffloadWorker
from kvcompress_jax.interop.vllm.stats import VllmCompressionStats, compression_stats
from kvcompress_jax.interop.vllm.step import Step
from kvcompress_jax.interop.vllm.tables import NO_TABLES, CodeTables, load_tables
from kvcompress_jax.interop.vllm.verify import verify

# Of this process, for the worker to find.
GROUPS: list[Group] = []


class Group:
    """One KV cache group of vLLM."""

    def __init__(
        self, engine: object, spec: AttentionSpec, source: Source, *, dtype: str, blocks: int
    ) -> None:
        """Divides the memory of layers that are still to be added, and reads what their pages are
        coded with.

        Args:
          engine: whose group it is: any object that is the same one as long as an engine lives.
          spec: of any of its layers, as customised.
          source: of the model.
          dtype: of the model.
          blocks: of vLLM's pool.

        Raises:
          ConfigError: the memory is too small, or the configuration names a file that is not of
            this model.
        """
        self.engine, self.shape = engine, (spec.num_kv_heads, spec.head_size)
        self.config = settings.read_config(spec.block_size)
        self._source = source
        self._tables = load_tables(self.config, source.model, revision=source.revision)
        self.carves = divide(spec, dtype=dtype, blocks=blocks)
        self.carve_of: dict[str, Carve] = {}  # by the layer's name
        self.states = BlockStates(self.carves, self.config)
        self.executor = AllLayers()
        self.offload: OffloadWorker | None = None
        self._step: Step | None = None
        self._lengths: list[int] = []  # of its rows
        self._asked: set[str] = set()  # first layers of those that have had it

    def add(self, spec: AttentionSpec, layer_names: list[str]) -> None:
        """Adds layers that vLLM gave the same memory; how much tells whether they are floor layers.

        Raises:
          RuntimeError: it is the memory of neither kind.
        """
        carves = [c for c in (self.carves.common, self.carves.floor) if c is not None]
        size = self.carves.common.blocks * spec.page_size_bytes
        carve = next((c for c in carves if c.buffer_bytes == size), None)
        if carve is None:
            raise RuntimeError(
                f"{layer_names[0]}: expected a KV cache of"
                f" {' or '.join(str(c.buffer_bytes) for c in carves)} bytes, got {size}"
            )
        self.carve_of |= dict.fromkeys(layer_names, carve)
        self.states.layers += len(layer_names)
        self.states.floors += len(layer_names) if carve.floor else 0

    def plan(self, layer: str, starts: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> Step:
        """See `BlockStates.plan`. vLLM asks once for the layers of each kind of memory: the first
        time the step is planned, then it is there.

        Args:
          layer: the first of the layers that it is asked for.
          starts: see there, as the others.
          lengths: see there.
          tables: see there.

        Raises:
          RuntimeError: see there; or the other layers' step has other rows.
        """
        if self._step is None or layer in self._asked:
            self._step = self.states.plan(starts, lengths, tables, self.executor)
            self._lengths, self._asked = lengths.tolist(), set()
            metrics.publish(self.stats)
        if self._lengths != lengths.tolist():
            raise RuntimeError(
                f"{layer}: expected sequences of {self._lengths} tokens as in other layers, got"
                f" {lengths.tolist()}"
            )
        self._asked.add(layer)
        return self._step

    def memory(self, name: str, kv_cache: torch.Tensor) -> LayerMemory:
        """A layer's pools in its memory, made at the first call and when vLLM moved it."""
        memory = self.executor.memories.get(name)
        if memory is None or memory.address != kv_cache.data_ptr():
            memory = LayerMemory(kv_cache, self.carve_of[name], self.config, self._tables_of(name))
            self.executor.memories[name] = memory
        return memory

    def _tables_of(self, name: str) -> CodeTables:
        if self._tables is NO_TABLES:
            return NO_TABLES
        known = outline(self._source.model, self._source.revision).config
        heads = self._source.heads(known.num_kv_heads, self.shape[0])
        return self._tables.of(layer_index(name), heads)

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
            for region in memory.carve.regions:
                pool = memory.pools[region.name]
                start = pool.data_ptr() - memory.address if pool.numel() else region.offset_bytes
                if start < end or start + pool.nbytes > memory.carve.buffer_bytes:
                    raise AssertionError(f"{name}: {region.name} is not inside its memory")
                end = start + pool.nbytes


def group_of(
    engine: object,
    spec: AttentionSpec,
    source: Source,
    layer_names: list[str],
    *,
    dtype: str,
    blocks: int,
) -> Group:
    """The group of an engine, with these layers added. A new engine in the same process takes the
    place of the one before; so do layers that are bound anew, or of another shape.

    Args:
      engine: see `Group`, as the others.
      spec: of all these layers.
      source: see there.
      layer_names: that were not added yet.
      dtype: see there.
      blocks: see there.

    Raises:
      ConfigError: see there.
    """
    for group in GROUPS:
        same = group.engine is engine and group.shape == (spec.num_kv_heads, spec.head_size)
        if same and layer_names[0] not in group.carve_of:
            break
    else:
        group = Group(engine, spec, source, dtype=dtype, blocks=blocks)
        GROUPS[:] = [group]
    group.add(spec, layer_names)
    return group


def divide(spec: AttentionSpec, *, dtype: str, blocks: int) -> Carves:
    """The division of the layers' memory; the same in every process that knows one of the specs."""
    config = settings.read_config(spec.block_size)
    layout = layer_layout(config, heads=spec.num_kv_heads, dim=spec.head_size, dtype=dtype)
    return carve_layers(
        config,
        layout,
        blocks=blocks,
        raw_share=settings.raw_share(),
        fine_share=settings.fine_share(config),
    )
