"""How far ahead we are of the best of the others."""

from collections.abc import Sequence

from .harness import OPERATIONS, Timed
from .section import Section

COMPILED = "KIVI in compiled torch"  # no project's code, but what a good one could reach


def times(middle: float, low: float, high: float) -> str:
    """A ratio with its quartiles."""
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def best(sections: Sequence[Section]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: for every operation the fastest peer, and its time in ours."""
    rows = []
    for section in sections:
        ours, *others = section.timed
        compiled = [t for t in others if t.name == COMPILED]
        others = [t for t in others if t.name != COMPILED]
        for operation in OPERATIONS if others else ():

            def ratio(t: Timed, operation: str = operation, ours: Timed = ours) -> str:
                return times(*t.ratio(operation, ours))

            first = min(others, key=lambda t: t.ratio(operation, ours)[0])
            rows.append(
                [
                    f"{operation}, {ours.bits} bits",
                    first.name,
                    ratio(first),
                    ratio(compiled[0]) if compiled else "-",
                ]
            )
    title = "The fastest of the others, and how many times our time it takes"
    return title, ["", "fastest", "times ours", f"{COMPILED}, times ours"], rows
