"""The specification's `compress_kv_block`, literally."""

import dataclasses

from kvcompress_jax.importance.policies.base import Policy
from kvcompress_jax.importance.policies.specification import Specification
from kvcompress_jax.lab.methods.base import Compressed, Context
from kvcompress_jax.lab.methods.evict import Evict
from kvcompress_jax.lab.methods.per_token import PerToken

LEVEL_BITS = {1: 8, 2: 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiteralSpecification:
    """Importance by its formula, the top `ratio` of the tokens in INT8 (level 1) or INT4 (level
    2), the others dropped. What `kvcompress_jax` does in its place keeps everybody
    (`Embedded`); this is here to be measured.

    Attributes:
      level: 1 or 2.
      ratio: of the tokens that stay.
    """

    level: int = 1
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.level not in LEVEL_BITS:
            raise ValueError(f"level: expected 1 or 2, got {self.level}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio: expected more than 0 and at most 1, got {self.ratio}")

    def __call__(self, context: Context, /) -> Compressed:
        policy: Policy = Specification()
        quantiser = PerToken(bits=LEVEL_BITS[self.level], symmetric=True)
        return Evict(policy=policy, keep_share=self.ratio, then=quantiser)(context)
