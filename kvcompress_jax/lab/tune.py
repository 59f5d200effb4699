"""Finds the configuration that keeps most in a budget, or that takes least within a bound.

Every configuration is measured on the model, none is guessed: how much each layer gains from a fine
plane orders the layers, and along that order go layers and share of refined tokens, page sizes and
windows, and the calibrated codes that are given. What wins is measured once more, on the paged
cache that will be served from.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.lab.bench import Bench, compress
from kvcompress_jax.lab.budget import sequence_bits
from kvcompress_jax.lab.gate import Judge
from kvcompress_jax.lab.methods.base import Compressed
from kvcompress_jax.lab.methods.calibrated import Calibrated
from kvcompress_jax.lab.methods.embedded import Embedded
from kvcompress_jax.models.cache_settings import cache_layout, read_profile
from kvcompress_jax.models.load import Model
from kvcompress_jax.quality import Measured, QualityBound, QualityError

FAMILIES = ((64, 64), (128, 64), (128, 0))  # tokens of a page, tokens of the raw window
RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
VERIFIED = 3  # candidates that are measured on the paged cache before giving up

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """What is asked for.

    Attributes:
      bound: what must be kept.
      bits: stored bits per value of the cache of one sequence, everything counted, at most; None:
        as few as the bound allows.
      length_tokens: of that sequence.
      error_feedback: of the configurations; False for where keys are rounded to the nearest.
    """

    bound: QualityBound
    bits: float | None = None
    length_tokens: int = 8192
    error_feedback: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A configuration that was tried.

    Attributes:
      config: without bound and measurement.
      bits: of the cache of a sequence of the goal's length.
      kl, top1: of the worst text, on the bench.
    """

    config: CompressionConfig
    bits: float
    kl: float
    top1: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of it.

    Attributes:
      config: the best one, with its bound and what was measured on the paged cache.
      bits: of the cache of a sequence of the goal's length.
      tried: everything that was measured, best first.
      gains: per layer, nats of KL less when its sealed pages have both planes and no other
        layer's have; empty where that was not asked.
    """

    config: CompressionConfig
    bits: float
    tried: tuple[Candidate, ...]
    gains: tuple[float, ...]


class Tuner:
    """Tries configurations on one model and some texts."""

    def __init__(
        self,
        model: Model,
        texts: Mapping[str, str],
        *,
        context_tokens: int = 1024,
        continuation_tokens: int = 256,
        kv_dtype: str = "bfloat16",
        progress: Progress = lambda stage, share: None,
    ) -> None:
        """Runs the uncompressed model.

        Args:
          model: with a tokenizer.
          texts: by name, each of at least context_tokens + continuation_tokens tokens.
          context_tokens: that are compressed.
          continuation_tokens: that are teacher-forced on the compressed context.
          kv_dtype: of level 0 and of the uncompressed cache.
          progress: is told the stage and the share of it that is done.

        Raises:
          TextError: a text is too short, or too long for the model, or the model has no tokenizer.
        """
        self.model, self.texts = model, texts
        self.context_tokens, self.continuation_tokens = context_tokens, continuation_tokens
        self.kv_dtype, self.progress = kv_dtype, progress
        progress("uncompressed model", 0.0)
        self.benches = []
        for text in texts.values():
            self.benches.append(
                Bench(
                    model,
                    text,
                    context_tokens=context_tokens,
                    continuation_tokens=continuation_tokens,
                    facts=0,
                    kv_dtype=kv_dtype,
                )
            )
            progress("uncompressed model", len(self.benches) / len(texts))
        self.judge: Judge | None = None
        self.goal = Goal(bound=QualityBound(kl=0.0))
        self.tried: list[Candidate] = []
        self.order: list[int] = []
        self.gains: tuple[float, ...] = ()

    def tune(self, goal: Goal, profiles: Sequence[str] = ()) -> Tuned:
        """Searches.

        Args:
          goal: what is asked for.
          profiles: files of codes that were calibrated to the model, for pages of 64 tokens.

        Raises:
          QualityError: nothing fits the budget, or nothing that does keeps the bound.
          ProfileError: a profile is of another model.
        """
        self.goal, self.tried = goal, []
        for config in _families(goal):
            self._family(config)
        for i, profile in enumerate(profiles):
            self.progress("calibrated codes", i / len(profiles))
            for window in (64, 0):
                self._profile(CompressionConfig(profile=profile, window_tokens=window))
        best_first = self._best_first()
        broken = None
        for i, candidate in enumerate(best_first[:VERIFIED]):
            self.progress("paged cache", i / VERIFIED)
            self.judge = self.judge or Judge(
                self.model,
                self.texts,
                context_tokens=self.context_tokens,
                continuation_tokens=self.continuation_tokens,
                kv_dtype=self.kv_dtype,
            )
            measured = self.judge.measure(candidate.config)
            broken = self.goal.bound.broken_by(measured.kl, measured.top1)
            if broken is None:
                self.progress("paged cache", 1.0)
                return self._found(candidate, measured, best_first)
        raise QualityError(f"{broken}, on the paged cache")

    def _found(
        self, candidate: Candidate, measured: Measured, best_first: list[Candidate]
    ) -> Tuned:
        rest = [c for c in self.tried if c not in best_first]
        return Tuned(
            config=dataclasses.replace(candidate.config, bound=self.goal.bound, measured=measured),
            bits=candidate.bits,
            tried=(*best_first, *sorted(rest, key=lambda c: c.kl)),
            gains=self.gains,
        )

    def _best_first(self) -> list[Candidate]:
        """Those that fit and keep the bound on the bench."""
        bits, bound = self.goal.bits, self.goal.bound
        if not self.tried:
            least = min(self._bits(_layered(c, 1.0, [], 1)) for c in _families(self.goal))
            raise QualityError(
                f"bits: expected at least {least:.2f} for a sequence of {self.goal.length_tokens}"
                f" tokens without a calibrated code, got {bits:.2f}"
            )
        kept = [c for c in self.tried if bound.broken_by(c.kl, c.top1) is None]
        if not kept:
            best = min(self.tried, key=lambda c: c.kl)
            reason = bound.broken_by(best.kl, best.top1)
            within = "" if bits is None else f" in {bits:.2f} bits"
            raise QualityError(
                f"{reason}: the best found{within}, {best.bits:.2f} bits: {describe(best.config)}"
            )
        return sorted(kept, key=lambda c: (c.bits, c.kl) if bits is None else (c.kl, c.bits))

    def _family(self, config: CompressionConfig) -> None:
        """Every share of refined tokens, in as many layers as are paid for or needed."""
        layers = self.model.config.num_layers
        if not self._fits(_layered(config, 1.0, [], layers)):
            return
        stage = f"pages of {config.page_size}, window of {config.window_tokens}"
        self.progress(stage, 0.0)
        contexts = [
            dataclasses.replace(bench.context, window=config.window_tokens)
            for bench in self.benches
        ]
        tracked = Embedded(config=dataclasses.replace(config, seal_level=1))
        planes = [_planes(tracked, context) for context in contexts]

        def measure(rows: np.ndarray, *, even: bool = False) -> tuple[float, float]:
            return self._measure(
                [p.refined(c, rows, even=even) for p, c in zip(planes, contexts, strict=True)]
            )

        if not self.order:
            self._sensitivity(measure, config.page_size)
        known: dict[tuple[float, int], Candidate] = {}

        def attempt(ratio: float, count: int) -> Candidate:
            ratio = ratio if count else 1.0  # with no layer refined all shares are the same
            if (ratio, count) not in known:
                tried = _layered(config, ratio, self.order[:count], layers)
                rows = np.zeros(layers, int)
                rows[self.order[:count]] = tried.fine_rows
                kl, top1 = measure(rows, even=tried.refining_bits == 2)
                known[ratio, count] = Candidate(
                    config=tried, bits=self._bits(tried), kl=kl, top1=top1
                )
            return known[ratio, count]

        for i, ratio in enumerate(RATIOS):
            fitting = [
                n
                for n in range(layers + 1)
                if self._fits(_layered(config, ratio, self.order[:n], layers))
            ]
            attempt(ratio, fitting[-1])
            if self.goal.bits is None:
                self._fewest(functools.partial(attempt, ratio), layers)
            self.progress(stage, (i + 1) / len(RATIOS))
        self.tried += known.values()

    def _fewest(self, attempt: Callable[[int], Candidate], layers: int) -> None:
        """Halves the range in which the smallest number of refined layers lies that is enough."""

        def enough(count: int) -> bool:
            found = attempt(count)
            return self.goal.bound.broken_by(found.kl, found.top1) is None

        low, high = 0, layers
        if enough(low) or not enough(high):
            return
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)

    def _sensitivity(self, measure: Callable[[np.ndarray], tuple[float, float]], page: int) -> None:
        """Which layers gain most from a fine plane."""
        layers = self.model.config.num_layers
        plain, _ = measure(np.zeros(layers, int))
        gains = []
        for layer in range(layers):
            self.progress("sensitivity of layers", layer / layers)
            rows = np.zeros(layers, int)
            rows[layer] = page
            gains.append(plain - measure(rows)[0])
        self.progress("sensitivity of layers", 1.0)
        self.gains = tuple(gains)
        self.order = [int(layer) for layer in np.argsort(-np.array(gains), kind="stable")]

    def _profile(self, config: CompressionConfig) -> None:
        bits = self._bits(config)
        if self.goal.bits is not None and bits > self.goal.bits:
            return
        assert config.profile is not None
        method = Calibrated(
            profile=config.profile,
            fingerprint=self.model.fingerprint,
            page_size=config.page_size,
        )
        kl, top1 = self._measure(
            [
                compress(method, dataclasses.replace(b.context, window=config.window_tokens))
                for b in self.benches
            ]
        )
        self.tried.append(Candidate(config=config, bits=bits, kl=kl, top1=top1))

    def _measure(self, compressed: list[Compressed]) -> tuple[float, float]:
        found = [b.divergence(c) for b, c in zip(self.benches, compressed, strict=True)]
        return max(float(f.kl.mean()) for f in found), min(float(f.agree.mean()) for f in found)

    def _bits(self, config: CompressionConfig) -> float:
        layout = cache_layout(
            self.model.config, config, self.kv_dtype, read_profile(config, self.model)
        )
        return sequence_bits(layout, config, self.goal.length_tokens)

    def _fits(self, config: CompressionConfig) -> bool:
        return self.goal.bits is None or self._bits(config) <= self.goal.bits


def describe(config: CompressionConfig) -> str:
    """A configuration in a line."""
    pages = f"pages of {config.page_size}, window of {config.window_tokens}"
    if config.profile is not None:
        return f"calibrated ({config.profile}), {pages}"
    refined = f"8 bits for {config.ratio:.4g} of the tokens"
    if config.refining_bits == 2:
        share = 2 * config.ratio
        refined = "6 bits for " + ("all tokens" if share == 1 else f"{share:.4g} of the tokens")
    if config.sealed_level == 1:
        return f"{refined}, {pages}"
    if config.floor_layers:
        return f"{refined} in {len(config.floor_layers)} layers, {pages}"
    return f"4 bits, {pages}"


def _families(goal: Goal) -> list[CompressionConfig]:
    return [
        CompressionConfig(page_size=p, window_tokens=w, error_feedback=goal.error_feedback)
        for p, w in FAMILIES
    ]


def _layered(
    config: CompressionConfig, ratio: float, refined: list[int], layers: int
) -> CompressionConfig:
    """Both planes for a share of the tokens in some layers, one plane everywhere else."""
    if len(refined) == layers:
        return dataclasses.replace(config, seal_level=1, ratio=ratio)
    floors = tuple(sorted(refined))
    ratio = ratio if refined else config.ratio
    return dataclasses.replace(config, seal_level=2, floor_layers=floors, ratio=ratio)


_planes = jax.jit(Embedded.planes, static_argnums=0)
