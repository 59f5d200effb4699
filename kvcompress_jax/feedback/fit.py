"""From the queries of a model to the feedback of its keys' errors."""

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvcompress_jax.feedback.code import RANK, KeyFeedback, block_pairs

DISTANCE = 1024  # tokens: queries are taken to be anywhere up to so far from a key
ROUNDS = 4  # of alternating between the diagonal and the rest of the moment
LEAST_DIAGONAL = 1e-3  # of the mean: what an error costs that no direction of the model explains

_Array = NDArray[np.float64]


def fit_feedback(
    moment: np.ndarray,
    step: np.ndarray,
    frequencies: np.ndarray,
    *,
    windows: tuple[int, ...] | None = None,
) -> KeyFeedback:
    """Factors what queries see.

    Args:
      moment: [layers, heads, dim, dim]: mean of q q' over the queries of a KV head, before RoPE.
      step: [layers, heads, dim/2], more than 0: a typical step of the codes of a rotary pair.
      frequencies: [layers, dim/2], angles of RoPE per position.
      windows: of the layers' attention, 0 for none; no query is further away. None: all 0.

    Raises:
      ValueError: shapes that do not belong together, or numbers that are not finite.
    """
    layers, heads, dim, _ = moment.shape
    if step.shape != (layers, heads, dim // 2) or frequencies.shape != (layers, dim // 2):
        raise ValueError(
            f"step and frequencies: expected {[layers, heads, dim // 2]} and {[layers, dim // 2]},"
            f" got {list(step.shape)} and {list(frequencies.shape)}"
        )
    if not (np.isfinite(moment).all() and np.isfinite(step).all()):
        raise ValueError("moment and step: expected finite numbers, got others")
    reach = [min(w, DISTANCE) or DISTANCE for w in windows or (0,) * layers]
    seen = np.stack([turned_mean(moment[i], frequencies[i], reach[i]) for i in range(layers)])
    step = np.maximum(np.asarray(step, np.float64), np.finfo(np.float32).tiny)
    both = np.concatenate([step, step], axis=-1)
    in_steps = seen * both[..., :, None] * both[..., None, :]
    diagonal, low_rank = _diagonal_plus_low_rank(in_steps)
    carry = np.stack(np.split(low_rank, 2, axis=-2), axis=-3)  # [layers, heads, 2, dim/2, RANK]
    share = carry / diagonal[..., None, :, None]
    products = np.einsum("lhcdr,lhcds->lhdrs", carry, share)
    # Blocks go from the last pair to the first: a block and those after it end where it ends.
    behind = np.cumsum(products, axis=2)
    block = block_pairs(dim)
    first_of_block = np.arange(dim // 2) // block * block
    behind = behind[:, :, first_of_block + block - 1] + np.eye(RANK)
    answer = np.einsum("lhdrs,lhcds->lhcdr", np.linalg.inv(behind), share)
    per_step = step[..., None, :, None]
    return KeyFeedback(
        carry=jnp.asarray(carry / per_step, jnp.float32),
        answer=jnp.asarray(answer * per_step, jnp.float32),
        frequencies=jnp.asarray(frequencies, jnp.float32),
    )


def turned_mean(moment: np.ndarray, frequencies: np.ndarray, reach: int) -> _Array:
    """The mean of R_t moment R_t' over t = 0 .. reach - 1, R_t what RoPE does at position t.

    Args:
      moment: [heads, dim, dim], symmetric.
      frequencies: [dim/2].
      reach: in tokens.
    """
    half = len(frequencies)
    moment = np.asarray(moment, np.float64)
    aa, ab = moment[..., :half, :half], moment[..., :half, half:]
    ba, bb = moment[..., half:, :half], moment[..., half:, half:]
    # With z = a + ib, RoPE multiplies z by exp(i f t): E[z conj(z)'] and E[z z'] by known factors.
    t = np.arange(reach)
    phase = np.exp(1j * np.asarray(frequencies, np.float64)[:, None] * t)
    hermitian = (aa + bb + 1j * (ba - ab)) * (phase @ phase.conj().T / reach)
    plain = (aa - bb + 1j * (ba + ab)) * (phase @ phase.T / reach)
    total, difference = (hermitian + plain) / 2, (hermitian - plain) / 2
    upper = np.concatenate([total.real, -difference.imag], axis=-1)
    lower = np.concatenate([total.imag, difference.real], axis=-1)
    return np.concatenate([upper, lower], axis=-2)


def _diagonal_plus_low_rank(h: _Array) -> tuple[_Array, _Array]:
    """[..., dim, dim] as diag(l) + V V': l [..., dim/2], equal in both channels of a pair, and V
    [..., dim, RANK], by alternation, as in factor analysis."""
    half = h.shape[-1] // 2
    whole = np.diagonal(h, axis1=-2, axis2=-1)
    least = np.maximum(whole.mean(-1, keepdims=True) * LEAST_DIAGONAL, np.finfo(np.float32).tiny)
    v = np.zeros((*h.shape[:-1], RANK))
    for _ in range(ROUNDS):
        rest = whole - np.sum(v**2, axis=-1)
        pairs = np.maximum((rest[..., :half] + rest[..., half:]) / 2, least)
        root = np.sqrt(np.concatenate([pairs, pairs], axis=-1))
        values, vectors = np.linalg.eigh(h / root[..., :, None] / root[..., None, :])
        excess = np.sqrt(np.maximum(values[..., -RANK:] - 1, 0.0))
        v = root[..., :, None] * vectors[..., -RANK:] * excess[..., None, :]
    return pairs, v
