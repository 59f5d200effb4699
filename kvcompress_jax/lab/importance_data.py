"""What a learned importance is trained on: pages as they look when they are sealed, and the damage
that the 4-bit code of each of their tokens does to the queries that come later."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvcompress_jax.codec import decode, encode, fit_scale
from kvcompress_jax.importance import TokenStatistics, token_error
from kvcompress_jax.models.dense import capture_forward
from kvcompress_jax.models.load import Model

HORIZON_TOKENS = 256  # queries after sealing whose damage is predicted
SEQUENCE_TOKENS = 1536
WINDOW_TOKENS = 64  # a page is sealed when it is at least so many tokens old

_einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Pages of all layers; float16 where half the memory is worth more than the last digits."""

    keys: np.ndarray  # f16[pages, layers, page_size, heads, dim]
    values: np.ndarray  # like keys
    mass: np.ndarray  # f32[pages, layers, page_size, heads]
    seen: np.ndarray  # f32[pages, page_size]
    error: np.ndarray  # f32[pages, layers, page_size, heads]
    damage: np.ndarray  # like error: mean over later queries of the squared output error
    counted: np.ndarray  # bool[pages, page_size]: not kept exactly

    def statistics(self) -> TokenStatistics:
        """Of one page and layer, under `jax.vmap`."""
        keys, values = (jnp.asarray(x).astype(jnp.float32) for x in (self.keys, self.values))
        return TokenStatistics(
            keys=keys,
            values=values,
            mass=jnp.asarray(self.mass),
            seen=jnp.asarray(self.seen),
            error=jnp.asarray(self.error),
        )


# Which axes of a page of all layers are layers, for `jax.vmap`.
LAYER_AXES = Pages(keys=0, values=0, mass=0, seen=None, error=0, damage=0, counted=None)  # type: ignore[arg-type]


def sample_pages(
    model: Model,
    tokens: list[int],
    *,
    page_size: int,
    sink_tokens: int,
    random: np.random.Generator,
) -> Pages:
    """All pages of a text that have a future in it, sealed once each.

    Half of the pages are sealed as they leave a window, as in generation, half at a random time
    after that, as when a long prompt is read at once.

    Args:
      model: whose attention it is.
      tokens: of one sequence.
      page_size: tokens of a page.
      sink_tokens: first tokens that stay exact.
      random: chooses when pages are sealed.
    """
    last = len(tokens) - HORIZON_TOKENS
    count = (last - WINDOW_TOKENS) // page_size
    if count < 1:
        raise ValueError(
            f"tokens: expected at least {HORIZON_TOKENS + WINDOW_TOKENS + page_size},"
            f" got {len(tokens)}"
        )
    first = (np.arange(count) + 1) * page_size + WINDOW_TOKENS
    soon = np.minimum(first + random.integers(0, page_size, count), last)
    late = random.integers(first, last + 1)
    sealed_at = np.where(random.random(count) < 0.5, soon, late).astype(np.int32)
    _, got = capture_forward(model.params, model.config, jnp.asarray([tokens], jnp.int32))
    position = np.arange(count * page_size).reshape(count, page_size)
    counted = position >= sink_tokens
    parts = [
        _one_layer(
            got.q[layer, 0],
            got.k[layer, 0],
            got.v[layer, 0],
            sealed_at,
            counted,
            model.config.layer_windows[layer],
            scale=model.config.query_scale,
            soft_cap=model.config.soft_cap,
        )
        for layer in range(model.config.num_layers)
    ]
    keys, values, mass, error, damage = (
        np.stack([np.asarray(part[i]) for part in parts], axis=1) for i in range(5)
    )
    return Pages(
        keys=keys.astype(np.float16),
        values=values.astype(np.float16),
        mass=mass,
        seen=(sealed_at[:, None] - position).astype(np.float32),
        error=error,
        damage=damage,
        counted=counted,
    )


def join(parts: list[Pages]) -> Pages:
    """All pages of several texts."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap"))
def _one_layer(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sealed_at: jax.Array,
    counted: jax.Array,
    window: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, ...]:
    """Keys, values, mass, error and damage [pages, page_size, heads, ...] of one layer.

    Args:
      q: [tokens, num_heads, dim].
      k: [tokens, heads, dim].
      v: like k.
      sealed_at: i32[pages]: so many tokens were there when the page was sealed.
      counted: bool[pages, page_size].
      window: i32[], sliding window, 0 for none.
      scale: of the logits.
      soft_cap: of the logits.
    """
    tokens, heads, dim = k.shape
    pages, page_size = counted.shape
    covered = pages * page_size
    index = jnp.arange(tokens, dtype=jnp.int32)
    distance = index[:, None] - index[None, :]
    visible = (distance >= 0) & ((window == 0) | (distance < window))
    seal_time = jnp.repeat(sealed_at, page_size)[None, :]
    before = (index[:, None] < seal_time).astype(jnp.float32)
    after = (index[:, None] >= seal_time) & (index[:, None] < seal_time + HORIZON_TOKENS)
    after = after.astype(jnp.float32) / HORIZON_TOKENS

    def head(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        """q [group, tokens, dim]; k, v [tokens, dim]."""
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        logits = _einsum("gtd,sd->gts", q, k) * scale
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        weights = jax.nn.softmax(jnp.where(visible[None], logits, -1e30), axis=-1)
        out = _einsum("gts,sd->gtd", weights, v)
        k, v = (x[:covered].reshape(pages, page_size, dim) for x in (k, v))
        key_error = _coarse_error(k, -2, counted).reshape(covered, dim)
        value_error = _coarse_error(v, -1, None).reshape(covered, dim)
        error = token_error(key_error[:, None], value_error[:, None], v.reshape(covered, 1, dim))
        flat = v.reshape(covered, dim)
        # The output moves by weight * (logit error * (value - output) + value error).
        logit = _einsum("gtd,sd->gts", q, key_error) * scale
        squared = jnp.sum(flat**2, axis=-1)[None, None] + jnp.sum(out**2, axis=-1)[..., None]
        squared = squared - 2 * _einsum("gtd,sd->gts", out, flat)
        cross = jnp.sum(flat * value_error, axis=-1)[None, None]
        cross = cross - _einsum("gtd,sd->gts", out, value_error)
        moved = logit**2 * squared + 2 * logit * cross
        moved = moved + jnp.sum(value_error**2, axis=-1)[None, None]
        weights = weights[:, :, :covered]
        mass = jnp.sum(weights * before[None], axis=(0, 1))
        damage = jnp.mean(jnp.sum(weights**2 * moved * after[None], axis=1), axis=0)
        shape = (pages, page_size)
        return k, v, mass.reshape(shape), error.reshape(shape), damage.reshape(shape)

    grouped = q.reshape(tokens, heads, -1, dim).transpose(1, 2, 0, 3)
    parts = lax.map(lambda x: head(*x), (grouped, k.swapaxes(0, 1), v.swapaxes(0, 1)))
    return tuple(jnp.moveaxis(x, 0, 2) for x in parts)


def _coarse_error(x: jax.Array, axis: int, counted: jax.Array | None) -> jax.Array:
    """[pages, page_size, dim]: what a page loses at 4 bits."""
    where = None if counted is None else counted[..., None]
    scale = fit_scale(x, axis=axis, where=where)
    base, _ = encode(x, scale, axis=axis)
    return x - decode(base, scale, axis=axis)
