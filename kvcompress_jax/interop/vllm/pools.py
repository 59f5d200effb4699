"""The pools in one layer's memory: their codes, and pages to the host and back.

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
from kvcompress_jax.interop.dlpack import DTYPES, fence, to_jax, write_back
from kvcompress_jax.interop.vllm.carve import Carve, sealed_pools
from kvcompress_jax.interop.vllm.compute import code_pages, read_block
from kvcompress_jax.interop.vllm.step import NONE, Seals
from kvcompress_jax.interop.vllm.tables import NO_TABLES, CodeTables
from kvcompress_jax.paged import PagedCache, PoolSizes, init_cache

_TORCH_DTYPES = {jax_dtype: torch_dtype for torch_dtype, jax_dtype in DTYPES.items()}


class LayerPools:
    """The pools of one layer, as torch sees them and as JAX does.

    Attributes:
      pools: torch views into vLLM's memory, by the names of `carve.POOLS`.
      tracks_attention: whether pages are refined here by the attention that their tokens got.
      damaged: sealed pages that held a value that was not finite, so far.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        carve: Carve,
        config: CompressionConfig,
        tables: CodeTables = NO_TABLES,
    ) -> None:
        """Makes the views and aliases.

        Args:
          memory: vLLM's memory of this layer, contiguous; of any type and shape.
          carve: how it is divided.
          config: of the compression.
          tables: of this layer.

        Raises:
          ValueError: the memory has another size than was divided, or the tables are not those
            that the layout needs.
          BridgeError: JAX cannot alias it.
        """
        flat = memory.view(-1).view(torch.uint8)
        if flat.numel() != carve.buffer_bytes:
            raise ValueError(f"memory: expected {carve.buffer_bytes} bytes, got {flat.numel()}")
        self.carve, self.tables = carve, tables
        self.address, self.device = memory.data_ptr(), memory.device
        self.pools: dict[str, torch.Tensor] = {}
        for region in carve.regions:
            part = flat[region.offset_bytes : region.offset_bytes + region.nbytes]
            self.pools[region.name] = part.view(_TORCH_DTYPES[region.dtype]).view(region.shape)
        refined = carve.sizes.fine_chunks > 0 or carve.layout.rows is not None
        self.tracks_attention = config.tracks_attention and refined
        self.damaged = 0

        def alias(name: str) -> jax.Array:  # with the axis of layers, of one
            return to_jax(self.pools[name][None], name)

        least = PoolSizes(raw_pages=1, sealed_pages=0, fine_chunks=0, sink_slots=0)
        empty = init_cache(carve.layout, least, tables.code)
        self.cache: PagedCache = dataclasses.replace(
            empty,
            raw=alias("raw"),
            mass=empty.mass[:, :0],  # attention reads no statistics
            seen=empty.seen[:, :0],
            base=alias("base"),
            key_scale=Scale(step=alias("key_step"), zero=alias("key_zero")),
            value_scale=Scale(step=alias("value_step"), zero=alias("value_zero")),
            order=alias("order"),
            refined=alias("refined"),
            fine=to_jax(self.pools["fine"], "fine"),
            sinks=alias("sinks"),
        )

    def cache_of(self, fine_of: np.ndarray, first: np.ndarray) -> PagedCache:
        """The pools, with what the host knows of them.

        Args:
          fine_of: i32[1, blocks], the chunk of each block, or NONE.
          first: i32[blocks], position of each block's first token.
        """
        placed = self.cache.first if self.carve.layout.rows is None else jnp.asarray(first)
        return dataclasses.replace(self.cache, fine_of=jnp.asarray(fine_of), first=placed)

    def fine_chunks(self, blocks: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """Where the fine planes of blocks are, whose chunks are these unless the layer is a floor
        layer."""
        return blocks if self.carve.floor else chunks

    # -- sealing -----------------------------------------------------------------------------

    def seal(self, seals: Seals) -> None:
        """Codes raw pages."""
        source = self.index(seals.raw)
        mass = seen = None
        if self.tracks_attention:
            mass, seen = self.pools["mass"][source], self.pools["seen"][source]
        self.seal_pages(self.pools["raw"][source], mass, seen, seals)

    def seal_pages(
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
        take = self.index(rows)
        if mass is not None and seen is not None:
            mass, seen = mass[take], seen[take]
        exact = seals.sink[rows] != NONE
        code, damaged = self._code(kv[take], mass, seen, first=seals.first[rows], exact=exact)
        block = self.index(seals.block[rows])
        chunk = self.index(self.fine_chunks(seals.block, seals.chunk)[rows])
        for name in sealed_pools(layout):
            write_back(self.pools[name], code[name], name, rows=block)
        if self.carve.sizes.fine_chunks:
            write_back(self.pools["fine"], code["fine"], "fine", rows=chunk)
        begin = np.flatnonzero(seals.sink != NONE)
        if len(begin):
            tokens = kv[self.index(begin)][:, :, :, : layout.sink_tokens]
            self.pools["sinks"][self.index(seals.sink[begin])] = tokens
        self.damaged += int(damaged[:count].sum())

    def _code(
        self,
        kv: torch.Tensor,
        mass: torch.Tensor | None,
        seen: torch.Tensor | None,
        *,
        first: np.ndarray,
        exact: np.ndarray,
    ) -> tuple[dict[str, jax.Array], np.ndarray]:
        """The codes of pages, by the names of the pools, and which pages are damaged."""
        layout = self.carve.layout
        if mass is None or seen is None:
            mass = torch.zeros(len(kv), layout.kv_heads, layout.page_size, device=self.device)
            seen = torch.zeros(len(kv), layout.page_size, device=self.device)
        kv, mass, seen = kv.contiguous(), mass.contiguous(), seen.contiguous()
        fence(self.device)
        code, damaged = code_pages(
            to_jax(kv, "pages"),
            to_jax(mass, "mass"),
            to_jax(seen, "seen"),
            first,
            exact,
            self.tables,
            layout=layout,
            fine_rows=layout.fine_rows if self.carve.sizes.fine_chunks else 0,
        )
        return code, np.asarray(damaged)

    # -- pages to the host and back ----------------------------------------------------------

    def code(self, raw: int, *, first: int, exact: bool) -> dict[str, np.ndarray]:
        """The code of a raw page, which stays as it is.

        Args:
          raw: the page.
          first: position of its first token.
          exact: whether its first tokens are kept exactly elsewhere.
        """
        source = slice(raw, raw + 1)
        mass = seen = None
        if self.tracks_attention:
            mass, seen = self.pools["mass"][source], self.pools["seen"][source]
        arrays, _ = self._code(
            self.pools["raw"][source],
            mass,
            seen,
            first=np.asarray([first], np.int32),
            exact=np.asarray([exact]),
        )
        names = sealed_pools(self.carve.layout)
        names += ("fine",) if self.carve.sizes.fine_chunks else ()
        return {name: np.asarray(arrays[name])[0] for name in names}

    def take(self, name: str, i: int) -> np.ndarray:
        """A copy of one entry of a pool."""
        entry = self.pools[name][i].cpu().contiguous()
        regions = {region.name: region for region in self.carve.regions}
        array = entry.view(-1).view(torch.uint8).numpy().copy()
        return array.view(regions[name].dtype).reshape(entry.shape)

    def put(self, name: str, i: int, array: np.ndarray) -> None:
        """The reverse of `take`."""
        pool = self.pools[name]
        data = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
        pool[i] = data.view(pool.dtype).view(pool.shape[1:]).to(self.device)

    def code_sinks(self, block: int, chunk: int, exact: np.ndarray) -> None:
        """Codes a sealed first page again, with its exact first tokens among the others."""
        at, chunks = np.asarray([block]), np.asarray([chunk])
        fine_of = np.full((1, self.carve.blocks), NONE, np.int32)
        fine_of[0, block] = self.fine_chunks(at, chunks)[0]
        fence(self.device)
        # It is the first page of its sequence.
        positions = np.zeros(self.carve.blocks, np.int32)
        cache = self.cache_of(fine_of, positions)
        kv = np.array(read_block(cache, np.asarray([block], np.int32)))  # [1, 2, heads, size, dim]
        kv[0, :, :, : exact.shape[2]] = exact.astype(np.float32)
        seals = Seals(
            raw=np.zeros(1, np.int64),
            block=at,
            chunk=chunks,
            sink=np.asarray([NONE]),
            first=np.zeros(1, np.int32),
        )
        values = torch.from_numpy(kv).to(self.pools["raw"].dtype).to(self.device)
        self.seal_pages(values, None, None, seals)

    def reset_statistics(self, pages: np.ndarray) -> None:
        if self.tracks_attention and len(pages):
            at = self.index(pages)
            self.pools["mass"][at] = 0
            self.pools["seen"][at] = 0

    def index(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self.device)
