"""Which of vLLM's blocks is raw, sealed, refined: the host's view of every layer's pools.

vLLM hands out blocks and says which tokens of a step go where; nothing tells an attention backend
that a block was freed. A block's content is therefore taken to end when a token is written to its
first place: then it is somebody else's, whoever it was. Until then it may be found again by vLLM's
prefix cache, at the level that it has.

All layers do the same, so that this is decided once a step, before the first layer runs. What must
happen before that (a fine plane to the host and back, a page sealed early to make room) is done
by the `Executor` at once, in all layers. The fine planes of floor layers alone are no part of it:
they are there as long as a block is sealed, and a block's level is that of the other layers.
"""

import collections
from collections.abc import Collection

import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.interop.vllm.arrays import Row, coarse, decode_of, prefill_of, seals_of
from kvcompress_jax.interop.vllm.carve import Carves
from kvcompress_jax.interop.vllm.executor import Counters, Executor
from kvcompress_jax.interop.vllm.step import NONE, Step
from kvcompress_jax.manager.free_list import FreeList

PROMOTIONS_PER_STEP = 4


class BlockStates:
    """State of all blocks of one KV cache group.

    Attributes:
      layers: of the group, as far as they are known.
      floors: how many of them are floor layers.
    """

    def __init__(
        self, carves: Carves, config: CompressionConfig, *, layers: int = 0, floors: int = 0
    ) -> None:
        self.carves, self.config = carves, config
        self.layers, self.floors = layers, floors
        self.carve = carve = carves.common
        self.page_size = carve.layout.page_size
        blocks, sizes = carve.blocks, carve.sizes
        # Chunks of floor layers.
        self._own = None if carves.floor is None else np.arange(blocks, dtype=np.int32)
        self.raw_of = np.full(blocks, NONE, np.int32)
        self.sealed = np.zeros(blocks, bool)
        self.chunk_of = np.full(blocks, NONE, np.int32)
        self.sink_of = np.full(blocks, NONE, np.int32)
        self.index = np.zeros(blocks, np.int32)  # place in its sequence
        self.filled = np.zeros(blocks, np.int32)  # tokens written
        self.used = np.zeros(blocks, np.int64)  # step of the last use
        self.heat = np.zeros(blocks, np.float64)
        self.raw = FreeList("raw pages", sizes.raw_pages)
        self.chunks = FreeList("fine chunks", sizes.fine_chunks)
        self.sinks = FreeList("sink slots", sizes.sink_slots)
        self.kept: collections.OrderedDict[int, list[np.ndarray]] = collections.OrderedDict()
        self.kept_bytes = 0
        self.counters = Counters()
        self.steps = 0
        self.leaving: dict[int, int] = {}  # raw pages of blocks that the running step seals
        self._heat: list[tuple[np.ndarray, np.ndarray]] = []

    # -- one step ----------------------------------------------------------------------------

    def plan(
        self, starts: np.ndarray, lengths: np.ndarray, tables: np.ndarray, executor: Executor
    ) -> Step:
        """Decides a step, and takes it as done.

        Args:
          starts: i[rows + 1] first token of each row in the batch.
          lengths: i[rows] tokens of each sequence, the new ones included.
          tables: i[rows, columns] blocks of each sequence.
          executor: acts on all layers.

        Raises:
          RuntimeError: there are not enough raw pages, or a block that a row goes on with is gone.
        """
        self._settle()
        self.steps += 1
        size = self.page_size
        counts = np.diff(starts)
        # Rows of padding and of warm-up runs name no block; 0 is vLLM's null block.
        live = [r for r in range(len(counts)) if counts[r] > 0 and tables[r, 0] > 0]
        rows = [
            Row(
                first=int(starts[r]),
                count=int(counts[r]),
                length=int(lengths[r]),
                blocks=tables[r, : -(-int(lengths[r]) // size)].astype(np.int64),
            )
            for r in live
        ]
        batch: set[int] = set()
        wanted: set[int] = set()  # in somebody's window, or unfinished
        for row in rows:
            self.used[row.blocks] = self.steps
            batch.update(row.blocks.tolist())
            old = max(0, row.length - self.config.window_tokens) // size
            wanted.update(row.blocks[old:].tolist())
        for row in rows:
            self._enter(row)
            if self.config.compresses and row.count > 1:
                places = range(row.begun(size), len(row.blocks))
                row.at_once = [i for i in places if int(row.blocks[i]) not in wanted]
        self._spare_raw_pages(rows)
        raw = [b for row in rows for b in row.blocks_of(row.stored(size))]
        self._make_room(len(raw), batch, executor)
        for block, page in zip(raw, self.raw.take(len(raw)), strict=True):
            self.raw_of[block] = page
        leaving: list[int] = []
        direct = [b for row in rows for b in row.blocks_of(row.at_once)]
        if self.config.compresses:
            self._promote(executor)
            leaving = [
                b
                for b in dict.fromkeys(b for row in rows for b in row.blocks.tolist())
                if self.raw_of[b] != NONE and b not in wanted
            ]
            self._give_places([*leaving, *direct], executor)
        columns = coarse(max((len(row.blocks) for row in rows), default=1), 8)
        seals = seals_of(self, [int(self.raw_of[b]) for b in leaving], leaving)
        step = Step(
            fine_of=self._fine_of(self.chunk_of),
            floor_fine_of=None if self._own is None else self._fine_of(self._own),
            first=self.first_of(slice(None)),
            decode=decode_of(self, [row for row in rows if row.count == 1], columns),
            prefills=tuple(prefill_of(self, row, columns) for row in rows if row.count > 1),
            seals=seals,
            tokens=int(starts[-1]),
            heat=[],
        )
        for row in rows:
            self.filled[row.blocks] = size
            self.filled[row.blocks[-1]] = row.length - (len(row.blocks) - 1) * size
        self._close([*leaving, *direct])
        self._heat = step.heat
        return step

    def first_of(self, blocks: list[int] | slice) -> np.ndarray:
        """i32[blocks]: position of each block's first token, as far as it has one."""
        return self.index[blocks] * np.int32(self.page_size)

    def _fine_of(self, chunks: np.ndarray) -> np.ndarray:
        return np.where(self.sealed, chunks, NONE)[None].astype(np.int32)

    def _settle(self) -> None:
        """The step before is over: what it read is free, and the heat that it gave is known."""
        self._free_leaving()
        self.heat *= self.config.heat_decay
        for blocks, mass in self._heat:
            np.add.at(self.heat, blocks, mass)
        self._heat = []

    def _enter(self, row: Row) -> None:
        """Checks what a row goes on with, and forgets what was in the blocks that it begins."""
        before, size = row.length - row.count, self.page_size
        for block in row.blocks[: before // size].tolist():
            if not self.sealed[block] and self.raw_of[block] == NONE:
                raise RuntimeError(f"block {block}: expected keys and values, got none")
        if before % size:
            tail = int(row.blocks[before // size])
            held = self.filled[tail] if self.raw_of[tail] != NONE else 0
            if held != before % size:
                raise RuntimeError(
                    f"block {tail}: expected a raw page with {before % size} tokens, got {held}"
                )
        for place in range(row.begun(size), len(row.blocks)):
            block = int(row.blocks[place])
            self._forget(block)
            self.index[block] = place

    def _forget(self, block: int) -> None:
        """Frees all that a block has."""
        self.counters.reused += int(self.sealed[block])
        for pool, ids in (
            (self.raw, self.raw_of),
            (self.chunks, self.chunk_of),
            (self.sinks, self.sink_of),
        ):
            if ids[block] != NONE:
                pool.give_back([int(ids[block])])
                ids[block] = NONE
        self._drop_kept(block)
        self.sealed[block], self.filled[block], self.heat[block] = False, 0, 0.0

    def _close(self, blocks: list[int]) -> None:
        """These blocks are sealed by the step that was planned; their raw pages are read by it."""
        for block in blocks:
            if self.raw_of[block] != NONE:
                self.leaving[block] = int(self.raw_of[block])
                self.raw_of[block] = NONE
            self.sealed[block] = True
        self.counters.seals += len(blocks)

    def _free_leaving(self) -> None:
        self.raw.give_back(list(self.leaving.values()))
        self.leaving = {}

    # -- blocks that leave the device and come back ------------------------------------------

    def raw_page(self, block: int) -> int:
        """Where a block's keys and values are as they came; NONE: nowhere. While a step that seals
        it runs, nowhere else."""
        return self.leaving.get(block, int(self.raw_of[block]))

    def adopt_raw(self, block: int, place: int) -> int:
        """Makes a block of no running sequence a full raw one; returns its raw page. Without
        compression there is one for every block."""
        self._adopt(block, place)
        self.raw_of[block] = self.raw.take()[0]
        return int(self.raw_of[block])

    def adopt_sealed(
        self,
        block: int,
        place: int,
        executor: Executor,
        *,
        fine: list[np.ndarray] | None,
        sinks: bool,
        heat: float,
    ) -> tuple[int, int]:
        """Makes a block of no running sequence a sealed one.

        Args:
          block: whatever it held is forgotten.
          place: in its sequence.
          executor: acts on all layers.
          fine: fine planes of all layers but the floor layers, kept on the host when no chunk is
            free.
          sinks: whether it has exact first tokens.
          heat: attention that it got.

        Returns:
          Its fine chunk and its sink slot, NONE where there is none.
        """
        self._adopt(block, place)
        self.sealed[block], self.heat[block] = True, heat
        if sinks:
            self._take_sink(block, executor)
        if fine is not None and self.chunks.free:
            self.chunk_of[block] = self.chunks.take()[0]
        elif fine is not None:
            if not sinks or self.sink_of[block] != NONE:  # or it is coded again, and they are stale
                self._keep(block, fine)
            self.counters.unrefined += 1
        return int(self.chunk_of[block]), int(self.sink_of[block])

    def _adopt(self, block: int, place: int) -> None:
        self._forget(block)
        self.index[block], self.filled[block] = place, self.page_size
        self.used[block] = self.steps

    # -- room --------------------------------------------------------------------------------

    def _spare_raw_pages(self, rows: list[Row]) -> None:
        """Seals full pages of chunks at once, though they are in the window, where raw pages would
        not be enough even with all full ones sealed early: a sequence then needs two of them, one
        that it fills and one that it begins."""
        if not self.config.compresses:
            return
        size = self.page_size
        full = int(np.count_nonzero((self.raw_of != NONE) & (self.filled == size)))
        short = sum(len(row.stored(size)) for row in rows) - self.raw.free - full
        for row in rows:
            for place in row.stored(size) if row.count > 1 else ():
                if short > 0 and (place + 1) * size <= row.length:
                    row.at_once.append(place)
                    self.counters.early_seals += 1
                    short -= 1

    def _make_room(self, pages: int, batch: set[int], executor: Executor) -> None:
        """Frees raw pages until so many are free: full ones are sealed early, the longest unused
        first and those of this step last; then unfinished ones go that no sequence of this step
        has."""
        short = pages - self.raw.free
        if short <= 0:
            return
        held: list[int] = np.flatnonzero(self.raw_of != NONE).tolist()
        held.sort(key=lambda b: (b in batch, self.used[b], self.index[b]))
        if self.config.compresses:
            early = [b for b in held if self.filled[b] == self.page_size][:short]
            if early:
                self._give_places(early, executor)
                executor.seal(seals_of(self, [int(self.raw_of[b]) for b in early], early))
                self._close(early)
                self._free_leaving()
                self.counters.early_seals += len(early)
        for block in held:
            if self.raw.free >= pages:
                return
            if self.raw_of[block] != NONE and block not in batch:
                self._forget(block)
                self.counters.abandoned += 1
        if self.raw.free < pages:
            raise RuntimeError(
                f"raw pages: expected {pages} free, got {self.raw.free} of {self.raw.capacity}:"
                " lower max_num_seqs or raise VLLM_KV_COMPRESSION_RAW_SHARE"
            )

    def _give_places(self, blocks: list[int], executor: Executor) -> None:
        """Fine chunks and sink slots for blocks that are about to be sealed."""
        heat = self._typical_heat()
        for block in blocks:
            self.heat[block] = heat
            if self.index[block] == 0 and self.sinks.capacity:
                self._take_sink(block, executor)
        if not self.chunks.capacity:
            return
        new = set(blocks)
        for block in blocks:
            if not self.chunks.free:
                cold = self._coldest(new)
                if cold is None:
                    self.counters.unrefined += 1
                    continue
                self._demote(cold, executor)
            self.chunk_of[block] = self.chunks.take()[0]

    def _take_sink(self, block: int, executor: Executor) -> None:
        """A slot for the exact first tokens of a block. Where none is free, the first page that is
        the longest unused loses its own, which most likely nobody will ask for again."""
        if not self.sinks.free:
            unused = self.sealed & (self.used < self.steps)
            held = np.flatnonzero(unused & (self.sink_of != NONE))
            self.counters.without_sink += 1
            if not len(held):
                return
            oldest = int(held[np.argmin(self.used[held])])
            slot = int(self.sink_of[oldest])
            executor.drop_sinks(oldest, int(self.chunk_of[oldest]), slot)
            self._drop_kept(oldest)  # it refined the code of before
            self.sinks.give_back([slot])
            self.sink_of[oldest] = NONE
        self.sink_of[block] = self.sinks.take()[0]

    def _typical_heat(self) -> float:
        return float(np.median(self.heat[self.sealed])) if self.sealed.any() else 0.0

    def _coldest(self, excluded: Collection[int] = ()) -> int | None:
        """The block at level 1 with the least attention, of those the longest unused."""
        level_1 = np.flatnonzero(self.sealed & (self.chunk_of != NONE))
        level_1 = level_1[~np.isin(level_1, list(excluded))] if excluded else level_1
        if not len(level_1):
            return None
        return int(level_1[np.lexsort((self.used[level_1], self.heat[level_1]))[0]])

    def _demote(self, block: int, executor: Executor) -> None:
        """Level 1 to 2; the fine plane is kept on the host as far as that may hold it."""
        chunk = int(self.chunk_of[block])
        if self.chunk_bytes <= self.config.host_bytes:
            self._keep(block, executor.save_fine(chunk))
        self.chunks.give_back([chunk])
        self.chunk_of[block] = NONE
        self.counters.demotions += 1

    def _promote(self, executor: Executor) -> None:
        """Level 2 to 1, for hot blocks whose fine planes are kept."""
        if not self.kept:
            return
        bar = self.config.promote_heat * self._typical_heat()
        hot = sorted((b for b in self.kept if self.heat[b] > bar), key=lambda b: -self.heat[b])
        for block in hot[:PROMOTIONS_PER_STEP]:
            if not self.chunks.free:
                cold = self._coldest()
                if cold is None or self.heat[block] <= self.config.promote_heat * self.heat[cold]:
                    self.counters.refusals += 1
                    continue
                saved = self.kept[block]  # before the colder one takes its place on the host
                self._drop_kept(block)
                self._demote(cold, executor)
            else:
                saved = self.kept[block]
                self._drop_kept(block)
            self.chunk_of[block] = self.chunks.take()[0]
            executor.load_fine(int(self.chunk_of[block]), saved)
            self.counters.promotions += 1

    def _keep(self, block: int, fine: list[np.ndarray]) -> None:
        """Keeps the fine planes of a block on the host; the oldest ones make room."""
        limit, size = self.config.host_bytes, self.chunk_bytes
        if size > limit:
            return
        while self.kept_bytes + size > limit:
            self._drop_kept(next(iter(self.kept)))
        self.kept[block] = fine
        self.kept_bytes += size

    def _drop_kept(self, block: int) -> None:
        if self.kept.pop(block, None) is not None:
            self.kept_bytes -= self.chunk_bytes

    @property
    def chunk_bytes(self) -> int:
        """A fine chunk of all layers but the floor layers."""
        return (self.layers - self.floors) * self.carve.layout.fine_chunk_bytes
