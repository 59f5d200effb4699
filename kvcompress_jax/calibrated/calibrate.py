"""From a model and texts to a profile."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.calibrated.code import VALUE_CLIP
from kvcompress_jax.calibrated.divide import candidates, trial
from kvcompress_jax.calibrated.fit import KeyFit, fit_keys
from kvcompress_jax.calibrated.metric import LayerStatistics, layer_statistics
from kvcompress_jax.calibrated.profile import Profile, ProfileError
from kvcompress_jax.calibrated.row import RowLayout
from kvcompress_jax.codec.hadamard import hadamard_matrix
from kvcompress_jax.models.dense import AttentionInputs, capture_forward
from kvcompress_jax.models.load import Model
from kvcompress_jax.models.rope import layer_frequencies


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What calibration knows of a model, for codes of any rate.

    Attributes:
      layers: of each layer, all samples together.
      trials: tokens that codes are tried on, and what the attention got for them.
      tokens: of all samples.
      page_size, sink_tokens: of the cache.
    """

    layers: list[LayerStatistics]
    trials: Sequence[tuple[Sequence[int], AttentionInputs]]
    tokens: int
    page_size: int
    sink_tokens: int


def gather(
    model: Model,
    samples: Sequence[Sequence[int]],
    *,
    held_out: Sequence[Sequence[int]] = (),
    page_size: int = 64,
    sink_tokens: int = 4,
    progress: Callable[[str, float], None] = lambda stage, done: None,
) -> Statistics:
    """Reads samples with a model.

    Args:
      model: to calibrate.
      samples: tokens of texts, each at least twice as long as a page; a few thousand together.
      held_out: others, to try codes on. Without any it is the last of the samples, which says less:
        a code that was fitted to a text does best there.
      page_size: of the cache, for the overheads.
      sink_tokens: first tokens, which are kept exactly and not calibrated for.
      progress: is told the stage and the share of it that is done.

    Raises:
      ProfileError: a sample that is too short.
    """
    config = model.config
    for tokens in (*samples, *held_out):
        if len(tokens) < 2 * page_size:
            raise ProfileError(
                f"text: expected samples of at least {2 * page_size} tokens, got {len(tokens)}"
            )

    def read(tokens: Sequence[int]) -> AttentionInputs:
        return capture_forward(model.params, config, jnp.asarray([tokens], jnp.int32))[1]

    frequencies = layer_frequencies(config)
    found: list[list[LayerStatistics]] = [[] for _ in range(config.num_layers)]
    for i, tokens in enumerate(samples):
        seen = read(tokens)
        for layer in range(config.num_layers):
            progress("statistics", (i + layer / config.num_layers) / len(samples))
            statistics = layer_statistics(
                seen, jnp.int32(layer), frequencies[layer], config, sink_tokens
            )
            found[layer].append(jax.device_get(statistics))
    return Statistics(
        layers=[_join(parts) for parts in found],
        trials=[(tokens, read(tokens)) for tokens in held_out] or [(samples[-1], seen)],
        tokens=sum(len(tokens) for tokens in samples),
        page_size=page_size,
        sink_tokens=sink_tokens,
    )


def calibrate(
    model: Model,
    statistics: Statistics,
    *,
    bits: float,
    progress: Callable[[str, float], None] = lambda stage, done: None,
) -> Profile:
    """Fits a code to a model.

    Args:
      model: to calibrate.
      statistics: of it (`gather`).
      bits: stored bits per key or value of sealed pages, every overhead counted; not exceeded.
      progress: is told the stage and the share of it that is done.

    Raises:
      ProfileError: no code of so few bits.
    """
    options = candidates(
        model.config,
        bits=bits,
        page_size=statistics.page_size,
        sink_tokens=statistics.sink_tokens,
    )
    if not options:
        raise ProfileError(f"bits: expected more for this model, got {bits:g}")
    about = {"model": model.name, "bits": f"{bits:g}", "tokens": str(statistics.tokens)}
    return _best(model, statistics, options, about, progress)


def _fit(
    model: Model,
    layers: list[LayerStatistics],
    rows: RowLayout,
    progress: Callable[[str, float], None],
    about: dict[str, str],
) -> Profile:
    fits: list[list[KeyFit]] = []
    for i, layer in enumerate(layers):
        progress(f"basis, steps and bits, {rows.value_bits} bits for values", i / len(layers))
        pairs = zip(layer.keys, layer.metric, strict=True)
        fits.append([fit_keys(k, m, bits=8 * rows.key_bytes) for k, m in pairs])

    def collect(name: str, dtype: type) -> np.ndarray:
        return np.array([[getattr(fit, name) for fit in heads] for heads in fits], dtype)

    return Profile(
        rows=rows,
        fingerprint=model.fingerprint,
        mean=collect("mean", np.float32),
        decode=collect("decode", np.float32),
        scale=collect("scale", np.float32),
        step=collect("step", np.float32),
        widths=collect("widths", np.uint8),
        value_unit=np.array([_value_unit(layer, rows) for layer in layers], np.float32),
        about=about,
    )


def _best(
    model: Model,
    statistics: Statistics,
    options: list[RowLayout],
    about: dict[str, str],
    progress: Callable[[str, float], None],
) -> Profile:
    """The option that changes the predictions least: uphill from an even share for both."""
    tried: dict[int, tuple[float, Profile]] = {}

    def attempt(i: int) -> float:
        if not 0 <= i < len(options):
            return np.inf
        if i not in tried:
            profile = _fit(model, statistics.layers, options[i], progress, about)
            code = profile.code(layer_frequencies(model.config))
            found = [
                trial(
                    model.params,
                    jnp.asarray(tokens, jnp.int32),
                    seen,
                    code,
                    rows=profile.rows,
                    config=model.config,
                    page_size=statistics.page_size,
                    sink_tokens=statistics.sink_tokens,
                )
                for tokens, seen in statistics.trials
            ]
            tried[i] = float(np.mean(found)), profile
        return tried[i][0]

    dim = model.config.head_dim
    uneven = [abs(8 * rows.key_bytes - rows.value_bits * dim) for rows in options]
    at = int(np.argmin(uneven))
    while (best := min((at, at - 1, at + 1), key=attempt)) != at:
        at = best
    kl, profile = tried[at]
    return dataclasses.replace(profile, about=about | {"kl": f"{kl:.6f}"})


def _join(parts: list[LayerStatistics]) -> LayerStatistics:
    """All samples of a layer; every token counts alike."""
    counts = np.array([part.keys.shape[1] for part in parts], np.float64)
    share = counts / counts.sum()
    return LayerStatistics(
        keys=np.concatenate([part.keys for part in parts], axis=1),
        values=np.concatenate([part.values for part in parts], axis=1),
        metric=np.tensordot(share, np.stack([part.metric for part in parts]), 1),
    )


def _value_steps(turned: np.ndarray, value_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Step and middle of every token, [..., 1]."""
    lo, hi = turned.min(-1, keepdims=True), turned.max(-1, keepdims=True)
    step = (hi - lo) * VALUE_CLIP.get(value_bits, 1.0) / (2**value_bits - 1)
    return np.maximum(step, np.finfo(np.float32).tiny), (lo + hi) / 2


def _value_unit(s: LayerStatistics, rows: RowLayout) -> np.ndarray:
    """[heads], the step that a byte says with its middle code."""
    turned = s.values @ hadamard_matrix(s.values.shape[-1])
    return np.median(_value_steps(turned, rows.value_bits)[0], axis=(1, 2))
