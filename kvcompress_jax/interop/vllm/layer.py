"""One layer's memory, and what a step does in it.

JAX reads vLLM's memory through aliases that are made once. It cannot write there: its arrays are
immutable. Results come back as arrays of their own, few bytes beside the pools, and torch copies
them to their places.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch

from kvcompress_jax.codec import Scale
from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.interop.dlpack import DTYPES, fence, to_jax, to_torch, write_back
from kvcompress_jax.interop.vllm.carve import Carve
from kvcompress_jax.interop.vllm.compute import attend_rows, code_pages, with_workspace
from kvcompress_jax.interop.vllm.step import NONE, Decode, Prefill, Seals, Step
from kvcompress_jax.paged import AttentionMass, PagedCache, PageTable, PoolSizes, init_cache

# Queries of a prompt's chunk that attend at once: bounds the logits in memory.
PIECE_TOKENS = 256
SMALLEST_PIECE_TOKENS = 16

_TORCH_DTYPES = {jax_dtype: torch_dtype for torch_dtype, jax_dtype in DTYPES.items()}


class LayerMemory:
    """The pools of one layer, as torch sees them and as JAX does.

    Attributes:
      pools: torch views into vLLM's memory, by the names of `carve.POOLS`.
      damaged: sealed pages that held a value that was not finite, so far.
    """

    def __init__(self, memory: torch.Tensor, carve: Carve, config: CompressionConfig) -> None:
        """Makes the views and aliases.

        Args:
          memory: vLLM's memory of this layer, contiguous; of any type and shape.
          carve: how it is divided.
          config: of the compression.

        Raises:
          ValueError: the memory has another size than was divided.
          BridgeError: JAX cannot alias it.
        """
        flat = memory.view(-1).view(torch.uint8)
        if flat.numel() != carve.buffer_bytes:
            raise ValueError(f"memory: expected {carve.buffer_bytes} bytes, got {flat.numel()}")
        self.carve, self.config = carve, config
        self.address, self.device = memory.data_ptr(), memory.device
        self.pools: dict[str, torch.Tensor] = {}
        for region in carve.regions:
            part = flat[region.offset_bytes : region.offset_bytes + region.nbytes]
            self.pools[region.name] = part.view(_TORCH_DTYPES[region.dtype]).view(region.shape)
        self.damaged = 0

        def alias(name: str) -> jax.Array:  # with the axis of layers, of one
            return to_jax(self.pools[name][None], name)

        least = PoolSizes(raw_pages=1, sealed_pages=0, fine_chunks=0, sink_slots=0)
        empty = init_cache(carve.layout, least)
        self._cache: PagedCache = dataclasses.replace(
            empty,
            raw=alias("raw"),
            mass=empty.mass[:, :0],  # attention reads no statistics
            seen=empty.seen[:, :0],
            base=alias("base"),
            key_scale=Scale(step=alias("key_step"), zero=alias("key_zero")),
            value_scale=Scale(step=alias("value_step"), zero=alias("value_zero")),
            order=alias("order"),
            fine=to_jax(self.pools["fine"], "fine"),
            sinks=alias("sinks"),
        )
        self._scale = 1.0
        self._soft_cap: float | None = None

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        step: Step,
        *,
        scale: float,
        soft_cap: float | None,
    ) -> None:
        """Stores the step's keys and values, attends, and seals what the step seals.

        Args:
          q: [tokens, query heads, dim].
          k: [tokens, heads, dim].
          v: like k.
          out: like q; written.
          step: what to do.
          scale: of the logits.
          soft_cap: of the logits, or None.
        """
        self._scale, self._soft_cap = scale, soft_cap
        cache = dataclasses.replace(self._cache, fine_of=jnp.asarray(step.fine_of))
        covered = 0
        if step.decode is not None:
            self._decode(q, k, v, out, cache, step, step.decode)
            covered += len(step.decode.tokens)
        for prefill in step.prefills:
            self._prefill(q, k, v, out, cache, step, prefill)
            covered += prefill.count
        if covered < out.shape[0] and covered < step.tokens:  # rows of padding
            kept = torch.zeros(out.shape[0], dtype=torch.bool)
            if step.decode is not None:
                kept[torch.from_numpy(step.decode.tokens)] = True
            for prefill in step.prefills:
                kept[prefill.first : prefill.first + prefill.count] = True
            out[~kept.to(out.device)] = 0
        if len(step.seals):
            self.seal(step.seals)

    # -- attention ---------------------------------------------------------------------------

    def _decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        cache: PagedCache,
        step: Step,
        decode: Decode,
    ) -> None:
        tokens, page, offset = (self._index(x) for x in (decode.tokens, decode.page, decode.offset))
        raw = self.pools["raw"]
        raw[page, 0, :, offset] = k[tokens].to(raw.dtype)
        raw[page, 1, :, offset] = v[tokens].to(raw.dtype)
        self._reset_statistics(decode.begun)
        padded = torch.zeros(
            len(decode.query_lengths), 1, *q.shape[1:], dtype=q.dtype, device=q.device
        )
        padded[: len(tokens), 0] = q[tokens]
        result, mass = self._attend(padded, cache, decode.table, decode.query_lengths)
        out[tokens] = result[: len(tokens), 0]
        if mass is None:
            return
        self._note_heat(step, decode.table, mass)
        use = decode.use
        got = to_torch(mass.raw, "mass")  # [rows, heads, columns, page_size]
        got = got.transpose(1, 2)[self._index(use.row), self._index(use.column)]
        pages = self._index(use.page)
        self.pools["mass"].index_add_(0, pages, got)
        self.pools["seen"].index_add_(0, pages, torch.from_numpy(use.seen).to(self.device))

    def _prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        cache: PagedCache,
        step: Step,
        prefill: Prefill,
    ) -> None:
        raw = self.pools["raw"]
        size = self.carve.layout.page_size
        pages = len(prefill.index)
        padded = 1 << (pages - 1).bit_length()
        work = torch.zeros((padded, *raw.shape[1:]), dtype=raw.dtype, device=self.device)
        if len(prefill.old):
            work[: len(prefill.old)] = raw[self._index(prefill.old)]
        new = slice(prefill.first, prefill.first + prefill.count)
        place = torch.arange(prefill.start, prefill.start + prefill.count, device=self.device)
        work[place // size, 0, :, place % size] = k[new].to(raw.dtype)
        work[place // size, 1, :, place % size] = v[new].to(raw.dtype)
        fence(self.device)
        cache = with_workspace(cache, to_jax(work, "workspace"))
        columns = np.arange(padded, dtype=np.int32)[None]
        index = np.zeros((1, padded), np.int32)
        index[0, :pages] = prefill.index
        total: torch.Tensor | None = None
        for first in range(0, prefill.count, PIECE_TOKENS):
            count = min(PIECE_TOKENS, prefill.count - first)
            length = prefill.length - prefill.count + first + count
            table = dataclasses.replace(
                prefill.table,
                raw=columns,
                raw_index=index,
                # Pages are in order: those that begin at or after `length` are not there yet.
                raw_count=np.asarray([np.sum(prefill.index * size < length)], np.int32),
                length=np.asarray([length], np.int32),
            )
            queries = max(SMALLEST_PIECE_TOKENS, 1 << (count - 1).bit_length())
            piece = torch.zeros(1, queries, *q.shape[1:], dtype=q.dtype, device=self.device)
            at = slice(prefill.first + first, prefill.first + first + count)
            piece[0, :count] = q[at]
            lengths = np.asarray([count], np.int32)
            result, mass = self._attend(piece, cache, table, lengths)
            out[at] = result[0, :count]
            if mass is not None:
                self._note_heat(step, table, mass)
                got = to_torch(mass.raw, "mass")[0].transpose(0, 1)[:pages]
                total = got.clone() if total is None else total + got
        if len(prefill.changed):
            raw[self._index(prefill.raw[prefill.changed])] = work[self._index(prefill.changed)]
        seen = torch.from_numpy(prefill.seen).to(self.device)
        if total is not None:
            self._reset_statistics(prefill.begun)
            stored = np.flatnonzero(prefill.raw != NONE)
            at_pages, of = self._index(prefill.raw[stored]), self._index(stored)
            self.pools["mass"].index_add_(0, at_pages, total[of])
            self.pools["seen"].index_add_(0, at_pages, seen[of])
        if len(prefill.seals):
            source = self._index(prefill.seals.raw)
            self._seal(
                work[source],
                None if total is None else total[source],
                None if total is None else seen[source],
                prefill.seals,
            )

    def _attend(
        self, q: torch.Tensor, cache: PagedCache, table: PageTable, query_lengths: np.ndarray
    ) -> tuple[torch.Tensor, AttentionMass | None]:
        fence(self.device)
        out, mass = attend_rows(
            to_jax(q, "query"),
            cache,
            table,
            query_lengths,
            scale=self._scale,
            soft_cap=self._soft_cap,
            return_mass=self.config.tracks_attention,
        )
        return to_torch(out, "output"), mass

    def _note_heat(self, step: Step, table: PageTable, mass: AttentionMass) -> None:
        if not table.sealed_count.any():
            return
        live = np.arange(table.sealed.shape[1]) < table.sealed_count[:, None]
        got = np.asarray(mass.sealed).sum(axis=1)  # [rows, columns]
        step.heat.append((table.sealed[live], got[live].astype(np.float64)))

    # -- sealing -----------------------------------------------------------------------------

    def seal(self, seals: Seals) -> None:
        """Codes raw pages."""
        source = self._index(seals.raw)
        mass = seen = None
        if self.config.tracks_attention:
            mass, seen = self.pools["mass"][source], self.pools["seen"][source]
        self._seal(self.pools["raw"][source], mass, seen, seals)

    def _seal(
        self,
        kv: torch.Tensor,
        mass: torch.Tensor | None,
        seen: torch.Tensor | None,
        seals: Seals,
    ) -> None:
        layout, count = self.carve.layout, len(seals)
        # The first page again in the place of padding: it is written twice, and alike.
        rows = np.zeros(1 << (count - 1).bit_length(), np.int64)
        rows[:count] = np.arange(count)
        if mass is None or seen is None:
            mass = torch.zeros(count, layout.kv_heads, layout.page_size, device=self.device)
            seen = torch.zeros(count, layout.page_size, device=self.device)
        take = self._index(rows)
        kv, mass, seen = kv[take].contiguous(), mass[take].contiguous(), seen[take].contiguous()
        fence(self.device)
        code, damaged = code_pages(
            to_jax(kv, "pages"),
            to_jax(mass, "mass"),
            to_jax(seen, "seen"),
            seals.sink[rows] != NONE,
            rule=layout.importance,
            fine_rows=layout.fine_rows if self.carve.sizes.fine_chunks else 0,
            sink_tokens=layout.sink_tokens,
        )
        block, chunk = self._index(seals.block[rows]), self._index(seals.chunk[rows])
        arrays = {
            "base": code.base,
            "key_step": code.key_scale.step,
            "key_zero": code.key_scale.zero,
            "value_step": code.value_scale.step,
            "value_zero": code.value_scale.zero,
            "order": code.order,
        }
        for name, array in arrays.items():
            write_back(self.pools[name], array, name, rows=block)
        if self.carve.sizes.fine_chunks:
            write_back(self.pools["fine"], code.fine, "fine", rows=chunk)
        first = np.flatnonzero(seals.sink != NONE)
        if len(first):
            exact = kv[self._index(first)][:, :, :, : layout.sink_tokens]
            self.pools["sinks"][self._index(seals.sink[first])] = exact
        self.damaged += int(np.asarray(damaged)[:count].sum())

    def _reset_statistics(self, pages: np.ndarray) -> None:
        if self.config.tracks_attention and len(pages):
            at = self._index(pages)
            self.pools["mass"][at] = 0
            self.pools["seen"][at] = 0

    def _index(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self.device)


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
