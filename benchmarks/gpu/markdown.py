"""Tables in Markdown."""

from collections.abc import Sequence


def row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
