"""What every contender does, on which tensors."""

import dataclasses
from typing import Any, Protocol

import numpy as np


class NotAvailableError(Exception):
    """A contender that cannot run here; the message is the reason that the report prints."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one workload: all layers are compressed, opened and attended to in one go."""

    layers: int = 4
    batch: int = 1
    kv_heads: int = 8
    heads: int = 32
    head_dim: int = 128
    tokens: int = 1024

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1 or self.heads % self.kv_heads or self.tokens % 128:
            raise ValueError(
                "shape: expected sizes of at least 1, heads a multiple of kv_heads and tokens of"
                f" 128, got {self}"
            )

    @property
    def values(self) -> int:
        """Numbers in all keys and values."""
        return 2 * self.layers * self.batch * self.kv_heads * self.tokens * self.head_dim

    @property
    def thousands(self) -> float:
        """Tokens of all sequences, in units of 1,024."""
        return self.batch * self.tokens / 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Random tensors of a shape; every contender rounds the same numbers to bfloat16.

    keys, values: f32[layers, batch, kv_heads, tokens, head_dim]; queries: f32[layers, batch,
    heads, head_dim]. All are exact in bfloat16.
    """

    shape: Shape
    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray

    @classmethod
    def random(cls, shape: Shape, seed: int = 0) -> "Workload":
        """Normal numbers; keys have a few channels of four times the size, as real ones have."""
        rng = np.random.default_rng(seed)
        kv = (shape.layers, shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
        keys, values = (rng.standard_normal(kv, np.float32) for _ in range(2))
        keys[..., :: shape.head_dim // 4] *= 4
        queries = rng.standard_normal((*kv[:2], shape.heads, shape.head_dim), np.float32)
        return cls(
            shape=shape,
            keys=_bfloat16(keys),
            values=_bfloat16(values),
            queries=_bfloat16(queries),
        )


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest f32 that bfloat16 can hold, toward zero."""
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


class Contender(Protocol):
    """One implementation at one number of bits. Methods return when their work is done."""

    name: str
    bits: int

    def load(self, work: Workload) -> None:
        """Puts the workload where the implementation wants it. Not timed.

        Raises:
          NotAvailableError: it cannot be run; says why.
        """

    def compress(self) -> Any:
        """Compresses keys and values of all layers and returns the code."""

    def decompress(self, code: Any) -> Any:
        """All keys and values in bfloat16 (or what the implementation gives)."""

    def attend(self, code: Any) -> Any:
        """One query per sequence and head attends to all tokens, in every layer."""

    def opened(self, result: Any) -> tuple[np.ndarray, np.ndarray]:
        """Result of `decompress` as keys and values shaped like the workload's, f32."""

    def attended(self, result: Any) -> np.ndarray:
        """Result of `attend` as f32[layers, batch, heads, head_dim]."""

    def code_bytes(self, code: Any) -> int:
        """Bytes that the code takes."""
