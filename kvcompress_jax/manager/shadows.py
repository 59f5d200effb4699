"""Which sealed pages keep a raw copy, and in which steps they are looked at."""

import dataclasses

import jax
import numpy as np

from kvcompress_jax.manager.page import NONE, Page
from kvcompress_jax.paged.telemetry import ErrorSums


@dataclasses.dataclass(frozen=True)
class ErrorStatistics:
    """Errors of the attention output and of its log-sum-exp (`kvcompress_jax.paged.telemetry`), an
    entry for each layer; empty when nothing was measured."""

    samples: list[int]
    output_mean: list[float]
    output_std: list[float]
    output_max: list[float]
    lse_mean: list[float]
    lse_max: list[float]


class Shadows:
    """A sample of the sealed pages for `kvcompress_jax.paged.telemetry`; the same calls in the
    same order choose the same pages and steps."""

    def __init__(self, slots: int, share: float) -> None:
        """
        Args:
          slots: raw copies that there is room for.
          share: of the steps to sample, 0 to 1.
        """
        self._pages: list[Page | None] = [None] * slots
        self._share = share
        self._random = np.random.default_rng(0)
        self.sums: ErrorSums | None = None  # what was measured, as last told; on the device

    @property
    def used(self) -> int:
        """Raw copies of pages that are sealed now."""
        return sum(self._sealed(page) != NONE for page in self._pages)

    def choose(self, page: Page, sealed_pages: int) -> int:
        """The slot for a page that is being sealed, NONE for none: a free one, else with a chance
        that gives every page in use the same one.

        Args:
          page: has its id of a sealed page.
          sealed_pages: in use, this one included.
        """
        if not self._pages:
            return NONE
        slots = [i for i, old in enumerate(self._pages) if old is None or old.sealed == NONE]
        if not slots and self._random.random() * sealed_pages < len(self._pages):
            slots = [int(self._random.integers(len(self._pages)))]
        if not slots:
            return NONE
        self._pages[slots[0]] = page
        return slots[0]

    def sample(self) -> np.ndarray | None:
        """i32[slots], the sealed page that each shadow is of or NONE, in steps that are sampled;
        None in the others. Call it once a step."""
        if not self._pages or self._random.random() >= self._share or not self.used:
            return None
        return np.array([self._sealed(page) for page in self._pages], np.int32)

    def errors(self) -> ErrorStatistics:
        """What was measured so far, per layer; waits for the device."""
        if self.sums is None:
            return ErrorStatistics([], [], [], [], [], [])
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), self.sums)
        count = np.maximum(sums.samples, 1)
        mean = sums.output / count
        return ErrorStatistics(
            samples=[int(x) for x in sums.samples],
            output_mean=mean.tolist(),
            output_std=np.sqrt(np.maximum(sums.output_squares / count - mean**2, 0)).tolist(),
            output_max=sums.output_max.tolist(),
            lse_mean=(sums.lse / count).tolist(),
            lse_max=sums.lse_max.tolist(),
        )

    @staticmethod
    def _sealed(page: Page | None) -> int:
        """A page that was freed, preempted or could not be sealed has no code to compare with; one
        that was preempted and is back has the same code, maybe elsewhere."""
        return NONE if page is None or page.pending else page.sealed
