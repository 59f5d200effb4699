"""The learned score: a small network for each layer and head that predicts, when a page is sealed,
how much damage each token's 4-bit code will do to the attention of later queries.

It knows what the page knows: keys, values, attention received so far. What it learned beyond the
persistence of attention is which keys and values of this model get more of it than before.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.importance.scores import TokenStatistics

FEATURE_VERSION = 1  # of `features`: files of another version do not fit
SCALARS = 7
_FORMAT = "kvcompress learned importance"
_SMALL = 1e-7  # attention and norms below it count as it: their logarithm has no bottom
_GREATEST = 20.0  # of the logarithm of a score, so that it stays finite


class ImportanceFileError(ValueError):
    """A file of a learned score that does not fit; one line: the file, expected, got."""


class Predictor(nn.Module):
    """The network of one head: [..., features] to [...], the log of the score but for what the
    attention so far says already."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(self.hidden)(x))
        return nn.Dense(1, kernel_init=nn.initializers.normal(0.05))(x)[..., 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedImportance:
    """Weights of all layers and heads. A `LearnedScore`: called without the leading layers axis.

    Attributes:
      params: of `Predictor`, every leaf f32[layers, heads, ...].
      gain: f32[layers, heads], of the logarithm of the attention so far.
      mean, scale: f32[layers, heads, features]: features are standardised with them.
      hidden: width of the network.
    """

    params: Any
    gain: jax.Array
    mean: jax.Array
    scale: jax.Array
    hidden: int = dataclasses.field(metadata={"static": True})

    def __call__(self, statistics: TokenStatistics, where: jax.Array, /) -> jax.Array:
        """f32[tokens, heads], more than 0. The square root of the predicted damage: it is mixed
        after a min-max normalisation, in which a few tokens would leave nothing to the others."""
        return jnp.exp(jnp.clip(self.log_damage(statistics, where) / 2, -_GREATEST, _GREATEST))

    def log_damage(self, statistics: TokenStatistics, where: jax.Array) -> jax.Array:
        """f32[tokens, heads]: log of the damage per unit of `statistics.error`, up to a constant
        for each head of the page."""
        x = features(statistics, where).swapaxes(0, 1)  # [heads, tokens, features]
        got = x[..., 0]
        x = (x - self.mean[:, None]) * self.scale[:, None]

        def head(params: Any, x: jax.Array) -> jax.Array:
            return jnp.asarray(Predictor(self.hidden).apply({"params": params}, x))

        out = jax.vmap(head)(self.params, x)
        return (self.gain[:, None] * got + out).T


def features(statistics: TokenStatistics, where: jax.Array) -> jax.Array:
    """What the network gets to see. Logarithms of positive numbers, mostly relative to their mean
    over the page; keys, values, and the norms of the key's rotary pairs, which do not depend on
    the token's position.

    Args:
      statistics: of a page.
      where: bool[tokens, heads], tokens that count in the means.

    Returns:
      f32[tokens, heads, SCALARS + 2.5 * dim].
    """
    s = statistics
    tokens = s.error.shape[0]
    dim = s.keys.shape[-1]

    def log(x: jax.Array) -> jax.Array:
        return jnp.log(jnp.maximum(x, _SMALL))

    def relative(x: jax.Array) -> jax.Array:
        return x - jnp.mean(x, axis=0, keepdims=True, where=where)

    seen = jnp.maximum(s.seen, 1.0)[:, None]
    attention = log(s.mass / seen)
    place = jnp.arange(tokens, dtype=jnp.float32)[:, None] / tokens
    scalars = [
        relative(attention),
        attention,
        jnp.broadcast_to(jnp.log(seen), attention.shape),
        relative(log(s.error)),
        relative(log(jnp.linalg.norm(s.keys, axis=-1))),
        relative(log(jnp.linalg.norm(s.values, axis=-1))),
        jnp.broadcast_to(place, attention.shape),
    ]
    pairs = jnp.hypot(s.keys[..., : dim // 2], s.keys[..., dim // 2 :])
    return jnp.concatenate([jnp.stack(scalars, axis=-1), s.keys, pairs, s.values], axis=-1)


def feature_count(head_dim: int) -> int:
    """Features of a token and head."""
    return SCALARS + 2 * head_dim + head_dim // 2


def init_learned(
    key: jax.Array, mean: jax.Array, scale: jax.Array, *, hidden: int
) -> LearnedImportance:
    """Fresh weights: the score is about the square root of the attention so far.

    Args:
      key: of the random weights.
      mean: f32[layers, heads, features].
      scale: like mean.
      hidden: width of the network.
    """
    layers, heads, count = mean.shape
    keys = jax.random.split(key, (layers, heads))
    one = jnp.zeros((1, count), jnp.float32)
    init = jax.vmap(jax.vmap(lambda key: Predictor(hidden).init(key, one)["params"]))
    gain = jnp.ones((layers, heads), jnp.float32)
    return LearnedImportance(params=init(keys), gain=gain, mean=mean, scale=scale, hidden=hidden)


def save_learned(path: str | Path, learned: LearnedImportance, *, fingerprint: str) -> None:
    """Writes a safetensors file.

    Args:
      path: of the file.
      learned: what to write.
      fingerprint: of the model that it was trained for.
    """
    from safetensors.numpy import save_file

    metadata = {
        "format": _FORMAT,
        "feature_version": str(FEATURE_VERSION),
        "fingerprint": fingerprint,
        "hidden": str(learned.hidden),
    }
    save_file({k: np.asarray(v) for k, v in _flat(learned).items()}, str(path), metadata=metadata)


def load_learned(
    path: str | Path, *, fingerprint: str, layers: int, kv_heads: int, head_dim: int
) -> LearnedImportance:
    """Reads what `save_learned` wrote.

    Args:
      path: of the file.
      fingerprint: of the model that it will score for.
      layers: of the model.
      kv_heads: of the model.
      head_dim: of the model.

    Raises:
      ImportanceFileError: the file cannot be read, is of something else, of another version, or
        of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise ImportanceFileError(f"{path}: expected a safetensors file, got: {e}") from None
    for name, expected in (
        ("format", _FORMAT),
        ("feature_version", str(FEATURE_VERSION)),
        ("fingerprint", fingerprint),
    ):
        if metadata.get(name) != expected:
            raise ImportanceFileError(
                f"{path}: {name}: expected {expected}, got {metadata.get(name)}"
            )
    try:
        hidden = int(metadata["hidden"])
    except (KeyError, ValueError):
        raise ImportanceFileError(f"{path}: hidden: expected a number, got none") from None
    shape = (layers, kv_heads, feature_count(head_dim))
    wanted = jax.eval_shape(
        lambda: init_learned(jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape), hidden=hidden)
    )
    for name, leaf in _flat(wanted).items():
        got = arrays.get(name)
        if got is None or got.shape != leaf.shape or got.dtype != leaf.dtype:
            found = "nothing" if got is None else f"{got.dtype}{list(got.shape)}"
            raise ImportanceFileError(
                f"{path}: {name}: expected {leaf.dtype}{list(leaf.shape)}, got {found}"
            )
        if not np.isfinite(got).all():
            raise ImportanceFileError(f"{path}: {name}: expected finite numbers, got others")
    leaves = [jnp.asarray(arrays[name]) for name in _flat(wanted)]
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _flat(learned: LearnedImportance) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(learned)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
