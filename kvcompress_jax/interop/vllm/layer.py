"""What a step does in one layer's memory."""

import dataclasses

import numpy as np
import torch

from kvcompress_jax.interop.dlpack import fence, to_jax, to_torch
from kvcompress_jax.interop.vllm.compute import attend_rows, with_workspace
from kvcompress_jax.interop.vllm.pools import LayerPools
from kvcompress_jax.interop.vllm.step import NONE, Decode, Prefill, Step
from kvcompress_jax.paged import AttentionMass, PagedCache, PageTable

# Queries of a prompt's chunk that attend at once: bounds the logits in memory.
PIECE_TOKENS = 256
SMALLEST_PIECE_TOKENS = 16


class LayerMemory(LayerPools):
    """The pools of one layer, and attention to them."""

    _scale: float  # of the step that runs
    _soft_cap: float | None

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
        fine_of = step.fine_of
        if self.carve.floor:
            assert step.floor_fine_of is not None
            fine_of = step.floor_fine_of
        cache = self.cache_of(fine_of, step.first)
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
        tokens, page, offset = (self.index(x) for x in (decode.tokens, decode.page, decode.offset))
        raw = self.pools["raw"]
        raw[page, 0, :, offset] = k[tokens].to(raw.dtype)
        raw[page, 1, :, offset] = v[tokens].to(raw.dtype)
        self.reset_statistics(decode.begun)
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
        got = got.transpose(1, 2)[self.index(use.row), self.index(use.column)]
        pages = self.index(use.page)
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
            work[: len(prefill.old)] = raw[self.index(prefill.old)]
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
            raw[self.index(prefill.raw[prefill.changed])] = work[self.index(prefill.changed)]
        seen = torch.from_numpy(prefill.seen).to(self.device)
        if total is not None:
            self.reset_statistics(prefill.begun)
            stored = np.flatnonzero(prefill.raw != NONE)
            at_pages, of = self.index(prefill.raw[stored]), self.index(stored)
            self.pools["mass"].index_add_(0, at_pages, total[of])
            self.pools["seen"].index_add_(0, at_pages, seen[of])
        if len(prefill.seals):
            source = self.index(prefill.seals.raw)
            self.seal_pages(
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
            return_mass=self.tracks_attention,
        )
        return to_torch(out, "output"), mass

    def _note_heat(self, step: Step, table: PageTable, mass: AttentionMass) -> None:
        if not table.sealed_count.any():
            return
        live = np.arange(table.sealed.shape[1]) < table.sealed_count[:, None]
        got = np.asarray(mass.sealed).sum(axis=1)  # [rows, columns]
        step.heat.append((table.sealed[live], got[live].astype(np.float64)))
