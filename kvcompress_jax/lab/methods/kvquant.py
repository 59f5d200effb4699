"""KVQuant: keys before RoPE, per channel, with outliers kept apart."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcompress_jax.lab.methods.affine import round_affine
from kvcompress_jax.lab.methods.base import POSITION_BITS, SCALE_BITS, Compressed, Context, assemble

OUTLIER_BITS = 16 + 16  # a value, and its index within the vector that it is taken from

BINS = 1024  # of the histogram that levels are fitted to
ROUNDS = 30  # of Lloyd's algorithm


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVQuant:
    """Keys before RoPE per channel over the whole context, values per token; the largest and
    smallest values of each vector are stored as they are (Hooper et al., "KVQuant: Towards 10
    Million Context Length LLM Inference with KV Cache Quantization", 2024, arXiv:2401.18079).

    The paper takes the keys' scales and its non-uniform levels from calibration data, the levels
    weighted by Fisher information; here both come from the context itself, unweighted, and are
    counted. The levels are common to a layer's keys, or values, whose ranges are mapped to [0, 1].

    Attributes:
      bits: of a code, 2 to 8.
      outlier_share: of the values of each vector that stay float16, half at each end; 0.01 in the
        paper.
      non_uniform: levels that fit the layer's values (Lloyd's algorithm) instead of equidistant
        ones.
    """

    bits: int
    outlier_share: float = 0.01
    non_uniform: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: expected 2 to 8, got {self.bits}")
        if not 0 <= self.outlier_share < 0.5:
            raise ValueError(f"outlier_share: expected 0 to below 0.5, got {self.outlier_share}")

    def __call__(self, context: Context, /) -> Compressed:
        coded = jnp.asarray(~context.exact)
        angles = context.positions.astype(jnp.float32)[..., None]
        angles = angles * jnp.asarray(context.rope_frequencies)[:, None, None, :]
        plain = _turn(context.k, -angles)
        # A vector of keys is a channel of a head over all tokens, one of values a token of a head.
        keys = self._round(plain, axis=1, where=coded[None, :, None, None])
        values = self._round(context.v, axis=3, where=jnp.ones((), bool))
        stored = self._vector_bits(context.coded_tokens) * context.dim
        stored += self._vector_bits(context.dim) * context.coded_tokens
        if context.gathered:  # each head must know where its tokens stood, to turn them again
            stored += context.coded_tokens * POSITION_BITS
        stored *= context.heads_in_all_layers
        if self.non_uniform:
            stored += 2 * context.k.shape[0] * 2**self.bits * SCALE_BITS
        return assemble(context, _turn(keys, angles), values, coded_bits=stored)

    def _outliers(self, length: int) -> int:
        """At each end of a vector; none where a vector is too short to have any."""
        return round(self.outlier_share * length / 2)

    def _vector_bits(self, length: int) -> int:
        return length * self.bits + 2 * self._outliers(length) * OUTLIER_BITS + 2 * SCALE_BITS

    def _round(self, x: jax.Array, *, axis: int, where: jax.Array) -> jax.Array:
        where = jnp.broadcast_to(where, x.shape)
        count = self._outliers(int(x.shape[axis]))
        inner = where
        if count:
            low = jnp.sort(jnp.where(where, x, jnp.inf), axis=axis)
            high = jnp.sort(jnp.where(where, x, -jnp.inf), axis=axis)
            low = jax.lax.slice_in_dim(low, count, count + 1, axis=axis)
            size = x.shape[axis]
            high = jax.lax.slice_in_dim(high, size - count - 1, size - count, axis=axis)
            inner = where & (x >= low) & (x <= high)
        if self.non_uniform:
            rounded = self._round_non_uniform(x, axis=axis, where=inner)
        else:
            rounded = round_affine(x, bits=self.bits, axis=axis, where=inner)
        # The outliers, float16.
        return jnp.where(inner, rounded, x.astype(jnp.float16).astype(jnp.float32))

    def _round_non_uniform(self, x: jax.Array, *, axis: int, where: jax.Array) -> jax.Array:
        lo = jnp.min(x, axis=axis, keepdims=True, where=where, initial=jnp.inf)
        hi = jnp.max(x, axis=axis, keepdims=True, where=where, initial=-jnp.inf)
        lo, hi = (jnp.where(lo > hi, 0.0, y) for y in (lo, hi))
        lo, extent = (y.astype(jnp.float16).astype(jnp.float32) for y in (lo, hi - lo))
        unit = jnp.clip((x - lo) / jnp.where(extent > 0, extent, 1.0), 0.0, 1.0)
        levels = jax.lax.map(
            lambda layer: fit_levels(*layer, count=2**self.bits),
            (unit.reshape(x.shape[0], -1), where.reshape(x.shape[0], -1)),
        )
        levels = levels.astype(jnp.float16).astype(jnp.float32)
        return jax.vmap(_nearest)(unit, levels) * extent + lo


def fit_levels(x: jax.Array, where: jax.Array, *, count: int) -> jax.Array:
    """Levels of least squared error by Lloyd's algorithm, on a histogram.

    Args:
      x: f32[n] in [0, 1].
      where: bool[n], values that count.
      count: of levels.

    Returns:
      f32[count], rising.
    """
    bins = jnp.clip((x * BINS).astype(jnp.int32), 0, BINS - 1)
    mass = jnp.zeros(BINS, jnp.float32).at[bins].add(where.astype(jnp.float32))
    middle = (jnp.arange(BINS, dtype=jnp.float32) + 0.5) / BINS

    def step(_: int, levels: jax.Array) -> jax.Array:
        cell = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, middle)
        weight = jnp.zeros(count, jnp.float32).at[cell].add(mass)
        total = jnp.zeros(count, jnp.float32).at[cell].add(mass * middle)
        return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), levels)

    return jax.lax.fori_loop(0, ROUNDS, step, jnp.linspace(0.0, 1.0, count, dtype=jnp.float32))


def _nearest(x: jax.Array, levels: jax.Array) -> jax.Array:
    return levels[jnp.searchsorted((levels[1:] + levels[:-1]) / 2, x)]


def _turn(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns channels d and d + dim / 2 of f32[..., dim] by f32[..., dim / 2]."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
