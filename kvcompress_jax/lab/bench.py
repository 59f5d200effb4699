"""Any method on one model and text, beside the uncompressed model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.lab.divergence import Divergence, divergence
from kvcompress_jax.lab.methods.base import (
    UNCOMPRESSED,
    Compressed,
    Context,
    Method,
    bits_per_value,
)
from kvcompress_jax.lab.replay import capture, replay
from kvcompress_jax.lab.retrieval import Facts, plant_facts
from kvcompress_jax.lab.texts import TextError, check_positions, take_tokens
from kvcompress_jax.models.load import Model


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """What a method costs and what it keeps.

    Attributes:
      bits: stored bits per value of the context, everything counted.
      kl_mean, kl_p99: nats per token of the continuation, from the uncompressed model.
      delta_nll: nats per token, compressed minus uncompressed.
      top1_agreement: share of tokens with the same most likely successor.
      retrieval: share of the planted facts that are recalled; NaN without facts.
      recalled: per fact, from the beginning of the text to its end.
    """

    bits: float
    kl_mean: float
    kl_p99: float
    delta_nll: float
    top1_agreement: float
    retrieval: float
    recalled: tuple[bool, ...]


class Recall:
    """Facts in a context of their own; all questions are asked at once."""

    def __init__(self, model: Model, facts: Facts, context: Context) -> None:
        self.model = model
        self.facts = facts
        self.context = context
        asked = [q + a for q, a in zip(facts.questions, facts.answers, strict=True)]
        longest = max(len(row) for row in asked)
        # Padding comes after the answer: no token that counts sees it.
        self.rows = np.array([row + [0] * (longest - len(row)) for row in asked], np.int32)

    def measure(self, compressed: Compressed) -> tuple[bool, ...]:
        """Per fact, whether every token of its answer is the most likely one."""
        out = replay(
            self.model.params,
            compressed,
            jnp.asarray(self.rows),
            config=self.model.config,
            kv_dtype=self.context.kv_dtype,
        )
        said = np.asarray(jnp.argmax(out, axis=-1))
        found = []
        for row, question, answer in zip(
            said, self.facts.questions, self.facts.answers, strict=True
        ):
            start = len(question) - 1
            found.append(bool(np.array_equal(row[start : start + len(answer)], answer)))
        return tuple(found)


class Bench:
    """Measures methods; the uncompressed model runs once and serves all of them."""

    def __init__(
        self,
        model: Model,
        text: str,
        *,
        context_tokens: int = 1024,
        continuation_tokens: int = 256,
        facts: int = 32,
        sinks: int = 4,
        window: int = 0,
        kv_dtype: str = "bfloat16",
    ) -> None:
        """Runs the uncompressed model.

        Args:
          model: with a tokenizer.
          text: of at least context_tokens + continuation_tokens tokens.
          context_tokens: that are compressed.
          continuation_tokens: that are teacher-forced on the compressed context.
          facts: planted in a context of the same length; 0 skips retrieval.
          sinks: first tokens that stay exact in every method.
          window: newest tokens that stay exact in every method.
          kv_dtype: of the uncompressed cache, of exact tokens and of the continuation.

        Raises:
          TextError: the text is too short, or too long for the model, or the model has no
            tokenizer.
        """
        if model.tokenizer is None:
            raise TextError(f"{model.name}: expected a model with a tokenizer")
        self.model = model
        every = model.tokenizer.encode(text, add_special=True)
        wanted = context_tokens + continuation_tokens
        check_positions(model, wanted)
        tokens = take_tokens(every, wanted, name="text")
        self.continuation = np.array(tokens[context_tokens:], np.int32)

        def read(tokens: list[int]) -> Context:
            return capture(model, tokens, sinks=sinks, window=window, kv_dtype=kv_dtype)

        self.context = read(tokens[:context_tokens])
        self.recall = None
        if facts:
            planted = plant_facts(
                model.tokenizer, every, context_tokens=context_tokens, facts=facts
            )
            self.recall = Recall(model, planted, read(planted.context))
        self.reference = self._continue(compress(UNCOMPRESSED, self.context))
        self.uncompressed = self.measure(UNCOMPRESSED)

    def measure(self, method: Method) -> Fidelity:
        """All measures of one method."""
        compressed = compress(method, self.context)
        found = self.divergence(compressed)
        recalled: tuple[bool, ...] = ()
        if self.recall is not None:
            recalled = self.recall.measure(compress(method, self.recall.context))
        return Fidelity(
            bits=bits_per_value(compressed),
            kl_mean=float(found.kl.mean()),
            kl_p99=float(np.quantile(found.kl, 0.99)),
            delta_nll=float(found.delta_nll.mean()),
            top1_agreement=float(found.agree.mean()),
            retrieval=float(np.mean(recalled)) if recalled else math.nan,
            recalled=recalled,
        )

    def divergence(self, compressed: Compressed) -> Divergence:
        """Of the continuation's predictions from the uncompressed model's."""
        return divergence(
            self.reference[:-1], self._continue(compressed)[:-1], self.continuation[1:]
        )

    def _continue(self, compressed: Compressed) -> jax.Array:
        """f32[continuation, vocab]."""
        return replay(
            self.model.params,
            compressed,
            jnp.asarray(self.continuation[None]),
            config=self.model.config,
            kv_dtype=self.context.kv_dtype,
        )[0]


def compress(method: Method, context: Context) -> Compressed:
    """Applies a method, compiled once for equal methods and contexts of equal shapes."""
    return _apply(method, context)


@functools.partial(jax.jit, static_argnums=0)
def _apply(method: Method, context: Context) -> Compressed:
    return method(context)


def stored_bits(method: Method, context: Context) -> float:
    """Bits per value that a method would store, without running it."""
    return bits_per_value(jax.eval_shape(method, context))
