"""One long text, several questions at once: what an application does with the cache."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.lab.retrieval import Facts
from kvcompress_jax.manager.stats import CompressionStats
from kvcompress_jax.metrics.board import Board
from kvcompress_jax.models.engine import Engine
from kvcompress_jax.models.load import Model
from kvcompress_jax.models.runner import make_runner

CHUNK_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Levels:
    """Pages on the device at one moment, as `get_compression_stats` reports them."""

    tokens: int
    level_0: int
    level_1: int
    level_2: int


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What came of it.

    Attributes:
      answers: token ids per question.
      recalled: per fact, whether its answer was generated to the last token.
      history: one entry per step.
      stats: `get_compression_stats()` when the cache was fullest.
      tokens_per_gib: how many tokens of this conversation a GiB of cache holds.
      seconds: wall time of reading and answering, compilation included.
      generated_tokens: of all answers.
    """

    answers: tuple[tuple[int, ...], ...]
    recalled: tuple[bool, ...]
    history: tuple[Levels, ...]
    stats: CompressionStats
    tokens_per_gib: float
    seconds: float
    generated_tokens: int


def converse(
    model: Model,
    config: CompressionConfig,
    facts: Facts,
    questions: list[list[int]],
    *,
    answer_tokens: int,
    kv_dtype: str = "bfloat16",
    board: Board | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Conversation:
    """Reads a text once, then answers all questions as concurrent requests that share its pages.

    Args:
      model: weights and their configuration.
      config: of the compression.
      facts: the text, and the answers of the first questions.
      questions: prompts that continue the text; those of `facts` come first.
      answer_tokens: to generate for each question.
      kv_dtype: of level 0.
      board: where figures are published.
      progress: is told the share of the work that is done.
    """
    start = time.perf_counter()
    longest = max(len(q) for q in questions) + answer_tokens
    runner = make_runner(
        model,
        config,
        tokens=len(facts.context) + (len(questions) + 1) * (longest + config.page_size),
        max_sequences=len(questions) + 1,
        chunk_tokens=CHUNK_TOKENS,
        kv_dtype=kv_dtype,
    )
    engine = Engine(runner, board=board)
    manager = runner.manager
    history: list[Levels] = []
    work = len(facts.context) / CHUNK_TOKENS + len(questions) + answer_tokens

    def note() -> None:
        stats = manager.get_compression_stats()
        history.append(
            Levels(
                tokens=stats["tokens"],
                level_0=stats["pages_level_0"],
                level_1=stats["pages_level_1"],
                level_2=stats["pages_level_2"],
            )
        )
        progress(min(len(history) / work, 1.0))

    text = manager.add()
    for i in range(0, len(facts.context), CHUNK_TOKENS):
        began = time.monotonic()
        runner.extend(text, facts.context[i : i + CHUNK_TOKENS])
        if board is not None:
            board.step(time.monotonic() - began, engine.figures)
        note()
    runner.advance()
    # Small steps from here on: a question is a few tokens.
    runner.chunk_tokens = 1 << (max(len(q) for q in questions) - 1).bit_length()
    requests = [engine.submit(q, max_new_tokens=answer_tokens, prefix=text) for q in questions]
    stats = manager.get_compression_stats()
    while not engine.idle:
        engine.step()
        note()
        if history[-1].tokens > stats["tokens"]:
            stats = manager.get_compression_stats()
    answers = tuple(tuple(r.generated) for r in requests)
    manager.free(text)
    manager.verify(runner.cache)
    return Conversation(
        answers=answers,
        recalled=tuple(
            bool(np.array_equal(given[: len(answer)], answer))
            for given, answer in zip(answers, facts.answers, strict=False)
        ),
        history=tuple(history),
        stats=stats,
        tokens_per_gib=stats["tokens"] * 2**30 / stats["allocated_bytes"],
        seconds=time.perf_counter() - start,
        generated_tokens=sum(len(a) for a in answers),
    )
