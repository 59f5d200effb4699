"""Which pages each sequence of a batch attends to."""

import dataclasses

import jax

from kvcompress_jax.paged.host_arrays import HostArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Pages of the sequences of one batch, sealed and raw ones apart.

    Attention does not care about the order of the pages, so each kind is a loop of its own
    without a branch. Entries past a row's count may hold anything; they are not read.
    A page's index is its place in the sequence: it holds the tokens at positions
    `index * page_size` and after.
    """

    sealed: HostArray  # i32[sequences, max_sealed] page ids
    sealed_index: HostArray  # i32[sequences, max_sealed]
    sealed_count: HostArray  # i32[sequences]
    raw: HostArray  # i32[sequences, max_raw] page ids
    raw_index: HostArray  # i32[sequences, max_raw]
    raw_count: HostArray  # i32[sequences]
    sink: HostArray  # i32[sequences] slot of the exact first tokens, or -1
    length: HostArray  # i32[sequences] tokens, the ones of the current step included
    # Whether in every layer sealed pages with a fine chunk come before those without
    # (`order_by_level`): kernels need not sort them. Attention is the same.
    by_level: bool = dataclasses.field(default=False, metadata={"static": True})
