"""Facts planted in a text, to be found again from a compressed cache."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from kvcompress_jax.lab.texts import TextError
from kvcompress_jax.models.runner import Runner
from kvcompress_jax.models.tokenizer import Tokenizer

NAMES = (
    "Abernathy Bellweather Castellan Drummond Eastwick Farnsworth Galbraith Hollister Ingleby"
    " Jessamine Kirkbride Lockhart Montague Netherby Ormsby Pemberton Quillfeather Rotherham"
    " Stanhope Thackeray Underhill Vandermeer Wetherby Yarborough Ashdown Birchwood Carmichael"
    " Dunsmore Everleigh Fairbanks Greystone Hawthorne"
).split()


@dataclasses.dataclass(frozen=True)
class Facts:
    """A context with facts in it, and for each fact a question with its answer, as tokens."""

    context: list[int]
    questions: list[list[int]]
    answers: list[list[int]]


def plant_facts(
    tokenizer: Tokenizer, text: list[int], *, context_tokens: int, facts: int, seed: int = 0
) -> Facts:
    """Spreads facts evenly over a text.

    Args:
      tokenizer: of the model.
      text: tokens of a text to hide the facts in; as many are used as fit.
      context_tokens: length of the result.
      facts: how many, at most 32.
      seed: of the numbers.

    Raises:
      TextError: the facts, or the text around them, do not fit.
      ValueError: more facts than there are names.
    """
    if not 1 <= facts <= len(NAMES):
        raise ValueError(f"facts: expected 1 to {len(NAMES)}, got {facts}")
    rng = np.random.default_rng(seed)
    names = [str(n) for n in rng.permutation(NAMES)[:facts]]
    stems = [f"\n\nThe number of {name} is" for name in names]
    codes = [f" {rng.integers(1000, 10000)}" for _ in names]
    questions = [tokenizer.encode(stem) for stem in stems]
    answers = [tokenizer.encode(code) for code in codes]
    closing = tokenizer.encode(".\n\n")
    planted = [q + a + closing for q, a in zip(questions, answers, strict=True)]
    room = context_tokens - sum(len(p) for p in planted)
    if room < facts or len(text) < room:
        raise TextError(
            f"context: no room for {facts} facts in {context_tokens} tokens with a text of"
            f" {len(text)}"
        )
    cuts = [round(i * room / facts) for i in range(facts + 1)]
    context: list[int] = []
    for fact, start, end in zip(planted, cuts[:-1], cuts[1:], strict=True):
        context += text[start:end] + fact
    return Facts(context=context, questions=questions, answers=answers)


def retrieval_accuracy(runner: Runner, sequence: int, facts: Facts) -> float:
    """Share of the facts that the model recalls to the last token, each asked of a fork.

    Args:
      runner: has room for one more sequence.
      sequence: holds `facts.context`.
      facts: what to ask.
    """
    found = 0
    for question, answer in zip(facts.questions, facts.answers, strict=True):
        asker = runner.manager.fork(sequence)
        tokens = question + answer
        logits = runner.extend(asker, tokens[:-1], all_logits=True)
        said = np.asarray(jnp.argmax(logits[-len(answer) :], axis=-1))
        found += bool(np.array_equal(said, answer))
        runner.manager.free(asker)
    return found / len(facts.questions)
