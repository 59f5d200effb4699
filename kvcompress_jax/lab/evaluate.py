"""One configuration on one model and text, beside the uncompressed model."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.lab.cache_error import (
    Attended,
    attend_uncompressed,
    attention_output_error,
    cosines,
)
from kvcompress_jax.lab.divergence import Divergence, divergence
from kvcompress_jax.lab.prefill import Prefill, observing, put_prefill, take_prefill
from kvcompress_jax.lab.retrieval import Facts, plant_facts, retrieval_accuracy
from kvcompress_jax.lab.texts import TextError, check_positions, take_tokens
from kvcompress_jax.lab.timing import time_pages
from kvcompress_jax.models.load import Model
from kvcompress_jax.models.runner import Runner, make_runner

QUESTION_TOKENS = 16  # of a step while questions are asked
ERROR_TOKENS = 32  # queries that the attention output error is measured with

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Fidelity, memory and time of one configuration.

    Attributes:
      effective_bits: stored bits per value of the sealed pages, every overhead counted; the bits
        of `kv_dtype` when nothing is sealed.
      cache_bits: the same over the whole cache, raw window and sinks included.
      memory_saved_fraction: 1 - allocated_bytes / uncompressed_bytes.
      allocated_bytes: of the pages in use after the context.
      uncompressed_bytes: of as many plain pages.
      delta_nll: nats per token of the continuation, compressed minus uncompressed.
      kl_mean, kl_p99: nats per token, of compressed from uncompressed.
      top1_agreement: share of tokens with the same most likely successor.
      retrieval_accuracy, retrieval_accuracy_uncompressed: share of planted facts recalled.
      attention_output_error: relative L2 error, mean over layers.
      key_cosine, value_cosine: of the sealed tokens; 1 when nothing is sealed.
      compress_ms_per_1k_tokens, decompress_ms_per_1k_tokens: all layers, on this device; 0 when
        nothing is sealed.
    """

    effective_bits: float
    cache_bits: float
    memory_saved_fraction: float
    allocated_bytes: int
    uncompressed_bytes: int
    delta_nll: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    retrieval_accuracy: float
    retrieval_accuracy_uncompressed: float
    attention_output_error: float
    key_cosine: float
    value_cosine: float
    compress_ms_per_1k_tokens: float
    decompress_ms_per_1k_tokens: float


class Evaluator:
    """Evaluates configurations; the uncompressed model runs once and serves all of them."""

    def __init__(
        self,
        model: Model,
        text: str,
        *,
        context_tokens: int = 1024,
        continuation_tokens: int = 256,
        facts: int = 32,
        kv_dtype: str = "bfloat16",
        chunk_tokens: int | None = None,
        progress: Progress = lambda stage: None,
    ) -> None:
        """Runs the uncompressed model.

        Args:
          model: with a tokenizer.
          text: of at least context_tokens + continuation_tokens tokens.
          context_tokens: tokens that are compressed.
          continuation_tokens: tokens that are teacher-forced on the compressed cache.
          facts: planted in a context of the same length; 0 skips retrieval.
          kv_dtype: of level 0, and of the uncompressed cache.
          chunk_tokens: of the context's prefill; None: all of it in one step, so that compression
            starts after it.
          progress: is told what is being done.

        Raises:
          TextError: the text is too short, or too long for the model, or the model has no
            tokenizer.
        """
        if model.tokenizer is None:
            raise TextError(f"{model.name}: expected a model with a tokenizer")
        self.model = model
        self.kv_dtype = kv_dtype
        self.chunk_tokens = chunk_tokens or context_tokens
        self.progress = progress
        every = model.tokenizer.encode(text, add_special=True)
        wanted = context_tokens + continuation_tokens
        check_positions(model, wanted)
        tokens = take_tokens(every, wanted, name="text")
        self.context, self.continuation = tokens[:context_tokens], tokens[context_tokens:]
        self.facts = None
        if facts:
            self.facts = plant_facts(
                model.tokenizer, every, context_tokens=context_tokens, facts=facts
            )
        uncompressed = observing(self._room(self.context))
        progress("uncompressed: context")
        self.reference, self.sequence = self._read(uncompressed, self.context)
        self.prefill = self._prefill(self.reference, self.sequence)
        progress("uncompressed: continuation")
        self.logits = self._continue(self.reference, self.sequence)
        progress("uncompressed: retrieval")
        self.recalled, self.facts_prefill = math.nan, None
        if self.facts is not None:
            runner, sequence = self._read(uncompressed, self.facts.context)
            self.facts_prefill = self._prefill(runner, sequence)
            self.recalled = self._recall(runner, sequence, self.facts)

    def evaluate(self, config: CompressionConfig) -> Evaluation:
        """All measures of one configuration."""
        self.progress("context")
        runner, sequence = self._read(config, self.context, self.prefill)
        stats = runner.manager.get_compression_stats()
        self.progress("cache error")
        similar = cosines(self.reference, runner, (self.sequence, sequence)) or (1.0, 1.0)
        error = attention_output_error(self._attended, runner, sequence)
        self.progress("continuation")
        found = self._divergence(runner, sequence)
        self.progress("retrieval")
        recalled = math.nan
        if self.facts is not None:
            asked = self._read(config, self.facts.context, self.facts_prefill)
            recalled = self._recall(*asked, self.facts)
        self.progress("timing")
        times = None
        if stats["effective_bits"] is not None:
            times = time_pages(
                runner.layout,
                level=config.sealed_level,
                code=runner.cache.code,
                fed=config.feeds_errors_back,
            )
        return Evaluation(
            effective_bits=stats["effective_bits"] or float(8 * runner.layout.jax_dtype.itemsize),
            cache_bits=stats["cache_bits"] or math.nan,
            memory_saved_fraction=1 - stats["allocated_bytes"] / stats["uncompressed_bytes"],
            allocated_bytes=stats["allocated_bytes"],
            uncompressed_bytes=stats["uncompressed_bytes"],
            delta_nll=float(found.delta_nll.mean()),
            kl_mean=float(found.kl.mean()),
            kl_p99=float(np.quantile(found.kl, 0.99)),
            top1_agreement=float(found.agree.mean()),
            retrieval_accuracy=recalled,
            retrieval_accuracy_uncompressed=self.recalled,
            attention_output_error=error,
            key_cosine=similar[0],
            value_cosine=similar[1],
            compress_ms_per_1k_tokens=times.compress_ms_per_1k_tokens if times else 0.0,
            decompress_ms_per_1k_tokens=times.decompress_ms_per_1k_tokens if times else 0.0,
        )

    def fidelity(self, config: CompressionConfig) -> tuple[Divergence, float]:
        """Of the continuation's predictions alone, and the bits per value of the whole cache."""
        self.progress("context")
        runner, sequence = self._read(config, self.context, self.prefill)
        bits = runner.manager.get_compression_stats()["cache_bits"]
        self.progress("continuation")
        return self._divergence(runner, sequence), math.nan if bits is None else bits

    @functools.cached_property
    def _attended(self) -> Attended:
        """Read when something is compared with it: `fidelity` needs none."""
        tokens = self.continuation[:ERROR_TOKENS]
        return attend_uncompressed(self.reference, self.sequence, tokens)

    def _room(self, tokens: list[int]) -> int:
        """Tokens that a cache for `tokens` and what is asked after them has to hold."""
        return len(tokens) + 2 * len(self.continuation) + 2 * ERROR_TOKENS

    def _divergence(self, runner: Runner, sequence: int) -> Divergence:
        logits = self._continue(runner, sequence)
        targets = np.array(self.continuation[1:], np.int32)
        return divergence(self.logits[:-1], logits[:-1], targets)

    def _read(
        self, config: CompressionConfig, tokens: list[int], prefill: Prefill | None = None
    ) -> tuple[Runner, int]:
        """A runner that holds `tokens` in a sequence, compressed as the configuration says, with
        room for the continuation in a fork; `prefill` is what the model made of them, if known."""
        runner = make_runner(
            self.model,
            config,
            tokens=self._room(tokens),
            max_sequences=2,
            chunk_tokens=self.chunk_tokens,
            kv_dtype=self.kv_dtype,
        )
        if prefill is None:
            sequence = runner.manager.add()
            runner.extend(sequence, tokens)
        else:
            sequence = put_prefill(runner, prefill)
        runner.advance()
        # From here on in small steps, so that pages are sealed as they leave the window.
        runner.chunk_tokens = min(config.page_size, self.chunk_tokens)
        return runner, sequence

    def _continue(self, runner: Runner, sequence: int) -> jax.Array:
        """f32[continuation, vocab], teacher-forced on a fork."""
        fork = runner.manager.fork(sequence)
        logits = runner.extend(fork, self.continuation, all_logits=True)
        runner.advance()
        runner.manager.free(fork)
        return logits

    def _prefill(self, runner: Runner, sequence: int) -> Prefill | None:
        """None where compression starts before the context has been read."""
        length = runner.manager.length(sequence)
        return take_prefill(runner, sequence) if self.chunk_tokens >= length else None

    def _recall(self, runner: Runner, sequence: int, facts: Facts) -> float:
        runner.chunk_tokens = QUESTION_TOKENS
        return retrieval_accuracy(runner, sequence, facts)
