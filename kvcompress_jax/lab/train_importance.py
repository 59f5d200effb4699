"""Trains the learned importance on the attention of a model."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.importance import ImportanceRule
from kvcompress_jax.importance.learned import LearnedImportance, features, init_learned
from kvcompress_jax.lab.importance_data import (
    HORIZON_TOKENS,
    LAYER_AXES,
    SEQUENCE_TOKENS,
    WINDOW_TOKENS,
    Pages,
    join,
    sample_pages,
)
from kvcompress_jax.lab.texts import TextError
from kvcompress_jax.models.load import Model

HIDDEN = 8
BATCH_PAGES = 8
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
RATIOS = (0.5, 0.25)  # shares of refined tokens that are trained for
SOFTNESS = 0.3  # of the choice, in units of the logarithm of importance times error
REGRESSION = 0.1  # weight of the regression beside the choice

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Training:
    """A trained score and how it went.

    Attributes:
      learned: the weights.
      pages: that it was trained on, of every layer.
      damage_left: share of the damage that is left when half the tokens of each page are refined
        in the order of the formula with the learned score; training pages, mean over heads.
      damage_left_without: the same without the learned score.
      seconds: of training, data included.
    """

    learned: LearnedImportance
    pages: int
    damage_left: float
    damage_left_without: float
    seconds: float


def train_importance(
    model: Model,
    texts: list[list[int]],
    config: CompressionConfig,
    *,
    tokens: int = 9216,
    steps: int = 400,
    seed: int = 0,
    progress: Progress = lambda stage, share: None,
) -> Training:
    """Trains a score for a model.

    Args:
      model: whose keys, values and queries are taken.
      texts: tokens of each text.
      config: page size, exact tokens, weights and named scores that it will be used with.
      tokens: to train on, the same number of each text; the first ones are taken.
      steps: of the optimiser.
      seed: of weights, batches and sealing times.
      progress: is told what is being done.

    Raises:
      TextError: a text is too short.
    """
    start = time.perf_counter()
    random = np.random.default_rng(seed)
    sequences = _sequences(model, texts, tokens, config.page_size)
    parts = []
    for i, sequence in enumerate(sequences):
        progress("attention of the model", i / len(sequences))
        parts.append(
            sample_pages(
                model,
                sequence,
                page_size=config.page_size,
                sink_tokens=config.sink_tokens,
                random=random,
            )
        )
    pages = join(parts)
    learned = init_learned(jax.random.key(seed), *_standard(pages), hidden=HIDDEN)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    )

    @jax.jit
    def step(
        trained: tuple, state: optax.OptState, batch: Pages
    ) -> tuple[tuple, optax.OptState, jax.Array]:
        def objective(trained: tuple) -> jax.Array:
            params, gain = trained
            new = dataclasses.replace(learned, params=params, gain=gain)
            return _loss(new, batch, config.importance)

        value, slope = jax.value_and_grad(objective)(trained)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            update, state = optimiser.update(slope, state, trained)
        return optax.apply_updates(trained, update), state, value

    trained = (learned.params, learned.gain)
    state = optimiser.init(trained)
    count = pages.seen.shape[0]
    for i in range(steps):
        progress("training", i / steps)
        chosen = np.sort(random.choice(count, min(BATCH_PAGES, count), replace=False))
        trained, state, _ = step(trained, state, jax.tree.map(lambda x: x[chosen], pages))  # noqa: B023
    learned = dataclasses.replace(learned, params=trained[0], gain=trained[1])
    return Training(
        learned=learned,
        pages=count,
        damage_left=damage_left(learned, pages, config.importance),
        damage_left_without=damage_left(None, pages, config.importance),
        seconds=time.perf_counter() - start,
    )


def damage_left(
    learned: LearnedImportance | None, pages: Pages, rule: ImportanceRule, *, ratio: float = 0.5
) -> float:
    """Share of the damage of all tokens that is left when the first ones in the rule's order are
    refined; mean over layers and heads."""
    left, every = np.zeros(()), np.zeros(())
    for i in range(pages.seen.shape[0]):
        a, b = _damage(learned, jax.tree.map(lambda x: x[i : i + 1], pages), rule, ratio)  # noqa: B023
        left, every = left + np.asarray(a), every + np.asarray(b)
    return float(np.mean(left / every))


@functools.partial(jax.jit, static_argnames=("rule", "ratio"))
def _damage(
    learned: LearnedImportance | None, pages: Pages, rule: ImportanceRule, ratio: float
) -> tuple[jax.Array, jax.Array]:
    """f32[layers, heads], twice: of the tokens that are not refined, and of all."""
    order, _ = _order(learned, pages, rule)
    rank = jnp.argsort(jnp.argsort(-order, axis=2), axis=2)
    damage = _counted_damage(pages)
    left = jnp.where(rank >= round(ratio * order.shape[2]), damage, 0.0)
    return jnp.sum(left, axis=(0, 2)), jnp.sum(damage, axis=(0, 2))


def _loss(learned: LearnedImportance, pages: Pages, rule: ImportanceRule) -> jax.Array:
    """The damage that the choice of tokens leaves, the choice made soft, and beside it the squared
    error of the predicted logarithm of the damage, which generalises better. Pages count by the
    square root of their damage: between all the same and the worst ones alone."""
    order, predicted = _order(learned, pages, rule)
    damage = _counted_damage(pages)
    total = jnp.sum(damage, axis=2, keepdims=True)
    importance = jnp.sqrt(total)
    importance = importance / jnp.maximum(jnp.sum(importance, axis=0, keepdims=True), _TINY)
    logarithm = jnp.log(jnp.maximum(order, _TINY))
    value = jnp.zeros(())
    for ratio in RATIOS:
        size = round(ratio * order.shape[2])
        left = jnp.sum(damage * (1 - _chosen(logarithm, size)), axis=2, keepdims=True)
        share = left / jnp.maximum(total, _TINY)
        value = value + RATIOS[0] / ratio * jnp.mean(jnp.sum(share * importance, axis=0))
    counted = jnp.broadcast_to(pages.counted[:, None, :, None], damage.shape)
    per_error = jnp.maximum(damage, _TINY) / jnp.maximum(pages.error**2, _TINY)
    target = jnp.log(per_error) / 2
    miss = predicted - target
    miss = miss - jnp.mean(miss, axis=2, keepdims=True, where=counted)
    miss = jnp.mean(miss**2, axis=2, keepdims=True, where=counted)
    return value + REGRESSION * jnp.mean(jnp.sum(miss * importance, axis=0))


def _chosen(logarithm: jax.Array, size: int) -> jax.Array:
    """How much each token of [pages, layers, tokens, heads] is among the `size` first ones, 0 to 1.

    The threshold lies between the last one in and the first one out. Its slope is that of the mean
    of the tokens near it, so that to raise all of them together gains nothing.
    """
    ordered = jnp.sort(jax.lax.stop_gradient(logarithm), axis=2, descending=True)
    border = jnp.mean(ordered[:, :, size - 1 : size + 1], axis=2, keepdims=True)
    near = jax.nn.sigmoid((jax.lax.stop_gradient(logarithm) - border) / SOFTNESS)
    near = near * (1 - near) + 1e-6
    middle = jnp.sum(near * logarithm, axis=2, keepdims=True)
    middle = middle / jnp.sum(near, axis=2, keepdims=True)
    border = border + middle - jax.lax.stop_gradient(middle)
    return jax.nn.sigmoid((logarithm - border) / SOFTNESS)


def _order(
    learned: LearnedImportance | None, pages: Pages, rule: ImportanceRule
) -> tuple[jax.Array, jax.Array]:
    """Importance times error and the predicted logarithm, f32[pages, layers, tokens, heads]."""

    def layer(
        learned: LearnedImportance | None, page: Pages, counted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        statistics = page.statistics()
        where = jnp.broadcast_to(counted[:, None], statistics.error.shape)
        score = rule(statistics, learned=learned, where=where)
        order = jnp.where(where, score * statistics.error, 0.0)
        if learned is None:
            return order, jnp.zeros_like(order)
        return order, learned.log_damage(statistics, where)

    def page(page: Pages) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(layer, in_axes=(0, LAYER_AXES, None))(
            learned, page, jnp.asarray(page.counted)
        )

    return jax.vmap(page)(pages)


def _counted_damage(pages: Pages) -> jax.Array:
    return jnp.where(pages.counted[:, None, :, None], jnp.maximum(pages.damage, 0.0), 0.0)


def _standard(pages: Pages) -> tuple[jax.Array, jax.Array]:
    """Mean and reciprocal spread of the features, f32[layers, heads, features]."""

    @jax.jit
    def moments(page: Pages) -> tuple[jax.Array, jax.Array]:
        def layer(page: Pages, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
            where = jnp.broadcast_to(counted[:, None], page.error.shape)
            x = features(page.statistics(), where)
            x = jnp.where(where[..., None], x, 0.0)
            return jnp.sum(x, axis=0), jnp.sum(x**2, axis=0)

        return jax.vmap(layer, in_axes=(LAYER_AXES, None))(page, jnp.asarray(page.counted))

    first, second = np.zeros(()), np.zeros(())
    for i in range(pages.seen.shape[0]):
        a, b = moments(jax.tree.map(lambda x: x[i], pages))  # noqa: B023
        first, second = first + np.asarray(a, np.float64), second + np.asarray(b, np.float64)
    mean = first / pages.counted.sum()
    spread = np.sqrt(np.maximum(second / pages.counted.sum() - mean**2, 1e-8))
    return jnp.asarray(mean, jnp.float32), jnp.asarray(1 / spread, jnp.float32)


def _sequences(
    model: Model, texts: list[list[int]], tokens: int, page_size: int
) -> list[list[int]]:
    """The first `tokens` of all texts together in sequences that fit the model."""
    length = min(SEQUENCE_TOKENS, model.config.max_positions)
    least = HORIZON_TOKENS + WINDOW_TOKENS + page_size
    each = tokens // len(texts)
    found = []
    for i, text in enumerate(texts):
        if len(text) < least or length < least or each < least:
            short = min(len(text), length, each)
            raise TextError(f"text {i + 1}: expected at least {least} tokens, got {short}")
        part = text[:each]
        cut = [part[at : at + length] for at in range(0, len(part), length)]
        found += [sequence for sequence in cut if len(sequence) >= least]
    return found


_TINY = 1e-30
