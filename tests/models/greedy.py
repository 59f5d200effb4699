"""Greedy generation without a cache."""

import jax.numpy as jnp
import numpy as np

from kvcompress_jax.models.dense import dense_forward
from kvcompress_jax.models.load import Model


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """The next tokens. Every step runs the whole, padded text: what is behind changes nothing."""
    tokens = np.zeros((1, len(prompt) + count), np.int32)
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + count):
        scores = dense_forward(model.params, model.config, jnp.asarray(tokens))
        tokens[0, i] = int(scores[0, i - 1].argmax())
    return tokens[0, len(prompt) :].tolist()


def greedy_follows(model: Model, prompt: list[int], tokens: list[int]) -> bool:
    """Whether `greedy` would choose these tokens, in one pass: each best after the others."""
    text = jnp.asarray([prompt + tokens], jnp.int32)
    best = dense_forward(model.params, model.config, text)[0, len(prompt) - 1 : -1].argmax(axis=-1)
    return best.tolist() == tokens
