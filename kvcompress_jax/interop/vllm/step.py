"""What one step does, as index arrays: made once by `blocks`, carried out by every layer."""

import dataclasses

import numpy as np

from kvcompress_jax.paged import PageTable

NONE = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seals:
    """Raw pages to code, all of equal length n."""

    raw: np.ndarray  # i64[n] raw page
    block: np.ndarray  # i64[n]
    chunk: np.ndarray  # i64[n], NONE: level 2; in floor layers it is the block
    sink: np.ndarray  # i64[n] slot of the exact first tokens, NONE: there are none
    first: np.ndarray  # i32[n] position of the page's first token

    def __len__(self) -> int:
        return len(self.raw)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawUse:
    """Raw pages that queries saw, once for each row that did: where their statistics go."""

    row: np.ndarray  # i64[n] of the table
    column: np.ndarray  # i64[n] of the table
    page: np.ndarray  # i64[n] raw page
    seen: np.ndarray  # f32[n, page_size] queries that could see each token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """All sequences that add one token: it is written first and attended to with the others."""

    tokens: np.ndarray  # i64[rows] of the batch
    page: np.ndarray  # i64[rows] raw page of the new token
    offset: np.ndarray  # i64[rows] its place there
    begun: np.ndarray  # i64[n] raw pages that begin, whose statistics are somebody else's
    table: PageTable  # rows padded to a power of two
    query_lengths: np.ndarray  # i32[padded rows]
    use: RawUse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """One sequence that adds several tokens. They are attended to in a workspace of whole pages:
    first the sequence's raw pages, then the chunk. A page that is sealed at once never is a raw
    page."""

    first: int  # token of the batch
    count: int  # new tokens
    length: int  # of the sequence, the new ones included
    start: int  # token of the workspace that the first new one is
    index: np.ndarray  # i32[pages] place of each workspace page in the sequence
    old: np.ndarray  # i64[n] raw pages, copied to workspace pages 0 to n - 1
    raw: np.ndarray  # i64[pages] raw page of each workspace page, NONE: it is sealed at once
    changed: np.ndarray  # i64[n] workspace pages to copy to their raw pages
    begun: np.ndarray  # i64[n] raw pages that begin
    seen: np.ndarray  # f32[pages, page_size] queries that could see each token
    table: PageTable  # one row; without its raw part, which is the workspace
    seals: Seals  # `raw` is a workspace page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One forward pass."""

    fine_of: np.ndarray  # i32[1, blocks]
    floor_fine_of: np.ndarray | None  # i32[1, blocks] in floor layers; None: there are none
    first: np.ndarray  # i32[blocks] position of a block's first token
    decode: Decode | None
    prefills: tuple[Prefill, ...]
    seals: Seals  # after attention, of raw pages
    tokens: int  # of the batch; those of no row get zeros
    heat: list[tuple[np.ndarray, np.ndarray]]  # (blocks, attention that they got), by the layers
