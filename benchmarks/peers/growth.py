"""How the cost grows with tokens, heads, batch and layers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .contract import Shape
from .harness import OPERATIONS
from .section import Section

# field of the shape: how a table calls it
SIZES = {"tokens": "tokens", "kv_heads": "KV heads", "batch": "batch", "layers": "layers"}


def growing(shape: Shape) -> list[Shape]:
    """Shapes that differ from one in one size at most."""
    return [
        *(dataclasses.replace(shape, tokens=shape.tokens * n) for n in (1, 2, 4)),
        *(dataclasses.replace(shape, kv_heads=n, heads=4 * n) for n in (2, 4, 16)),
        *(dataclasses.replace(shape, batch=n) for n in (2, 4)),
        *(dataclasses.replace(shape, layers=n) for n in (4, 16)),
    ]


def growth(sections: Sequence[Section]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of two tables for each number of bits: milliseconds of each shape,
    and the exponents that fit them."""
    tables = []
    for bits in sorted({t.bits for s in sections for t in s.timed}, reverse=True):
        of_bits = [s for s in sections if any(t.bits == bits for t in s.timed)]
        tables += [_milliseconds(of_bits, bits), _exponents(of_bits, bits)]
    return tables


def exponent(sizes: Sequence[float], milliseconds: Sequence[float]) -> float:
    """e of the power law, time ~ size ** e, that fits best: 1 is in proportion."""
    return float(np.polyfit(np.log(sizes), np.log(milliseconds), 1)[0])


def _names(sections: Sequence[Section]) -> list[str]:
    """Of those who were timed on every shape."""
    return [t.name for t in sections[0].timed if all(_has(s, t.name) for s in sections)]


def _has(section: Section, name: str) -> bool:
    return any(t.name == name for t in section.timed)


def _time(section: Section, name: str, operation: str) -> float:
    """Milliseconds of all of the section's tokens."""
    (timed,) = (t for t in section.timed if t.name == name)
    return timed.milliseconds(operation, 1.0)


def _milliseconds(sections: Sequence[Section], bits: int) -> tuple[str, list[str], list[list[str]]]:
    names = _names(sections)
    columns = [" x ".join(SIZES.values()), *(f"{n}: {o}" for n in names for o in OPERATIONS)]
    rows = []
    for section in sections:
        row = [" x ".join(str(getattr(section.shape, field)) for field in SIZES)]
        row += [f"{_time(section, n, o):.1f}" for n in names for o in OPERATIONS]
        rows.append(row)
    return f"{bits} bits: how the cost grows, ms in all", columns, rows


def _exponents(sections: Sequence[Section], bits: int) -> tuple[str, list[str], list[list[str]]]:
    names, base = _names(sections), sections[0].shape
    columns = ["in", *(f"{n}: {o}" for n in names for o in OPERATIONS)]
    rows = []
    for field, word in SIZES.items():
        others = [f for f in SIZES if f != field]
        series = [
            s for s in sections if all(getattr(s.shape, f) == getattr(base, f) for f in others)
        ]
        if len(series) < 2:
            continue
        sizes = [getattr(s.shape, field) for s in series]
        rows.append(
            [
                f"{word}, {min(sizes)} to {max(sizes)}",
                *(
                    f"{exponent(sizes, [_time(s, n, o) for s in series]):.2f}"
                    for n in names
                    for o in OPERATIONS
                ),
            ]
        )
    return f"{bits} bits: the exponent e that fits best, cost ~ size^e", columns, rows
