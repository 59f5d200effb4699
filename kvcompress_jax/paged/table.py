"""Which pages each sequence of a batch attends to."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Pages of the sequences of one batch, sealed and raw ones apart.

    Attention does not care about the order of the pages, so each kind is a loop of its own
    without a branch. Entries past a row's count may hold anything; they are not read.
    A page's index is its place in the sequence: it holds the tokens at positions
    `index * page_size` and after.
    """

    sealed: jax.Array  # i32[sequences, max_sealed] page ids
    sealed_index: jax.Array  # i32[sequences, max_sealed]
    sealed_count: jax.Array  # i32[sequences]
    raw: jax.Array  # i32[sequences, max_raw] page ids
    raw_index: jax.Array  # i32[sequences, max_raw]
    raw_count: jax.Array  # i32[sequences]
    sink: jax.Array  # i32[sequences] slot of the exact first tokens, or -1
    length: jax.Array  # i32[sequences] tokens, the ones of the current step included
