"""From statistics to a code: basis, steps and bits of one layer's keys.

NumPy in float64, as it runs once per model and eigenvectors deserve the precision; only the search
for steps is compiled.
"""

import dataclasses
import heapq

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.calibrated.code import PER_OCTAVE

# Bits that a component can have. With 8 of them on average the largest want 12 (measured at 8.5
# bits: half the KL of at most 8).
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
# Steps that are tried, in units of the best one for normally distributed components.
NORMAL_STEP = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 7: 0.057, 8: 0.031}
NORMAL_STEP |= {width: 0.031 * 0.54 ** (width - 8) for width in range(9, WIDTHS[-1] + 1)}
FACTORS = np.geomspace(0.5, 2.5, 12)
WIDE_FACTORS = np.geomspace(0.75, 3.75, 12)  # of 6 bits and more: tails matter
SMALLEST_SHARE = 1e-4  # of the metric's largest eigenvalue: no direction is free
# Of the largest component: a direction that the samples hardly have is not one that no text has.
SMALLEST_SCALE = 2.0**-8
PASSES = 2  # which components count in a token's scale depends on the bits, and they on the scale


@dataclasses.dataclass(frozen=True)
class KeyFit:
    """The code of the keys of one head.

    Attributes:
      mean: f64[dim].
      encode: f64[dim, components].
      decode: f64[components, dim], the inverse of `encode`.
      scale: f64[components], typical size of each.
      step: f64[components], for tokens of scale 1; 0 without bits.
      widths: int[components].
    """

    mean: np.ndarray
    encode: np.ndarray
    decode: np.ndarray
    scale: np.ndarray
    step: np.ndarray
    widths: np.ndarray


def metric_basis(keys: np.ndarray, metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The principal components of keys in a metric.

    With A the square root of the metric, they are the eigenvectors U of `A Cov(k) A`; components
    `z = k A U` are uncorrelated, and their squared error is the error in the metric.

    Args:
      keys: [tokens, dim], of mean 0.
      metric: [dim, dim], positive semidefinite.

    Returns:
      encode f64[dim, components] and its inverse, the component of the largest variance first.
    """
    size, directions = np.linalg.eigh(metric.astype(np.float64))
    top = max(float(size[-1]), np.finfo(np.float64).tiny)
    size = np.maximum(size, SMALLEST_SHARE * top)
    root = (directions * np.sqrt(size)) @ directions.T
    inverse = (directions / np.sqrt(size)) @ directions.T
    covariance = keys.T.astype(np.float64) @ keys / len(keys)
    _, basis = np.linalg.eigh(root @ covariance @ root)
    basis = basis[:, ::-1]
    return root @ basis, basis.T @ inverse


def fit_keys(keys: np.ndarray, metric: np.ndarray, *, bits: int) -> KeyFit:
    """Fits the code of one head.

    Args:
      keys: f32[tokens, dim], before RoPE.
      metric: f32[dim, dim] (`kvcompress_jax.calibrated.metric`).
      bits: of a token's codes together.
    """
    mean = keys.mean(axis=0, dtype=np.float64)
    centred = keys - mean
    encode, decode = metric_basis(centred, metric)
    z = centred @ encode
    scale = np.sqrt((z**2).mean(axis=0))
    scale = np.maximum(scale, max(SMALLEST_SCALE * scale.max(), np.finfo(np.float32).tiny))
    coded = np.ones(z.shape[1], bool)
    for _ in range(PASSES):
        token = _token_scale(z[:, coded], scale[coded])
        found = _distortions(
            jnp.asarray(z / token, jnp.float32), jnp.asarray(token[:, 0] ** 2, jnp.float32)
        )
        distortion, steps = (np.asarray(x, np.float64) for x in found)
        widths = allocate(distortion, bits)
        coded = widths > 0
    at = np.searchsorted(WIDTHS, widths)
    components = np.arange(z.shape[1])
    return KeyFit(
        mean=mean,
        encode=encode,
        decode=decode,
        scale=scale,
        step=steps[at, components],
        widths=widths,
    )


def _token_scale(z: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[tokens, 1], as a byte says it."""
    relative = z / np.maximum(scale, np.finfo(np.float32).tiny)
    size = np.sqrt((relative**2).mean(axis=1, keepdims=True))
    return np.exp2(np.round(np.log2(np.maximum(size, 1e-30)) * PER_OCTAVE) / PER_OCTAVE)


def quantize(z: np.ndarray, step: np.ndarray, width: int) -> np.ndarray:
    """Mid-rise quantisation to 2 ** width levels around 0."""
    top = 2**width - 1
    code = np.clip(np.floor(z / step + (top + 1) / 2), 0, top)
    return (code - top / 2) * step


@jax.jit
def _distortions(z: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32[widths, components]: mean squared error at the best step, and that step.

    Thousands of passes over all tokens, so in float32 and compiled: which step is best does not
    need more.

    Args:
      z: f32[tokens, components], of tokens scaled to 1.
      weight: f32[tokens], the square of what they were scaled by.
    """
    tokens = z.shape[0]
    spread = jnp.sqrt(jnp.mean(z**2, axis=0))
    least = jnp.maximum(SMALLEST_SCALE * jnp.max(spread), np.finfo(np.float32).tiny)
    spread = jnp.maximum(spread, least)
    distortion, steps = [weight @ z**2 / tokens], [jnp.zeros_like(spread)]
    for width in WIDTHS[1:]:
        factors = WIDE_FACTORS if width >= 6 else FACTORS

        def error(step: jax.Array, width: int = width) -> jax.Array:
            top = 2**width - 1
            code = jnp.clip(jnp.floor(z / step[None] + (top + 1) / 2), 0, top)
            return weight @ (z - (code - top / 2) * step[None]) ** 2 / tokens

        tried = spread[None] * jnp.asarray(NORMAL_STEP[width] * factors, jnp.float32)[:, None]
        errors = jax.lax.map(error, tried)
        best = jnp.argmin(errors, axis=0)[None]
        distortion.append(jnp.take_along_axis(errors, best, axis=0)[0])
        steps.append(jnp.take_along_axis(tried, best, axis=0)[0])
    return jnp.stack(distortion), jnp.stack(steps)


def allocate(distortion: np.ndarray, bits: int) -> np.ndarray:
    """Bits per component, greedily to where a bit takes away most error.

    Args:
      distortion: [widths, components], of `WIDTHS`; need not fall with every bit.
      bits: to hand out; as many as help.

    Returns:
      int[components], of sum at most `bits`.
    """
    components = distortion.shape[1]
    at = np.zeros(components, int)

    def best(c: int, left: int) -> tuple[float, int, int] | None:
        gains = [
            ((distortion[at[c], c] - distortion[j, c]) / (WIDTHS[j] - WIDTHS[at[c]]), j)
            for j in range(at[c] + 1, len(WIDTHS))
            if WIDTHS[j] - WIDTHS[at[c]] <= left
        ]
        gain, j = max(gains, default=(0.0, 0))
        return (-gain, c, j) if gain > 0 else None

    left = bits
    heap = [entry for c in range(components) if (entry := best(c, left)) is not None]
    heapq.heapify(heap)
    while heap:
        _, c, j = heapq.heappop(heap)
        price = WIDTHS[j] - WIDTHS[at[c]]
        if price <= left:
            left -= price
            at[c] = j
        if (entry := best(c, left)) is not None:  # never one that costs more than what is left
            heapq.heappush(heap, entry)
    return np.array(WIDTHS)[at]
