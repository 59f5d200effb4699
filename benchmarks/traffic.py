"""Simulated users: who sends which prompt when, and what of it the answer attends to."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of users. Lengths are in tokens, times in decode steps; means of distributions."""

    system_prompts: int  # different ones, shared by all sessions
    system_tokens: int
    opening_tokens: int  # of the first message
    message_tokens: int  # of later ones
    answer_tokens: int
    turns: int  # of a session
    think_steps: int  # between an answer and the next message
    arrival_steps: float  # between two sessions
    topical: float  # share of the pages that a question is about
    focus: float  # how much more attention these get


TRAFFIC = {
    "chats": Traffic(
        system_prompts=3, system_tokens=600, opening_tokens=150, message_tokens=120,
        answer_tokens=150, turns=5, think_steps=150, arrival_steps=55, topical=0.15, focus=6.0,
    ),
    "documents": Traffic(
        system_prompts=2, system_tokens=200, opening_tokens=6000, message_tokens=60,
        answer_tokens=80, turns=4, think_steps=120, arrival_steps=120, topical=0.06, focus=20.0,
    ),
    "agents": Traffic(
        system_prompts=4, system_tokens=2000, opening_tokens=400, message_tokens=500,
        answer_tokens=60, turns=9, think_steps=15, arrival_steps=60, topical=0.1, focus=8.0,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message: all that came before it is part of the prompt."""

    prompt: list[int]
    answer: int  # tokens
    seed: int
    topical: float
    focus: float

    @property
    def pages(self) -> int:
        """Of 64 tokens, at the end."""
        return (len(self.prompt) + self.answer) // 64 + 2

    def relevance(self, pages: int) -> np.ndarray:
        """f64[pages], how much the answer needs each: those of one place, and the newest, more."""
        random = np.random.default_rng(self.seed)
        weight = np.ones(pages)
        count = max(1, round(self.topical * pages))
        start = int(random.random() * max(1, len(self.prompt) // 64 - count))
        weight[start : start + count] = self.focus
        return weight + 4.0 * np.exp(-np.arange(pages)[::-1] / 2.0)


def turns(traffic: Traffic, steps: int, *, seed: int) -> dict[int, list[Turn]]:
    """Turns by the step at which they arrive. The time of an answer is that of its tokens."""
    random = np.random.default_rng(seed)
    length = lambda mean: max(8, int(random.gamma(4.0, mean / 4.0)))  # noqa: E731
    words = lambda count: random.integers(1, 50_000, count).tolist()  # noqa: E731
    systems = [words(traffic.system_tokens) for _ in range(traffic.system_prompts)]
    popularity = 1.0 / np.arange(1, traffic.system_prompts + 1)
    popularity /= popularity.sum()
    found: dict[int, list[Turn]] = {}
    start = 0.0
    while start < steps:
        now = start
        system = systems[random.choice(traffic.system_prompts, p=popularity)]
        prompt = system + words(length(traffic.opening_tokens))
        for _ in range(max(1, int(random.poisson(traffic.turns)))):
            answer = length(traffic.answer_tokens)
            turn = Turn(
                list(prompt), answer, int(random.integers(1 << 31)), traffic.topical, traffic.focus
            )
            found.setdefault(int(now), []).append(turn)
            prompt = prompt + words(answer) + words(length(traffic.message_tokens))
            now += answer + random.exponential(traffic.think_steps)
        start += random.exponential(traffic.arrival_steps)
    return found
