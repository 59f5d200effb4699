"""Which pages change their level: by age, by importance, under pressure.

Everything here is a pure function of arrays over the sealed pages; `LevelControl` acts on it.
"""

from typing import Protocol

import numpy as np

from kvcompress_jax.config import CompressionConfig


class Coldness(Protocol):
    """Says in what order pages lose their fine planes under pressure."""

    def __call__(self, pages: np.ndarray) -> np.ndarray:
        """f[n] for the sealed pages with these ids, i64[n]: the greatest is demoted first."""


def coldest(coldness: np.ndarray, pages: np.ndarray, uids: np.ndarray, most: int) -> np.ndarray:
    """Of pages at level 1, the ones to demote first: the coldest, among them the oldest.

    Args:
      coldness: of each page.
      pages: their ids.
      uids: their uids: the order of their age.
      most: how many to return at most.

    Returns:
      i64[at most `most`] ids, the first to go first.
    """
    if len(pages) > most:
        near = np.argpartition(-coldness, most - 1)[:most]
        pages, coldness, uids = pages[near], coldness[near], uids[near]
    return pages[np.lexsort((uids, -coldness))]


def typical_heat(heat: np.ndarray, level: np.ndarray) -> float:
    """Median heat of all sealed pages; 0 when there are none. It does not depend on their levels,
    so that a change of level is no reason for the next one."""
    heats = heat[level > 0]
    return float(np.median(heats)) if len(heats) else 0.0


def aged(heat: np.ndarray, level: np.ndarray, old: np.ndarray, typical: float) -> np.ndarray:
    """Ids of pages at level 1 that are old enough for level 2 and not hotter than is typical."""
    return np.flatnonzero(old & (level == 1) & (heat <= typical))


def displaces(heat: float, cold: float, config: CompressionConfig) -> bool:
    """Whether a page at level 2 may take the chunks of the coldest page at level 1."""
    return heat > config.promote_heat * cold


def hot(
    heat: np.ndarray, level: np.ndarray, typical: float, config: CompressionConfig
) -> np.ndarray:
    """Ids of pages at level 2 that deserve level 1, hottest first.

    A page must be more than `promote_heat` times hotter than is typical: the gap to `aged`, which
    takes pages that are not hotter than typical, keeps pages from flapping.
    """
    found = np.flatnonzero((level == 2) & (heat > config.promote_heat * typical))
    return found[np.argsort(-heat[found], kind="stable")]
