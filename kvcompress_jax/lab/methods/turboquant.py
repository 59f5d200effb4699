"""TurboQuant: a random rotation makes every coordinate Gaussian, and one codebook serves all."""

import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.lab.methods.base import SCALE_BITS, Compressed, Context, assemble
from kvcompress_jax.transforms.hadamard import hadamard_matrix

ROTATIONS = ("hadamard", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurboQuant:
    """Norm and direction per token and head; the direction is rotated and its coordinates are
    rounded to the Lloyd-Max levels of a normal distribution (Zandieh et al., "TurboQuant: Online
    Vector Quantization with Near-optimal Distortion Rate", 2025, arXiv:2504.19874, the variant for
    squared error; Hadamard with random signs as in the packages that vLLM uses). The residual sign
    stage for inner products is left out: it made attention worse wherever it was tried.

    Attributes:
      bits: of a coordinate, 1 to 8.
      rotation: "hadamard", with random signs, or "random", of all rotations.
      centered: a float16 mean per layer, head and channel of the context is taken away first, and
        counted. Not in the paper; a common offset spoils rotations.
      seed: of the rotation.
    """

    bits: int
    rotation: str = "hadamard"
    centered: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits: expected 1 to 8, got {self.bits}")
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation: expected one of {ROTATIONS}, got {self.rotation!r}")

    def __call__(self, context: Context, /) -> Compressed:
        coded = jnp.asarray(~context.exact)[None, :, None, None]
        matrix = jnp.asarray(_rotation(self.rotation, context.dim, self.seed))
        levels = jnp.asarray(normal_levels(self.bits))
        multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

        def round_trip(x: jax.Array) -> jax.Array:
            mean = jnp.zeros((), jnp.float32)
            if self.centered:
                mean = _half(jnp.mean(x, axis=1, keepdims=True, where=coded))
            y = multiply(x - mean, matrix)
            norm = _half(jnp.linalg.norm(y, axis=-1, keepdims=True) / math.sqrt(context.dim))
            unit = y / jnp.where(norm > 0, norm, 1.0)
            edges = (levels[1:] + levels[:-1]) / 2
            rounded = levels[jnp.searchsorted(edges, unit)] * norm
            return multiply(rounded, matrix.T) + mean

        vector = self.bits * context.dim + SCALE_BITS
        means = context.dim * SCALE_BITS if self.centered else 0
        return assemble(
            context,
            round_trip(context.k),
            round_trip(context.v),
            coded_bits=2 * context.heads_in_all_layers * (context.coded_tokens * vector + means),
        )


@functools.cache
def normal_levels(bits: int) -> np.ndarray:
    """Lloyd-Max levels of the standard normal distribution (Max, 1960; Lloyd, 1982).

    Returns:
      f32[2 ** bits], rising: each level is the mean of its cell, each edge the middle of two
      levels.
    """
    count = 2**bits
    # Quantiles of a wider normal are a good start (Panter and Dite, 1951): few rounds are left.
    levels = math.sqrt(3) * _quantiles((np.arange(count) + 0.5) / count)
    for _ in range(20 * count):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        below = np.array([0.5 * math.erfc(-e / math.sqrt(2)) for e in edges])
        levels = (density[:-1] - density[1:]) / np.diff(below)
    return levels.astype(np.float32)


def _quantiles(shares: np.ndarray) -> np.ndarray:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf(float(share)) for share in shares])


@functools.cache
def _rotation(name: str, dim: int, seed: int) -> np.ndarray:
    """f32[dim, dim], orthonormal."""
    rng = np.random.default_rng(seed)
    if name == "hadamard":
        return (rng.choice([-1.0, 1.0], dim)[:, None] * hadamard_matrix(dim)).astype(np.float32)
    q, r = np.linalg.qr(rng.standard_normal((dim, dim)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


def _half(x: jax.Array) -> jax.Array:
    """Rounded to float16, as it is stored."""
    return x.astype(jnp.float16).astype(jnp.float32)
