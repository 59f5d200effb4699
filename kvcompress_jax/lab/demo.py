"""The main job, shown: a model answers from a compressed cache, beside the uncompressed one."""

import dataclasses
from collections.abc import Callable

from kvcompress_jax.config import RECIPES, CompressionConfig
from kvcompress_jax.lab.conversation import Conversation, converse
from kvcompress_jax.lab.evaluate import Evaluation, Evaluator
from kvcompress_jax.lab.retrieval import plant_facts
from kvcompress_jax.lab.texts import TextError, check_positions, take_tokens
from kvcompress_jax.metrics.board import Board
from kvcompress_jax.models.load import Model
from kvcompress_jax.models.tokenizer import Tokenizer

FACTS = 6
ANSWER_TOKENS = 24
PROMPTS = (
    "\n\nTo sum up, the text above is about",
    "\n\nThe most important point is that",
)

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """All that the demo shows.

    Attributes:
      questions: as text; the first ones ask for planted facts.
      expected: the facts' answers, as text.
      uncompressed, compressed: the same conversation, without and with compression.
      tokenizer: of the model, for the answers.
      recipes: evaluations of the named recipes, and of the configuration if it is none of them.
      name: of the configuration.
    """

    questions: tuple[str, ...]
    expected: tuple[str, ...]
    uncompressed: Conversation
    compressed: Conversation
    tokenizer: Tokenizer
    recipes: dict[str, Evaluation]
    name: str


def demonstrate(
    model: Model,
    text: str,
    config: CompressionConfig,
    *,
    text_tokens: int = 2048,
    context_tokens: int = 1024,
    continuation_tokens: int = 128,
    kv_dtype: str = "bfloat16",
    board: Board | None = None,
    progress: Progress = lambda stage, share: None,
) -> Demonstration:
    """Runs the demo.

    Args:
      model: with a tokenizer.
      text: of at least `text_tokens` tokens.
      config: of the compressed conversation.
      text_tokens: length of the conversation's text, facts included.
      context_tokens: of the evaluations.
      continuation_tokens: of the evaluations.
      kv_dtype: of level 0 and of the uncompressed cache.
      board: where figures of both conversations are published.
      progress: is told the stage and the share of it that is done.

    Raises:
      TextError: the text is too short, or the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise TextError(f"{model.name}: expected a model with a tokenizer")
    tokens = model.tokenizer.encode(text, add_special=True)
    take_tokens(tokens, text_tokens, name="text")
    check_positions(model, text_tokens + 4 * ANSWER_TOKENS)
    facts = plant_facts(model.tokenizer, tokens, context_tokens=text_tokens, facts=FACTS)
    questions = [*facts.questions, *(model.tokenizer.encode(p) for p in PROMPTS)]

    def talk(stage: str, config: CompressionConfig) -> Conversation:
        return converse(
            model,
            config,
            facts,
            questions,
            answer_tokens=ANSWER_TOKENS,
            kv_dtype=kv_dtype,
            board=board,
            progress=lambda share: progress(stage, share),
        )

    uncompressed = talk("answering, uncompressed", CompressionConfig(enabled=False))
    name = config_name(config)
    compressed = talk(f"answering, {name}", config)
    configs = dict(RECIPES) | {name: config}
    progress("measuring fidelity", 0.0)
    evaluator = Evaluator(
        model,
        text,
        context_tokens=context_tokens,
        continuation_tokens=continuation_tokens,
        facts=0,
        kv_dtype=kv_dtype,
    )
    recipes = {}
    for i, (label, each) in enumerate(configs.items()):
        recipes[label] = evaluator.evaluate(each)
        progress("measuring fidelity", (i + 1) / len(configs))
    return Demonstration(
        questions=tuple(model.tokenizer.decode(q).strip() for q in questions),
        expected=tuple(model.tokenizer.decode(a).strip() for a in facts.answers),
        uncompressed=uncompressed,
        compressed=compressed,
        tokenizer=model.tokenizer,
        recipes=recipes,
        name=name,
    )


def config_name(config: CompressionConfig) -> str:
    """Name of the recipe that a configuration is, or "custom"."""
    return next((name for name, recipe in RECIPES.items() if recipe == config), "custom")


def as_json(demonstration: Demonstration, model: Model) -> dict[str, object]:
    """What `--json` writes."""

    def conversation(c: Conversation) -> dict[str, object]:
        return {
            "answers": [demonstration.tokenizer.decode(a) for a in c.answers],
            "facts_recalled": sum(c.recalled),
            "facts_asked": len(c.recalled),
            "tokens_per_gib": c.tokens_per_gib,
            "seconds": c.seconds,
            "generated_tokens": c.generated_tokens,
            "stats": c.stats,
            "pages_over_time": [dataclasses.asdict(h) for h in c.history],
        }

    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "configuration": demonstration.name,
        "questions": list(demonstration.questions),
        "expected": list(demonstration.expected),
        "uncompressed": conversation(demonstration.uncompressed),
        "compressed": conversation(demonstration.compressed),
        "fidelity": {k: dataclasses.asdict(v) for k, v in demonstration.recipes.items()},
    }
