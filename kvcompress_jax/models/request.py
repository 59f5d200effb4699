"""A prompt and what became of it."""

import dataclasses

NO_SEQUENCE = -1


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what became of it.

    Attributes:
      finish_reason: once finished: "stop", "length", "cancelled", "out_of_pages" or "error".
      error: what went wrong, in one line, where the reason is one of the last two.
    """

    id: int
    prompt: list[int]
    max_new_tokens: int
    temperature: float
    seed: int
    prefix: int | None  # a sequence that the prompt continues
    tenant: str
    generated: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    sequence: int = NO_SEQUENCE
    fed: int = 0  # tokens of `feed` that are in the cache
    restarted_at: int = 0  # tokens that it had generated when it was started over
    suspect: bool = False  # was in a step that failed, and in none since that did not

    @property
    def feed(self) -> list[int]:
        """What must be in the cache before the next token is made: the prompt, and what had been
        generated when the request was started over."""
        return self.prompt + self.generated[: self.restarted_at]

    @property
    def decoding(self) -> bool:
        """Whether all of `feed` is in the cache."""
        return self.fed == len(self.prompt) + self.restarted_at

    def start_over(self) -> None:
        """Its pages are gone; its tokens are not."""
        self.sequence, self.fed = NO_SEQUENCE, 0
        self.restarted_at = len(self.generated)
