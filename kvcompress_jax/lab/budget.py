"""What a sequence takes in the cache, and what that leaves for the code of its sealed pages."""

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.paged.layout import INDEX_BYTES, CacheLayout


def sequence_bytes(layout: CacheLayout, config: CompressionConfig, tokens: int) -> int:
    """Device bytes of one sequence when every page that may be sealed is: pages, scales, fine
    chunks, exact first tokens, raw window, table.

    Args:
      layout: of the cache.
      config: of the compression.
      tokens: of the sequence.
    """
    sealed = _sealed_pages(layout, config, tokens)
    chunks = layout.layers if config.sealed_level == 1 else len(config.floors(layout.layers))
    each = layout.sealed_page_bytes + chunks * layout.fine_chunk_bytes
    return sealed * (each + 2 * INDEX_BYTES) + _uncoded_bytes(layout, config, tokens)


def sequence_bits(layout: CacheLayout, config: CompressionConfig, tokens: int) -> float:
    """The same per key or value of the sequence."""
    return 8 * sequence_bytes(layout, config, tokens) / _values(layout, tokens)


def bits_for_code(
    layout: CacheLayout, config: CompressionConfig, tokens: int, *, bits: float
) -> float:
    """Bits per value that sealed pages may take, table entries included, when the whole sequence
    is to take `bits`; nothing or less where the rest takes more than that."""
    sealed = _sealed_pages(layout, config, tokens) * layout.page_size
    if not sealed:
        return 0.0
    left = bits * _values(layout, tokens) - 8 * _uncoded_bytes(layout, config, tokens)
    return left / _values(layout, sealed)


def _sealed_pages(layout: CacheLayout, config: CompressionConfig, tokens: int) -> int:
    if not config.compresses:
        return 0
    return max(0, tokens - config.window_tokens) // layout.page_size


def _uncoded_bytes(layout: CacheLayout, config: CompressionConfig, tokens: int) -> int:
    """Raw pages with their table entries, and the exact first tokens."""
    sealed = _sealed_pages(layout, config, tokens)
    raw = -(-tokens // layout.page_size) - sealed
    return raw * (layout.raw_page_bytes + 2 * INDEX_BYTES) + bool(sealed) * layout.sink_slot_bytes


def _values(layout: CacheLayout, tokens: int) -> int:
    return tokens * layout.layers * layout.values_per_page // layout.page_size
