"""How a budget in bytes is divided among the pools."""

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.paged.layout import CacheLayout, PoolSizes


def divide_budget(
    layout: CacheLayout,
    config: CompressionConfig,
    *,
    budget_bytes: int,
    max_sequences: int,
    step_tokens: int,
) -> PoolSizes:
    """Pool sizes whose arrays take at most `budget_bytes`.

    Every sequence gets raw pages for its window and for decoding, and a slot for its exact first
    tokens; one at a time gets more, for the tokens of a prompt's chunk. The rest goes to sealed
    pages, with fine chunks for all of them when pages are sealed at level 1, and for the floor
    layers when not. Without compression everything is raw pages.

    Args:
      layout: of the cache.
      config: what will be done with it.
      budget_bytes: device memory for the cache.
      max_sequences: sequences that are on the device at the same time.
      step_tokens: most tokens that a sequence adds in a step; only one adds more than one.

    Raises:
      ConfigError: the budget has no room for the raw pages and one sealed page per sequence.
    """
    if not config.compresses:
        pages = budget_bytes // layout.raw_page_bytes
        if pages < max_sequences:
            raise ConfigError(
                f"budget_bytes: expected at least {max_sequences * layout.raw_page_bytes}"
                f" (a page for each of {max_sequences} sequences), got {budget_bytes}"
            )
        return PoolSizes(raw_pages=pages, sealed_pages=0, fine_chunks=0, sink_slots=0)
    raw = _raw_pages(layout, config, step_tokens)
    raw += (max_sequences - 1) * _raw_pages(layout, config, 1)
    sinks = _sink_slots(config, max_sequences)
    fixed = raw * layout.raw_page_bytes + sinks * layout.sink_slot_bytes
    shadows = config.shadow_pages
    if shadows:
        fixed += shadows * layout.uncompressed_page_bytes + layout.telemetry_bytes
    chunks_per_page = _chunks_per_page(layout, config)
    per_page = layout.sealed_page_bytes + chunks_per_page * layout.fine_chunk_bytes
    sealed = (budget_bytes - fixed) // per_page
    if sealed < max_sequences:
        raise ConfigError(
            f"budget_bytes: expected at least {fixed + max_sequences * per_page} ({raw} raw pages"
            f" and a sealed page for each of {max_sequences} sequences), got {budget_bytes}"
        )
    return PoolSizes(
        raw_pages=raw,
        sealed_pages=sealed,
        fine_chunks=sealed * chunks_per_page,
        sink_slots=sinks,
        shadow_pages=shadows,
    )


def pools_for_tokens(
    layout: CacheLayout,
    config: CompressionConfig,
    *,
    tokens: int,
    max_sequences: int,
    step_tokens: int,
) -> PoolSizes:
    """Pool sizes that hold a given number of tokens, with nothing to spare.

    Args:
      layout: of the cache.
      config: what will be done with it.
      tokens: of all sequences together; shared ones count once.
      max_sequences: that are on the device at the same time.
      step_tokens: most tokens that one sequence adds in a step.
    """
    pages = -(-tokens // layout.page_size) + max_sequences
    if not config.compresses:
        return PoolSizes(
            raw_pages=pages + max_sequences, sealed_pages=0, fine_chunks=0, sink_slots=0
        )
    chunks_per_page = _chunks_per_page(layout, config)
    return PoolSizes(
        raw_pages=_raw_pages(layout, config, step_tokens)
        + (max_sequences - 1) * _raw_pages(layout, config, 1),
        sealed_pages=pages,
        fine_chunks=pages * chunks_per_page,
        sink_slots=_sink_slots(config, max_sequences),
        shadow_pages=config.shadow_pages,
    )


def _chunks_per_page(layout: CacheLayout, config: CompressionConfig) -> int:
    """Fine chunks of a page at the level that it is sealed at."""
    return layout.layers if config.sealed_level == 1 else len(config.floors(layout.layers))


def _sink_slots(config: CompressionConfig, max_sequences: int) -> int:
    """One for each sequence, and with a prefix cache for three times as many that ended."""
    return max_sequences * (1 if config.prefix_cache_bytes is None else 4)


def _raw_pages(layout: CacheLayout, config: CompressionConfig, step_tokens: int) -> int:
    """Raw pages of one sequence: its window, an unfinished page, and a step's tokens."""
    return -(-(config.window_tokens + step_tokens) // layout.page_size) + 1
