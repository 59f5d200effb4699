"""Which pages change their level: by age, by importance, under pressure.

Everything here is a pure function of what the host knows; `KVCacheManager` acts on it.
"""

import statistics
from collections.abc import Collection, Container, Iterable

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager.page import Page


def coldest(pages: Iterable[Page]) -> list[Page]:
    """Pages at level 1, the one to demote first in front: the least attention, then the oldest."""
    return sorted((p for p in pages if p.level == 1 and not p.pending), key=_coldness)


def _coldness(page: Page) -> tuple[float, int]:
    return page.heat, page.uid


def typical_heat(pages: Iterable[Page]) -> float:
    """Median heat of all sealed pages; 0 when there are none. It does not depend on their levels,
    so that a change of level is no reason for the next one."""
    heats = [p.heat for p in pages if p.level > 0]
    return statistics.median(heats) if heats else 0.0


def aged(pages: Collection[Page], ages: Iterable[int], config: CompressionConfig) -> list[Page]:
    """Pages at level 1 that are old enough for level 2 and not hotter than is typical.

    Args:
      pages: candidates.
      ages: tokens since the last token of each page, in its youngest owner.
      config: says what old is.
    """
    if config.demote_after_tokens is None:
        return []
    typical = typical_heat(pages)
    return [
        page
        for page, age in zip(pages, ages, strict=True)
        if page.level == 1
        and not page.pending
        and age >= config.demote_after_tokens
        and page.heat <= typical
    ]


def displaces(page: Page, cold: Page, config: CompressionConfig) -> bool:
    """Whether a page at level 2 may take the chunks of the coldest page at level 1."""
    return page.heat > config.promote_heat * cold.heat


def hot(pages: Collection[Page], kept: Container[int], config: CompressionConfig) -> list[Page]:
    """Pages at level 2 that deserve level 1 and whose fine planes are kept, hottest first.

    A page must be more than `promote_heat` times hotter than is typical: the gap to `aged`, which
    takes pages that are not hotter than typical, keeps pages from flapping.
    """
    bar = config.promote_heat * typical_heat(pages)
    found = [p for p in pages if p.level == 2 and p.uid in kept and p.heat > bar]
    return sorted(found, key=_coldness, reverse=True)
