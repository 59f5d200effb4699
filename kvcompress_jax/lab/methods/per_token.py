"""Integers with a scale per token: what most serving systems offer."""

import dataclasses

from kvcompress_jax.lab.methods.affine import per_token_bits, round_per_token
from kvcompress_jax.lab.methods.base import Compressed, Context, assemble


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerToken:
    """Keys and values in `bits` bits with a float16 scale per token, head and group of channels
    (the kind of INT8 and INT4 cache that vLLM, TensorRT-LLM and LMDeploy have).

    Attributes:
      bits: of a code, 2 to 8.
      symmetric: without a minimum.
      group_channels: channels that share a scale; None: all of a head.
    """

    bits: int
    symmetric: bool = False
    group_channels: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: expected 2 to 8, got {self.bits}")
        if self.group_channels is not None and self.group_channels < 1:
            raise ValueError(f"group_channels: expected at least 1, got {self.group_channels}")

    def __call__(self, context: Context, /) -> Compressed:
        group = self.group_channels or context.dim
        if context.dim % group:
            raise ValueError(f"group_channels: expected a divisor of {context.dim}, got {group}")
        keys, values = (
            round_per_token(x, bits=self.bits, group_channels=group, symmetric=self.symmetric)
            for x in (context.k, context.v)
        )
        one = per_token_bits(
            context, bits=self.bits, group_channels=group, scales=1 if self.symmetric else 2
        )
        return assemble(context, keys, values, coded_bits=2 * one)
