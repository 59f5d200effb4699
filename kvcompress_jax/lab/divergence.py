"""How far one model's next-token distributions are from another's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Per token of a continuation; natural logarithms.

    Attributes:
      kl: f64[n], Kullback-Leibler divergence of the compressed model from the reference.
      delta_nll: f64[n], negative log likelihood of the true token, compressed minus reference.
      agree: bool[n], whether both have the same most likely token.
    """

    kl: np.ndarray
    delta_nll: np.ndarray
    agree: np.ndarray


def divergence(reference: jax.Array, compressed: jax.Array, targets: np.ndarray) -> Divergence:
    """Compares logits.

    Args:
      reference: f32[n, vocab], logits of the uncompressed model.
      compressed: f32[n, vocab].
      targets: i32[n], the true next tokens.
    """
    kl, delta, agree = jax.device_get(_compare(reference, compressed, jnp.asarray(targets)))
    return Divergence(kl=kl.astype(np.float64), delta_nll=delta.astype(np.float64), agree=agree)


@jax.jit
def _compare(
    reference: jax.Array, compressed: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (reference, compressed))
    # p * (log p - log q) cancels badly where p is near q; with d = log q - log p the divergence is
    # the mean of e^d - 1 - d under p, every term of which is positive.
    d = q - p
    kl = jnp.sum(jnp.exp(p) * (jnp.expm1(d) - d), axis=-1)
    nll = jnp.take_along_axis(p - q, targets[:, None], axis=-1)[:, 0]
    return kl, nll, jnp.argmax(reference, -1) == jnp.argmax(compressed, -1)
