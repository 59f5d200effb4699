"""Tokens that a step is making."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.models.request import Request
from kvcompress_jax.models.sampling import sample


@dataclasses.dataclass(frozen=True)
class Flight:
    """Requests that get a token, and the tokens, on the device."""

    requests: list[Request]
    tokens: jax.Array  # i32[rows], of the requests and then of nobody

    def wait(self) -> list[int]:
        """The token of each request."""
        return np.asarray(self.tokens)[: len(self.requests)].tolist()


def launch(requests: Sequence[Request], logits: jax.Array, *, rows: int) -> Flight:
    """Draws a token for each of the requests; does not wait for it.

    Args:
      requests: that get one.
      logits: f32[requests, vocab].
      rows: at least as many, so that one compiled program serves all steps.
    """
    padded = jnp.pad(logits, ((0, rows - len(requests)), (0, 0)))
    temperature, seed, index = (np.zeros(rows, d) for d in (np.float32, np.uint32, np.int32))
    for i, request in enumerate(requests):
        temperature[i], seed[i] = request.temperature, request.seed
        index[i] = len(request.generated)
    return Flight(list(requests), sample(padded, temperature, seed, index))
