"""KIVI: keys per channel, values per token."""

import dataclasses

from kvcompress_jax.lab.methods.affine import (
    per_channel_bits,
    per_token_bits,
    round_per_channel,
    round_per_token,
)
from kvcompress_jax.lab.methods.base import Compressed, Context, assemble


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kivi:
    """Keys per channel over groups of tokens, values per token and group of channels, both
    asymmetric (Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024,
    arXiv:2402.02750). The paper's residual is the context's exact window.

    Attributes:
      bits: of a code, 2 to 8.
      group_tokens: tokens of a group of keys; the paper has 32.
      group_channels: channels of a group of values; None: all of a head. The paper has 32.
    """

    bits: int
    group_tokens: int = 64
    group_channels: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: expected 2 to 8, got {self.bits}")
        if self.group_tokens < 1:
            raise ValueError(f"group_tokens: expected at least 1, got {self.group_tokens}")
        if self.group_channels is not None and self.group_channels < 1:
            raise ValueError(f"group_channels: expected at least 1, got {self.group_channels}")

    def __call__(self, context: Context, /) -> Compressed:
        group = self.group_channels or context.dim
        if context.dim % group:
            raise ValueError(f"group_channels: expected a divisor of {context.dim}, got {group}")
        keys = round_per_channel(
            context.k, context.exact, bits=self.bits, group_tokens=self.group_tokens
        )
        values = round_per_token(context.v, bits=self.bits, group_channels=group)
        coded_bits = per_channel_bits(context, bits=self.bits, group_tokens=self.group_tokens)
        coded_bits += per_token_bits(context, bits=self.bits, group_channels=group, scales=2)
        return assemble(context, keys, values, coded_bits=coded_bits)
