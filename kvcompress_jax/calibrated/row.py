"""What a token's row of bytes looks like at level 3.

    row      [key bits | value bits | key scale | value step | value zero]
    refined  [token | step | codes] of a key, then the same of a value

Key bits are codes of different widths, one per component of the calibrated basis, in a row without
gaps; value bits are codes of one width. Some tokens of each page and head, those that gain
most, have 8 bits per component in a refined row besides, of what their own row leaves over.
"""

import dataclasses
import math

SCALE_BYTES = 3  # key scale, value step, value zero: one byte each
REFINED_EXTRA_BYTES = 3  # the token's place in its page, and a bfloat16 step


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Sizes of a row. Hashable: part of a static argument of jit.

    Attributes:
      key_bytes: of a key's codes, per token and head.
      value_bits: of every component of a value; 2 to 8.
      refine_every: one token of so many has a refined row, and at least one of a page.
    """

    key_bytes: int
    value_bits: int
    refine_every: int = 64

    def __post_init__(self) -> None:
        if self.key_bytes < 1:
            raise ValueError(f"key_bytes: expected at least 1, got {self.key_bytes}")
        if not 2 <= self.value_bits <= 8:
            raise ValueError(f"value_bits: expected 2 to 8, got {self.value_bits}")
        if self.refine_every < 1:
            raise ValueError(f"refine_every: expected at least 1, got {self.refine_every}")

    def value_bytes(self, head_dim: int) -> int:
        """Of a value's codes, per token and head."""
        return math.ceil(head_dim * self.value_bits / 8)

    def row_bytes(self, head_dim: int) -> int:
        """Of one token and head."""
        return self.key_bytes + self.value_bytes(head_dim) + SCALE_BYTES

    def refined_tokens(self, page_size: int) -> int:
        """Refined keys, and as many refined values, of a page and head."""
        return max(1, page_size // self.refine_every)

    def refined_bytes(self, head_dim: int) -> int:
        """Of one refined key or value."""
        return head_dim + REFINED_EXTRA_BYTES

    def bits_per_value(self, *, head_dim: int, page_size: int) -> float:
        """Stored bits per key or value, without what the page itself needs."""
        refined = 2 * self.refined_tokens(page_size) * self.refined_bytes(head_dim)
        return 8 * (self.row_bytes(head_dim) + refined / page_size) / (2 * head_dim)
