"""The check that the states of the blocks add up."""

import numpy as np

from kvcompress_jax.interop.vllm.blocks import BlockStates
from kvcompress_jax.interop.vllm.step import NONE


def verify(states: BlockStates) -> None:
    """Raises AssertionError with a line for everything that does not add up."""
    wrong = []
    raw = [*states.raw_of[states.raw_of != NONE].tolist(), *states.leaving.values()]
    for pool, ids in (
        (states.raw, raw),
        (states.chunks, states.chunk_of[states.chunk_of != NONE].tolist()),
        (states.sinks, states.sink_of[states.sink_of != NONE].tolist()),
    ):
        if len(set(ids)) != len(ids):
            wrong.append(f"{pool.name}: expected each id once, got {sorted(ids)}")
        if len(ids) != pool.used or not all(pool.is_used(i) for i in ids):
            wrong.append(f"{pool.name}: expected {pool.used} in use, got {len(ids)}")
    both = np.flatnonzero(states.sealed & (states.raw_of != NONE))
    if len(both):
        wrong.append(f"blocks: expected raw or sealed, got both for {both.tolist()}")
    orphans = np.flatnonzero(
        ~states.sealed & ((states.chunk_of != NONE) | (states.sink_of != NONE))
    )
    if len(orphans):
        wrong.append(f"blocks: expected chunks of sealed ones alone, got {orphans.tolist()}")
    stale = [b for b in states.kept if not states.sealed[b] or states.chunk_of[b] != NONE]
    if stale:
        wrong.append(f"kept fine planes: expected those of level 2 alone, got {stale}")
    if states.kept_bytes != len(states.kept) * states.chunk_bytes:
        wrong.append(f"kept bytes: expected {len(states.kept)} planes, got {states.kept_bytes}")
    if wrong:
        raise AssertionError("\n".join(wrong))
